r"""Captions the pictures of any prepared data set with a Hugging Face image-to-text model, for VTPH.

    pip install -r requirements-generation.txt
    python data/make_image_captions.py --config-file configs/VTPH/coco.yaml \
        --model Salesforce/blip-image-captioning-base

Writes `image_caption.mat` into the data set's folder: one sentence a picture, in the order of the index. With
`--output captions.jsonl` it writes lines `{"id": ..., "caption": ...}`, which keep their sense if the index changes.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a script: the packages of the repository stand one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from utils.signals import die_of_interrupts

    die_of_interrupts()

import torch

from common.config import Config
from common.errors import UserError
from data.command_line import named_path
from data.generation import Captioner, Journal, base_parser, caption_pictures, digest, open_bare_dataset, run
from data.mat_files import string_rows, write_mat
from utils.files import claimed, write_text

log = logging.getLogger(__name__)


def make(options: argparse.Namespace, config: Config, device: torch.device) -> None:
    """Captions all pictures and writes the file.

    Args:
        options: Of the command line.
        config: Names the data set.
        device: Where the model runs.

    Raises:
        UserError: If data, model or file are not as they must be.
    """
    if options.output.suffix not in (".mat", ".jsonl"):
        raise UserError(f"--output {options.output}: must end in .mat or .jsonl")
    data = open_bare_dataset(config)
    names = list(data.names)
    path = Path(config.dataset.root) / options.output
    if path.exists() and path.name not in config.dataset.image_captions:
        raise UserError(f"--output {path}: is there already; remove it, or name another file")
    settings = {"model": options.model, "max_tokens": options.max_tokens, "beams": options.beams}
    with claimed(path.parent, "--output"):
        source = {**settings, "batch_size": options.batch_size, "pictures": digest(names)}
        journal = Journal(path.with_name(f".{path.name}.captions"), source)
        captions = caption_pictures(
            data.pictures,
            len(names),
            lambda: Captioner(options.model, device, options.max_tokens, options.beams),
            options.batch_size,
            journal,
        )
        if path.suffix == ".mat":
            write_mat(path, image_caption=string_rows(captions))
        else:
            rows = (json.dumps({"id": name, "caption": text}) for name, text in zip(names, captions, strict=True))
            write_text(path, "".join(f"{row}\n" for row in rows))
        journal.remove()
    log.info("written %s: %d captions, such as %r", path, len(captions), captions[0])
    if path.name not in config.dataset.image_captions:
        log.info("it is read when dataset.image_captions names it")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of the script; exit code 2 for a user's mistake."""
    parser = base_parser((__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True, help="image-to-text model: a folder, or its name on the hub")
    parser.add_argument(
        "--output",
        type=named_path,
        default=Path("image_caption.mat"),
        help="file to write, .mat or .jsonl, in the data set's folder unless it names another (%(default)s)",
    )
    return run(parser, make, arguments)


if __name__ == "__main__":
    sys.exit(main())
