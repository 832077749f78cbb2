"""What can be indexed: files, lines, manifests and data sets as one stream of things, each a picture or a text."""

import glob
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from common.checkpoint_config import checkpoint_config
from common.config import dataset_file, load_dataset
from common.errors import UserError
from dataset.base import PairedDataset, dataset_class
from dataset.columns import CaptionColumn, PictureColumn, RowColumn, WordColumn
from dataset.loader import caption_draws
from dataset.manifest_rows import ManifestRow, is_manifest, read_manifest
from dataset.pictures.reading import spellings
from dataset.splits import SPLITS, Split
from runners.encoder import Encoder, read_picture
from runners.search.engine import Kind
from runners.setup import open_dataset
from utils.files import is_utf8

SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .gif .bmp .dib .tif .tiff .webp .ppm .pgm .pbm .pnm .jp2 .j2k .jpc .jpf .jpx".split()
)
DATASET = "dataset:"
_FORMS = (
    "a folder, a pattern such as 'photos/**/*.jpg', a picture, a .txt file of lines, a .jsonl or .csv manifest, or "
    f"{DATASET}NAME"
)


class PictureFile:
    """A picture that is read when it is due; `size` is its width and height from then on."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.size: tuple[int, int] | None = None

    def __call__(self) -> Image.Image:
        """The picture.

        Raises:
            UserError: If it cannot be read, or found again by what an index keeps.
        """
        if not is_utf8(self.path):
            raise UserError(f"picture {ascii(self.path)} has a name that is not UTF-8; rename it, or leave it out")
        picture = read_picture(self.path)
        self.size = picture.size
        return picture

    @property
    def stamp(self) -> str:
        """State of the file; empty where there is none."""
        try:
            found = os.stat(self.path)
        except OSError:
            return ""
        return f"{found.st_mtime_ns}-{found.st_size}"


class StoredPicture(PictureFile):
    """A picture of a data set that keeps them in no files of their own."""

    def __init__(self, data: PairedDataset, number: int) -> None:
        super().__init__("")
        self.data = data
        self.number = number

    def __call__(self) -> Image.Image:
        """As `PictureFile.__call__`."""
        picture = self.data.pictures.read(self.number)
        self.size = picture.size
        return picture

    @property
    def stamp(self) -> str:
        """The state of the data set's files."""
        return self.data.splits.fingerprint


@dataclass(frozen=True, slots=True)
class Thing:
    """One picture or one text to be indexed.

    Attributes:
        kind: Which.
        key: What it is; things with equal keys of a kind are the same.
        item: What it can be encoded from, by batch field.
        metadata: JSON values to be shown with a hit.
    """

    kind: Kind
    key: str
    item: dict[str, Any]
    metadata: dict[str, Any] = field(default_factory=dict)


class Input(ABC):
    """What one `--input` names.

    Attributes:
        name: The same for the same input, wherever a command is started.
    """

    name: str

    @abstractmethod
    def things(self) -> Iterator[Thing]:
        """All that is to be indexed, in an order that stays the same.

        Raises:
            UserError: If it cannot be read.
        """


class Files(Input):
    """Pictures in a folder and all below it, of a pattern, or a single one; what lies hidden is left alone."""

    def __init__(self, name: str, paths: Sequence[str] | None = None) -> None:
        self.name = name
        self.paths = paths

    def things(self) -> Iterator[Thing]:
        """As `Input.things`."""
        for path in self._walk() if self.paths is None else self.paths:
            if os.path.splitext(path)[1].lower() in SUFFIXES:
                name = path.encode("utf-8", "backslashreplace").decode()
                yield Thing("image", name, {"image": PictureFile(path)}, {"path": name})

    def _walk(self) -> Iterator[str]:
        for folder, below, names in os.walk(self.name, onerror=_refuse_folder):
            below[:] = sorted(name for name in below if not name.startswith("."))
            yield from (os.path.join(folder, name) for name in sorted(names) if not name.startswith("."))


def _refuse_folder(error: OSError) -> None:
    """A folder passed over would take its pictures out of an index that has them."""
    raise UserError(f"folder {error.filename} cannot be read ({error.strerror}); allow it, or name other folders")


class Lines(Input):
    """A text file with a text a line; blank lines are passed over."""

    def __init__(self, path: str) -> None:
        self.name = path

    def things(self) -> Iterator[Thing]:
        """As `Input.things`."""
        try:
            with open(self.name, encoding="utf-8-sig") as file:
                for line in map(str.strip, file):
                    if line:
                        yield Thing("text", line, {"text": line}, {"text": line})
        except OSError as error:
            raise UserError(f"--input {self.name} cannot be read ({error.strerror})") from None
        except UnicodeDecodeError as error:
            raise UserError(f"--input {self.name} is not UTF-8 text (byte {error.start}); convert it") from None


class Manifest(Input):
    """A JSONL or CSV file; pictures and texts of a row are indexed each for itself, with the row's other columns."""

    def __init__(self, path: str) -> None:
        self.name = path

    def things(self) -> Iterator[Thing]:
        """As `Input.things`."""
        for row in read_manifest(Path(self.name)):
            if row.image is not None and not row.image.isascii():
                row = replace(row, image=next(filter(os.path.exists, spellings(row.image)), row.image))
            yield from _things_of_row(row)


def _things_of_row(row: ManifestRow) -> Iterator[Thing]:
    shared = dict(row.metadata) | ({} if row.labels is None else {"labels": list(row.labels)})
    # A method may read one modality beside the other, and a sentence about the picture
    beside: dict[str, Any] = {name: row.metadata[name] for name in ("image_caption",) if name in row.metadata}
    if row.image is not None:
        item = beside | {"image": PictureFile(row.image)} | ({"text": row.texts[0]} if row.texts else {})
        yield Thing("image", row.image, item, shared | {"path": row.image, "texts": list(row.texts)})
    for text in row.texts:
        item, metadata = beside | {"text": text}, shared | {"text": text}
        if row.image is None:
            yield Thing("text", text, item, metadata)
        else:
            item["image"] = PictureFile(row.image)
            yield Thing("text", f"{row.image}\n{text}", item, metadata | {"path": row.image})


class DataSplit(Input):
    """A split of a data set: of every item the picture, and the text that evaluation takes.

    Args:
        data: The data set.
        split: Which.
        fields: What is read, beside pictures and texts.
        seed: `run.seed`, which chooses among several texts.
        caption: `evaluate.caption`.
    """

    def __init__(self, data: PairedDataset, split: Split, fields: frozenset[str], seed: int, caption: str) -> None:
        self.name = f"{DATASET}{data.config.name}:{split}"
        self.data = data
        self.split: Split = split
        self.items = data.splits.items(split).tolist()
        self.fields = sorted(data.columns[split].keys() & (fields | {"image", "text"}))
        self.files = data.pictures.files()
        self.draws = caption_draws(seed, torch.arange(len(self.items)), random=caption == "random")

    def things(self) -> Iterator[Thing]:
        """As `Input.things`."""
        for row, item in enumerate(self.items):
            key = f"{DATASET}{self.data.config.name}#{item}"
            fields = {name: self._value(name, row) for name in self.fields}
            labels = self.data.labels[item].nonzero()[:, 0].tolist()
            metadata: dict[str, Any] = {"name": self.data.names[item], "labels": labels}
            picture, text = fields["image"], fields.get("text")
            if picture.path:
                metadata["path"] = os.path.abspath(picture.path)
            yield Thing("image", key, fields, metadata | ({} if text is None else {"texts": [text]}))
            if text is not None or "bag_of_words" in fields:
                yield Thing("text", key, fields, metadata | ({} if text is None else {"text": text}))

    def _value(self, name: str, row: int) -> Any:
        """What an encoder takes for a field: a picture, a string, or numbers."""
        column, place = self.data.columns[self.split][name], torch.tensor([row])
        if isinstance(column, PictureColumn):
            number = int(column.numbers[row])
            return StoredPicture(self.data, number) if self.files is None else PictureFile(self.files[number])
        if isinstance(column, CaptionColumn):
            return column.captions.chosen(column.items[place], self.draws[place])[0]
        if isinstance(column, WordColumn):
            return "\n".join(column.words.texts[int(column.items[row])])
        if isinstance(column, RowColumn):
            return column.rows(place, self.draws[place])[0]
        raise TypeError(f"{name} is a column of an unknown kind")


def open_input(text: str, encoder: Encoder, overrides: Sequence[str]) -> Input:
    """What one `--input` names.

    Args:
        text: A folder, a pattern, a file, or `dataset:NAME`, with `:query`, `:train`, `:validation` or `:database` (the
            default).
        encoder: Whose codes will be made; its checkpoint's settings are those of its own data set.
        overrides: Entries `dataset.key=value`.

    Raises:
        UserError: If there is no such thing.
    """
    if text.startswith(DATASET):
        return _open_split(text, encoder, list(overrides))
    if overrides:
        raise UserError(f"{overrides[0]}: {text} is no data set, so it has no such setting; leave it out")
    path = os.path.abspath(os.path.expanduser(text))
    if not is_utf8(path):
        raise UserError(f"--input {ascii(text)} has a name that is not UTF-8; rename it, or make a link to it")
    if os.path.isdir(path):
        return Files(path)
    if os.path.isfile(path):
        suffix = os.path.splitext(path)[1].lower()
        if is_manifest(Path(path)):
            return Manifest(path)
        if suffix == ".txt":
            return Lines(path)
        if suffix in SUFFIXES:
            return Files(path, [path])
        raise UserError(f"--input {text} is of no known kind; name {_FORMS}")
    if glob.has_magic(text):
        paths = sorted(found for found in glob.iglob(path, recursive=True) if os.path.isfile(found))
        if paths:
            return Files(path, paths)
    raise UserError(f"--input {text} is not there; name {_FORMS}")


def _open_split(text: str, encoder: Encoder, overrides: list[str]) -> DataSplit:
    name, _, wanted = text.removeprefix(DATASET).partition(":")
    split = next((split for split in SPLITS if split == (wanted or "database")), None)
    if split is None:
        raise UserError(f"--input {text}: {wanted!r} is no split; name one of {', '.join(SPLITS)}")
    fields = encoder.fields["image"] | encoder.fields["text"]
    trained_on = encoder.tree.get("dataset")
    if isinstance(trained_on, dict) and trained_on.get("name") == name:
        config = checkpoint_config(encoder.tree, encoder.path, overrides, f"name its YAML: --input {DATASET}FILE.yaml")
        return DataSplit(open_dataset(config), split, fields, config.run.seed, config.evaluate.caption)
    section = load_dataset(dataset_file(name, f"--input {DATASET}"), overrides)
    cls = dataset_class(section.type)
    cls.ensure(section)
    return DataSplit(cls(section), split, fields, 0, "first")
