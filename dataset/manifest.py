"""Data sets of one's own: one JSONL or CSV file that says which pictures, texts and labels belong together.

    {"image": "1.jpg", "texts": ["a cat", "a cat asleep"], "labels": ["cat"]}

`manifest_rows.py` says what a row may hold. Beside image, text and labels three columns have a meaning here: `split`
(query, train, database or validation), `image_caption` (a sentence that describes the picture), and `family` (rows with
the same one are variants of one thing, which the split keeps together).
"""

import logging
import os
import unicodedata
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.places import DataPath
from common.registry import DATASETS, near_names
from dataset.base import Contents, PairedConfig, PairedDataset
from dataset.columns import CaptionColumn
from dataset.manifest_rows import ManifestRow, misnamed, read_manifest
from dataset.pictures.reading import PictureFiles, list_folder, spellings
from dataset.splits import SPLITS, Split
from dataset.texts.captions import Captions
from dataset.texts.files import read_lines
from utils.progress import progress

log = logging.getLogger(__name__)


class ManifestConfig(PairedConfig):
    """`dataset:` section of a manifest."""

    file: DataPath  # the manifest: .jsonl, .ndjson or .csv
    image_root: DataPath | None  # folder that its paths start from and may not leave; null = the manifest's own
    label_names: DataPath | None  # text file with one label a line, in the order of the columns; null = as they turn up


@dataclass
class _Rows:
    """What is kept of the rows, column by column: a million of them must fit."""

    lines: "array[int]" = field(default_factory=lambda: array("q"))
    names: list[str] = field(default_factory=list)  # of the pictures, from the root
    texts: list[tuple[str, ...]] = field(default_factory=list)
    label_of: "array[int]" = field(default_factory=lambda: array("l"))  # numbers of all labels, row after row
    labelled: "array[int]" = field(default_factory=lambda: array("l"))  # the row of each
    splits: list[str | None] = field(default_factory=list)
    captions: list[str | None] = field(default_factory=list)
    families: list[str | None] = field(default_factory=list)
    others: dict[str, None] = field(default_factory=dict)  # names of further columns


@DATASETS.register("manifest")
class ManifestDataset(PairedDataset):
    """One's own pictures, texts and labels, from one JSONL or CSV file (docs/own-data.md).

    Args:
        config: The `dataset:` section.

    Raises:
        UserError: If the file or a picture is missing, a row is not as it must be, or the splits cannot be made.
    """

    Config: ClassVar[type[PairedConfig]] = ManifestConfig

    config: ManifestConfig

    def __init__(self, config: ManifestConfig) -> None:
        super().__init__(config)
        if not self.labels.shape[1]:
            for columns in self.columns.values():
                del columns["labels"]
        if self._image_captions is not None:
            captions = Captions(self._image_captions, config.text_length, config.tokens)
            for split, columns in self.columns.items():
                columns["image_caption"] = CaptionColumn(captions, self.splits.items(split))
            train = self.columns["train"]
            train.update(counterpart_image=train["image"], counterpart_caption=train["image_caption"])

    def open(self) -> Contents:
        """As `PairedDataset.open`."""
        config, path = self.config, Path(self.config.file)
        root = os.path.abspath(path.parent if config.image_root is None else config.image_root)
        if not path.exists():
            raise UserError(f"manifest {path} of data set {config.name} is not there; set dataset.file to it")
        fixed = None if config.label_names is None else _label_names(Path(config.label_names))
        numbers = {} if fixed is None else {name: number for number, name in enumerate(fixed)}
        rows = _read(path, root, numbers, fixed is not None)
        pictures = PictureFiles(_find_pictures(path, root, rows), str(path), rows.lines)
        self._image_captions = _image_captions(path, rows)
        labels = _multi_hot(rows, len(numbers))
        if set(numbers) == {"0", "1"} and labels.all():
            raise UserError(
                f"{path} gives every row the labels 0 and 1, as if they were columns; write the names or the class "
                "numbers of the labels that a row has"
            )
        if not labels.shape[1]:
            log.info(
                "%s names no labels%s: for unsupervised methods, measured by pair retrieval (evaluate.pairs)",
                path, misnamed("labels", rows.others),
            )  # fmt: skip
        return Contents(
            names=rows.names,
            pictures=pictures,
            captions=rows.texts,
            labels=labels,
            words=None,
            families=_families(path, rows),
            column=self._split_column(path, rows),
            label_names=list(numbers),
        )

    def way_out(self, field: str, split: Split) -> str:
        """As `PairedDataset.way_out`."""
        if field == "labels":
            return f"give the rows of {self.config.file} labels, or choose an unsupervised method"
        if field in ("image_caption", "counterpart_image", "counterpart_caption"):
            return f"give every row of {self.config.file} an image_caption, or choose another method"
        return super().way_out(field, split)

    def marks(self, fields: frozenset[str]) -> tuple[str, ...]:
        """As `PairedDataset.marks`."""
        return ("texts are encoded alone, without a counterpart",) if "counterpart_image" in fields else ()

    def _split_column(self, path: Path, rows: _Rows) -> dict[Split, Tensor] | None:
        if self.config.split.protocol != "column":
            if any(rows.splits):
                log.info("%s has a split column; dataset.split.protocol=column would obey it", path)
            return None
        found: dict[Split, list[int]] = {split: [] for split in SPLITS}
        for number, name in enumerate(rows.splits):
            split = next((split for split in SPLITS if split == name), None)
            if split is None:
                what = "has no split" if name is None else f"split is {name!r}"
                _refuse(
                    path, rows.lines[number], f"{what}; dataset.split.protocol is column: write {', '.join(SPLITS)}"
                )
            found[split].append(number)
        return {split: torch.tensor(items, dtype=torch.int64) for split, items in found.items()}


def _read(path: Path, root: str, numbers: dict[str, int], fixed: bool) -> _Rows:
    """Reads all rows; labels that turn up are numbered, unless their names are given."""
    rows, seen = _Rows(), dict[str, int]()
    for row in progress(
        read_manifest(path, root=Path(root), needs=("image", "text")), desc="rows", unit="row", leave=False
    ):
        name = (row.image or "")[len(os.path.join(root, "")) :]
        if seen.setdefault(name, row.line) != row.line:
            _refuse(path, row.line, f"{name} stands in line {seen[name]} already; give one row all texts of a picture")
        for label in row.labels or ():
            number = numbers.get(label)
            if number is None and fixed:
                near = near_names(label, list(numbers)) or ";"
                _refuse(path, row.line, f"label {label!r} is not in dataset.label_names{near} add it there")
            rows.label_of.append(numbers.setdefault(label, len(numbers)) if number is None else number)
            rows.labelled.append(len(rows.names))
        rows.others.update(dict.fromkeys(row.metadata))
        rows.lines.append(row.line)
        rows.names.append(name)
        rows.texts.append(row.texts)
        rows.splits.append(_word(path, row, "split"))
        rows.captions.append(_word(path, row, "image_caption"))
        rows.families.append(_word(path, row, "family"))
    if not rows.names:
        raise UserError(f"{path} has no rows; write one for every picture")
    return rows


def _word(path: Path, row: ManifestRow, column: str) -> str | None:
    """A further column that must be a word or a number."""
    value: Any = row.metadata.get(column)
    if value is None or isinstance(value, str):
        return value or None
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    _refuse(path, row.line, f"{column} is {value!r}, not a string")


def _label_names(path: Path) -> list[str]:
    names = [unicodedata.normalize("NFC", name) for name in read_lines(path)]
    if len(set(names)) < len(names) or "" in names:
        raise UserError(f"{path} (dataset.label_names) must name every label once, one a line, none empty")
    return names


def _find_pictures(path: Path, root: str, rows: _Rows) -> list[str]:
    """Paths of the pictures; one listing of every folder instead of a look at every file."""
    folders: dict[str, tuple[str, frozenset[str]]] = {}  # as the manifest writes it -> where it is, names in it
    found: list[str] = []
    missing: list[int] = []
    for number, name in enumerate(rows.names):
        folder, _, file = name.rpartition("/")
        if folder not in folders:
            places = (os.path.join(root, spelt) for spelt in spellings(folder))
            place = next(filter(os.path.isdir, places), None)
            folders[folder] = ("", frozenset()) if place is None else (place, frozenset(list_folder(place)))
        place, names = folders[folder]
        spelt = next((spelt for spelt in spellings(file) if spelt in names), None)
        if spelt is None:
            missing.append(number)
        else:
            found.append(os.path.join(place, spelt))
    if missing:
        first = missing[0]
        raise UserError(
            f"{path}, line {rows.lines[first]}: picture {rows.names[first]!r} is not under {root}; {len(missing)} of "
            f"{len(rows.names)} pictures are missing: fetch them, or set dataset.image_root to their folder"
        )
    return found


def _image_captions(path: Path, rows: _Rows) -> Sequence[Sequence[str]] | None:
    if not any(rows.captions):
        return None
    without = next((number for number, caption in enumerate(rows.captions) if caption is None), None)
    if without is not None:
        _refuse(path, rows.lines[without], "has no image_caption, as other rows have")
    return [(caption,) for caption in rows.captions if caption is not None]


def _families(path: Path, rows: _Rows) -> Tensor | None:
    """Number of every row's family, [N] int64; a row without is one of its own."""
    if not any(rows.families):
        return None
    numbers: dict[Any, int] = {}
    keys = (row if name is None else name for row, name in enumerate(rows.families))
    return torch.tensor([numbers.setdefault(key, len(numbers)) for key in keys], dtype=torch.int64)


def _multi_hot(rows: _Rows, count: int) -> Tensor:
    """[N, C] bool."""
    labels = np.zeros((len(rows.names), count), dtype=bool)
    labels[np.asarray(rows.labelled), np.asarray(rows.label_of)] = True
    return torch.from_numpy(labels)


def _refuse(path: Path, line: int, what: str) -> NoReturn:
    raise UserError(f"{path}, line {line}: {what}")
