r"""Makes the pictures that stand in for a text query's missing partner, and their captions, for VTPH.

    pip install -r requirements-generation.txt
    python data/make_generated_images.py --config-file configs/VTPH/coco.yaml \
        --model stabilityai/sd-turbo --captioner Salesforce/blip-image-captioning-base

Picture j.png belongs to the j-th text of the query split, from 1; line j of `captions.txt` describes it. Of several
captions of an item, the one that `evaluate.caption` and `run.seed` choose as its query is drawn from.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: the packages of the repository stand one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from utils.signals import die_of_interrupts

    die_of_interrupts()

import torch

from common.config import Config
from common.errors import UserError
from data.command_line import named_path
from data.generation import (
    PARTS,
    Captioner,
    Journal,
    base_parser,
    batches,
    caption_pictures,
    digest,
    finite,
    open_bare_dataset,
    open_pretrained,
    optional,
    positive,
    run,
    working,
)
from dataset.base import PairedDataset
from dataset.columns import CaptionColumn
from dataset.mat import COUNTERPART_SOURCE
from dataset.pictures.draws import Purpose, uniform
from dataset.pictures.reading import PictureFiles
from utils.files import atomic, claimed, write_json, write_text
from utils.progress import progress

log = logging.getLogger(__name__)
CAPTIONS = "captions.txt"
JOURNAL = ".captions.part"
PIPELINE = ("diffusers", "AutoPipelineForText2Image")


def query_texts(data: PairedDataset, config: Config) -> list[str]:
    """The text of every query, in the order of the split: of several captions, the one that evaluation chooses.

    Raises:
        UserError: If the data set has word vectors instead of texts.
    """
    column = data.columns["query"].get("text")
    if not isinstance(column, CaptionColumn):
        raise UserError(f"data set {config.dataset.name} has no texts to make pictures from; choose another one")
    items = column.items
    draws = torch.zeros(len(items))
    if config.evaluate.caption == "random":
        rows = torch.arange(len(items)).numpy()
        draws = torch.from_numpy(uniform(config.run.seed, 0, Purpose.EVALUATE_CAPTION, rows, 1)[:, 0])
    return column.captions.chosen(items, draws)


def make(options: argparse.Namespace, config: Config, device: torch.device) -> None:
    """Makes the pictures that are not there yet, then captions all of them.

    Args:
        options: Of the command line.
        config: Names the data set and the protocol of its queries.
        device: Where the models run.

    Raises:
        UserError: If data, models or folder are not as they must be.
    """
    for package, name in (PIPELINE, *(("transformers", part) for part in PARTS)):
        optional(package, name)  # before hours of work with one of them
    data = open_bare_dataset(config)
    texts = query_texts(data, config)
    folder = options.output or Path(config.dataset.root) / "generated"
    source = {
        "model": options.model,
        "steps": options.steps,
        "guidance": options.guidance,
        "size": options.size,
        "seed": options.seed,
        "batch_size": options.batch_size,
        "texts": digest(texts),
        "queries": data.query_fingerprint,
    }
    with claimed(folder, "--output"):
        _claim_contents(folder, source)
        make_pictures(texts, folder, options, device)
        paths = [str(folder / f"{number}.png") for number in range(1, len(texts) + 1)]
        settings = {"model": options.captioner, "max_tokens": options.max_tokens, "beams": options.beams}
        journal = Journal(folder / JOURNAL, {**settings, "pictures": digest(source)})
        captions = caption_pictures(
            PictureFiles(paths, str(folder)),
            len(paths),
            lambda: Captioner(options.captioner, device, options.max_tokens, options.beams),
            options.batch_size,
            journal,
        )
        write_text(folder / CAPTIONS, "".join(f"{caption}\n" for caption in captions))
        journal.remove()
    log.info(
        "written %s: %d pictures and their captions; use them with dataset.query_counterpart=generated "
        "dataset.counterpart_images=%s dataset.counterpart_captions=%s",
        folder,
        len(paths),
        folder,
        folder / CAPTIONS,
    )


def make_pictures(texts: Sequence[str], folder: Path, options: argparse.Namespace, device: torch.device) -> None:
    """Makes `1.png`, `2.png`, ... of texts; a batch whose pictures are all there is passed over.

    Every picture's noise has a generator of its own, so that it does not depend on the others.

    Args:
        texts: What to show, one a picture.
        folder: Where to.
        options: `model`, `steps`, `guidance`, `size`, `seed`, `batch_size`.
        device: Where the model runs.

    Raises:
        UserError: If the model cannot be opened or a picture not be written.
    """
    pipeline: Any = None
    flagged = 0
    with progress(total=len(texts), desc="pictures", unit="picture") as bar:
        for numbers in batches(range(1, len(texts) + 1), options.batch_size):
            paths = [folder / f"{number}.png" for number in numbers]
            if not all(path.exists() for path in paths):
                pipeline = pipeline or open_pipeline(options.model, device)
                with working(options.model):
                    made = pipeline(
                        prompt=[texts[number - 1] for number in numbers],
                        num_inference_steps=options.steps,
                        guidance_scale=options.guidance,
                        height=options.size,
                        width=options.size,
                        generator=[picture_noise(options.seed, number) for number in numbers],
                    )
                flagged += sum(getattr(made, "nsfw_content_detected", None) or [])
                for path, picture in zip(paths, made.images, strict=True):
                    with atomic(path) as temporary:
                        picture.save(temporary, format="PNG")
            bar.update(len(numbers))
    if flagged:
        log.warning("%d pictures were blackened by the model's safety checker", flagged)


def picture_noise(seed: int, number: int) -> torch.Generator:
    """The generator of a picture's noise; seeded from a digest, as the CPU's looks at 32 bits of its seed only."""
    return torch.Generator().manual_seed(int(digest(seed, number)[:8], 16))


def open_pipeline(model: str, device: torch.device) -> Any:
    """Opens a text-to-image pipeline, in float16 on a GPU.

    Raises:
        UserError: If the packages are not installed, or the model cannot be opened or is of another kind.
    """
    pipelines = optional(*PIPELINE)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    pipeline = open_pretrained(pipelines.from_pretrained, model, dtype=dtype).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _claim_contents(folder: Path, source: dict[str, Any]) -> None:
    """Notes what the folder's pictures are made from; refuses a folder with other pictures."""
    path = folder / COUNTERPART_SOURCE
    if path.exists():
        try:
            same = json.loads(path.read_text(encoding="utf-8")) == source
        except ValueError:
            same = False
        if not same:
            raise UserError(f"{folder} holds pictures of other texts or settings; remove it, or name another --output")
    elif others := sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith(".")):
        raise UserError(f"{folder} holds {others[0]}, which was not made here; name another --output")
    else:
        write_json(path, source)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of the script; exit code 2 for a user's mistake."""
    parser = base_parser((__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True, help="text-to-image pipeline: a folder, or its name on the hub")
    parser.add_argument("--captioner", required=True, help="image-to-text model: a folder, or its name on the hub")
    parser.add_argument("--output", type=named_path, help="folder to write (generated, in the data set's folder)")
    parser.add_argument("--steps", type=positive, default=30, help="denoising steps (%(default)s)")
    parser.add_argument("--guidance", type=finite, default=7.5, help="weight of the text (%(default)s)")
    parser.add_argument("--size", type=positive, default=512, help="side of the pictures in pixels (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the pictures' noise (%(default)s)")
    return run(parser, make, arguments)


if __name__ == "__main__":
    sys.exit(main())
