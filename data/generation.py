"""What the scripts that run generative models share: opening the data set, the models, captions kept as they come.

The packages are optional (`requirements-generation.txt`) and imported when a model is opened. Work is cut into fixed
batches and kept batch by batch, so that an interrupted run goes on behind the last whole batch and ends with the bytes
of a run that was never stopped.
"""

import argparse
import hashlib
import importlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from common.config import Config, load_config
from common.errors import UserError
from data.command_line import run_script
from data.mat_files import clean_text, writing
from dataset.base import PairedDataset, dataset_class
from dataset.pictures.reading import Pictures
from utils.arguments import Parser
from utils.launch import pick_device
from utils.logging import setup_logging
from utils.progress import progress

log = logging.getLogger(__name__)
REQUIREMENTS = "requirements-generation.txt"
PARTS = ("AutoImageProcessor", "AutoTokenizer", "AutoModelForImageTextToText")  # of transformers


def optional(package: str, name: str) -> Any:
    """Imports a class from a package of `requirements-generation.txt`.

    Raises:
        UserError: If it is not installed, too old, or lacks what it needs itself.
    """
    try:
        return getattr(importlib.import_module(package), name)
    except (ImportError, AttributeError, RuntimeError) as error:  # they import their parts when these are asked for
        reason = _reason(error)
        raise UserError(f"{package}.{name} cannot be imported ({reason}); pip install -r {REQUIREMENTS}") from None


def open_pretrained(load: Callable[..., Any], model: str, **options: Any) -> Any:
    """Opens a part of a pretrained model.

    Args:
        load: A `from_pretrained`.
        model: A folder, which is opened without any look at the network, or a name on the Hugging Face hub.
        **options: Further arguments of `load`.

    Raises:
        UserError: If it cannot be opened.
    """
    try:
        return load(model, local_files_only=Path(model).is_dir(), **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:  # what the packages raise for whatever is amiss
        raise UserError(
            f"model {model} cannot be opened ({_reason(error)}); name a folder that holds it, or its name on the "
            "Hugging Face hub where there is network"
        ) from None


@contextmanager
def working(model: str) -> Iterator[None]:
    """What a pretrained model says about pictures, texts or settings that it cannot work with, as one line.

    Args:
        model: Its folder or name, for the message.

    Raises:
        UserError: If it fails.
    """
    try:
        yield
    except (ValueError, KeyError, IndexError, TypeError, RuntimeError) as error:  # as in `open_pretrained`
        raise UserError(
            f"model {model} cannot do it ({_reason(error)}); change the option that this speaks of (--batch-size where "
            "memory ran out), or choose another model"
        ) from None


class Captioner:
    """An image-to-text model that needs no prompt: BLIP, GIT, ViT-GPT2 and other vision encoder-decoders.

    Args:
        model: Folder, or name on the Hugging Face hub.
        device: Where it runs.
        max_tokens: Tokens of a caption, at most.
        beams: Of the search; 1 is greedy. Nothing is drawn at random.
    """

    def __init__(self, model: str, device: torch.device, max_tokens: int, beams: int) -> None:
        processor, tokenizer, network = (optional("transformers", name) for name in PARTS)
        self.settings = {"model": model, "max_tokens": max_tokens, "beams": beams}
        self._device = device
        self._processor = open_pretrained(processor.from_pretrained, model)
        self._tokenizer = open_pretrained(tokenizer.from_pretrained, model)
        self._model = open_pretrained(network.from_pretrained, model)
        self._model.to(device).eval()

    @torch.no_grad()
    def captions(self, pictures: Sequence[Image.Image]) -> list[str]:
        """One sentence for each picture, on one line."""
        with working(str(self.settings["model"])):
            pixels = self._processor(images=list(pictures), return_tensors="pt")["pixel_values"].to(self._device)
            ids = self._model.generate(
                pixel_values=pixels,
                max_new_tokens=self.settings["max_tokens"],
                num_beams=self.settings["beams"],
                do_sample=False,
            )
            texts = self._tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [clean_text(text) for text in texts]


class Journal:
    """Captions as they come, one JSON line a batch; from a line on that a kill or the disk damaged, none counts.

    Args:
        path: The file.
        source: What the captions are made from; captions from anything else are not gone on from.
    """

    def __init__(self, path: Path, source: dict[str, Any]) -> None:
        self.path = path
        head = json.dumps(source, sort_keys=True)
        self.batches: list[list[str]] = []
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        self._file = path.open("ab")
        if lines and lines[0] == head.encode():
            self.batches = list(takewhile(bool, map(_captions, lines[1:])))
            self._file.truncate(sum(len(line) + 1 for line in lines[: 1 + len(self.batches)]))
        else:
            if lines:
                log.info("%s: is of other pictures or another model, so all captions are made anew", path)
            self._file.truncate(0)
            self._write(head)

    def append(self, captions: list[str]) -> None:
        """Keeps the captions of the next batch."""
        self.batches.append(captions)
        self._write(json.dumps(captions))

    def remove(self) -> None:
        """Ends the journal: what it holds stands elsewhere."""
        self._file.close()
        self.path.unlink()

    def _write(self, line: str) -> None:
        with writing(self.path):
            self._file.write(f"{line}\n".encode())
            self._file.flush()
            os.fsync(self._file.fileno())


def _captions(line: bytes) -> list[str]:
    """The captions of a journal's line; none where it is damaged."""
    try:
        captions = json.loads(line)
    except ValueError:
        return []
    plain = isinstance(captions, list) and all(isinstance(caption, str) for caption in captions)
    return captions if plain else []


def caption_pictures(
    pictures: Pictures, count: int, open_captioner: Callable[[], Captioner], batch_size: int, journal: Journal
) -> list[str]:
    """Captions of the first pictures, in their order; those in the journal are not made again.

    Args:
        pictures: Reads them.
        count: How many, n.
        open_captioner: Opens the model; not called where the journal holds everything.
        batch_size: Pictures at a time.
        journal: Keeps what was made.

    Returns:
        n captions.

    Raises:
        UserError: If a picture cannot be read or the model cannot be opened.
    """
    captioner = None
    done = len(journal.batches) * batch_size
    with progress(total=count, initial=min(done, count), desc="captions", unit="picture") as bar:
        for batch in batches(range(done, count), batch_size):
            captioner = captioner or open_captioner()
            journal.append(captioner.captions([pictures.read(number) for number in batch]))
            bar.update(len(batch))
    return [caption for captions in journal.batches for caption in captions]


def batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Consecutive pieces of `size` items, the last one perhaps shorter."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def digest(*parts: Any) -> str:
    """Short digest of plain values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def open_bare_dataset(config: Config) -> PairedDataset:
    """Opens the data set of a configuration without what these scripts are about to make.

    Raises:
        UserError: If it cannot be opened, or its kind knows no counterparts.
    """
    made = {"image_captions": [], "query_counterpart": "text_only"}
    if not made.keys() <= type(config.dataset).model_fields.keys():
        raise UserError(
            f"data set {config.dataset.name} is of type {config.dataset.type}, which takes no image captions; "
            "choose one of type mat"
        )
    cls = dataset_class(config.dataset.type)
    cls.ensure(config.dataset)
    return cls(config.dataset.model_copy(update=made))


def base_parser(description: str) -> Parser:
    """The options that the scripts share."""
    parser = Parser(description=description)
    parser.add_argument("--config-file", required=True, help="names the data set, e.g. configs/VTPH/coco.yaml")
    parser.add_argument("--batch-size", type=positive, default=32, help="pictures at a time (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, or a GPU's number (%(default)s)")
    parser.add_argument("--max-tokens", type=positive, default=30, help="tokens of a caption, at most (%(default)s)")
    parser.add_argument("--beams", type=positive, default=3, help="of the captioner's search (%(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="e.g. dataset.root=/data/coco")
    return parser


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def positive(text: str) -> int:
    """A number above zero, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def finite(text: str) -> float:
    """A number that is neither infinite nor none, for argparse."""
    number = float(text)
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text} is no finite number")
    return number


def run(
    parser: Parser,
    work: Callable[[argparse.Namespace, Config, torch.device], None],
    arguments: Sequence[str] | None,
) -> int:
    """The command line of a script: a user's mistake is one line and exit code 2.

    Args:
        parser: Of its options.
        work: Does it: (options, configuration, device).
        arguments: Of the command line; None takes those of the process.

    Returns:
        Exit code.
    """
    setup_logging()

    def configured(options: argparse.Namespace) -> None:
        config = load_config(options.config_file, [*options.overrides, f"run.device={options.device}"])
        work(options, config, pick_device(config.run.device, distribute=False))

    return run_script(parser, configured, arguments)
