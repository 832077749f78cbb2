"""Data sets prepared as .mat files: an index of pictures, captions, labels, and what some methods need besides.

Reads what the authors of DCMHT, DSPH, DNPH, MITH, VTPH and DCMH distribute, without conversion.
"""

import json
import logging
from collections.abc import Mapping, Sequence, Sized
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from common.errors import UserError
from common.places import DataPath
from common.registry import DATASETS
from dataset.base import Contents, PairedConfig, PairedDataset
from dataset.columns import CaptionColumn, MatrixColumn, PictureColumn
from dataset.labels import read_labels
from dataset.mat_reader import number_matrix, read_variable, text_rows
from dataset.pictures.reading import JoinedPictures, PictureFiles, Pictures, resolve_paths
from dataset.splits import Split
from dataset.texts.captions import Captions
from dataset.texts.files import read_json_lines, read_lines

log = logging.getLogger(__name__)

INDEX_KEYS = ("index", "imgs", "FAll", "IAll")
TOPIC_KEYS = ("T_tr", "T_te")
CAPTION_KEYS = ("caption", "tags", "YAll", TOPIC_KEYS[0])
LABEL_KEYS = ("category", "label", "labels", "LAll")
IMAGE_CAPTION_KEYS = ("image_caption",)
IMAGE_FEATURE_KEYS = ("image_feature", "image_features", "img_feature", "I_fea", "XAll")
TEXT_FEATURE_KEYS = ("text_feature", "text_features", "txt_feature", "T_fea", "YAll")
QUERY_LIST_KEYS = ("indexQuery", "param/indexQuery")
DATABASE_LIST_KEYS = ("indexDatabase", "param/indexDatabase")
COUNTERPART_SOURCE = "source.json"  # what data/make_generated_images.py notes beside the pictures it makes


class MatConfig(PairedConfig):
    """`dataset:` section of a data set in .mat files. Of several file names the first that exists is read."""

    root: DataPath  # folder of the files
    image_root: DataPath | None  # folder that the paths in the index start from; null = root
    index: list[str] = Field(min_length=1)  # picture paths, or the pictures themselves
    captions: list[str] = Field(min_length=1)  # .mat, or .txt with one caption a line; or word vectors
    labels: list[str] = Field(min_length=1)
    image_captions: list[str]  # optional: sentences that describe the pictures; .mat, .txt, or .jsonl
    image_features: list[str]  # optional: stored features of the pictures, a row each; .mat, .h5 or .npy
    text_features: list[str]  # optional: ... of the texts, of any other width
    query_counterpart: Literal["generated", "text_only", "paired"]  # what stands in for a text query's picture
    database_counterpart: Literal["paired", "text_only"]  # whether database texts go with their own picture
    counterpart_images: DataPath | None  # generated: folder with 1.png, 2.png, ... in the order of the query split
    counterpart_captions: DataPath | None  # generated: text file with a caption of each of them, one a line


@DATASETS.register("mat")
class MatDataset(PairedDataset):
    """Pairs in .mat files: an index of pictures, captions and labels, as the papers' authors distribute them.

    Args:
        config: The `dataset:` section.

    Raises:
        UserError: If a file is missing, broken or without its variable; if the files list different numbers of items;
            if a picture is missing; if the splits cannot be made.
    """

    Config: ClassVar[type[PairedConfig]] = MatConfig

    config: MatConfig

    def __init__(self, config: MatConfig) -> None:
        super().__init__(config)
        self._add_image_captions()
        self._add_features("image_feature", config.image_features, IMAGE_FEATURE_KEYS)
        self._add_features("text_feature", config.text_features, TEXT_FEATURE_KEYS)
        if config.query_counterpart == "generated":
            self._add_generated_counterparts()

    def open(self) -> Contents:
        """As `PairedDataset.open`."""
        config, root = self.config, Path(self.config.root)
        if not root.is_dir():
            raise UserError(
                f"data folder {root} of data set {config.name} is missing; prepare it (data/README.md says how) or set "
                "dataset.root"
            )
        index_path = _file(root, config.index, "index")
        captions_path = _file(root, config.captions, "captions")
        labels_path = _file(root, config.labels, "labels")
        names, pictures = _read_index(index_path)
        captions, words = _read_captions(captions_path, len(names))
        labels = _read_labels(labels_path, len(names))
        described = words if captions is None else captions
        _check_lengths({index_path: names, captions_path: described, labels_path: labels})
        if captions is not None and not any(text for texts in captions for text in texts):
            raise UserError(f"{captions_path} has no text for any of its {len(captions)} items; make it again")
        if len(set(names)) < len(names):
            log.warning(
                "%s names %d pictures more than once: a query may find its own picture in the database",
                index_path, len(names) - len(set(names)),
            )  # fmt: skip
        if pictures is None:
            image_root = root if config.image_root is None else Path(config.image_root)
            pictures = PictureFiles(resolve_paths(names, image_root, str(index_path)), str(index_path))
        lists = None
        if config.split.protocol == "lists":
            lists = _read_lists(labels_path, len(names))
        return Contents(names, pictures, captions, labels, words, lists=lists)

    def way_out(self, field: str, split: Split) -> str:
        """As `PairedDataset.way_out`."""
        config = self.config
        if split == "validation" and field.startswith("counterpart_") and config.query_counterpart == "generated":
            return (
                "pictures are generated for the queries only: set dataset.split.validation=0, or "
                "dataset.query_counterpart=text_only"
            )
        if field in ("image_caption", "counterpart_image", "counterpart_caption"):
            if "image_caption" not in self.columns["train"]:
                names = ", ".join(config.image_captions) or "a file named in dataset.image_captions"
                alone = f", or set dataset.{split}_counterpart=text_only" if field.startswith("counterpart_") else ""
                return f"put one of {names} into {config.root} (data/make_image_captions.py makes it){alone}"
            return "set dataset.query_counterpart to generated (and name the generated pictures) or paired"
        if field in ("image_feature", "text_feature"):
            names = ", ".join(getattr(config, f"{field}s")) or f"a file named in dataset.{field}s"
            return f"put one of {names} into {config.root}, or let the method make features of its own"
        return super().way_out(field, split)

    def marks(self, fields: frozenset[str]) -> tuple[str, ...]:
        """As `PairedDataset.marks`."""
        if "counterpart_image" not in fields:
            return ()
        partners = {
            "paired": "together with their own picture and its caption",
            "generated": "together with a generated picture and its caption",
            "text_only": "alone, without a counterpart",
        }
        query, database = (partners[self._counterpart(split)] for split in ("query", "database"))
        oracle = ", an oracle: do not report these numbers" if self.config.query_counterpart == "paired" else ""
        return (f"query texts are encoded {query}{oracle}", f"database texts are encoded {database}")

    def promised(self, split: Split) -> frozenset[str]:
        """As `PairedDataset.promised`."""
        alone = self._counterpart(split) == "text_only"
        return frozenset() if alone else frozenset({"counterpart_image", "counterpart_caption"})

    def _counterpart(self, split: Split) -> Literal["generated", "text_only", "paired"]:
        """What stands beside the texts of a split; training texts have their own picture."""
        settings = {
            "query": self.config.query_counterpart,
            "validation": self.config.query_counterpart,
            "database": self.config.database_counterpart,
        }
        return settings.get(split, "paired")

    def _add_image_captions(self) -> None:
        """`image_caption`, and the counterparts of texts whose own picture may be used."""
        root = Path(self.config.root)
        path = _existing(root, self.config.image_captions)
        if path is None:
            return
        if path.suffix == ".jsonl":
            texts: list[list[str]] | None = read_json_lines(path, self.names)
        else:
            texts, _ = _read_captions(path, len(self), IMAGE_CAPTION_KEYS)
        if texts is None:
            raise UserError(f"{path} holds numbers, not sentences; write one caption per picture")
        _check_lengths({_file(root, self.config.index, "index"): self.names, path: texts})
        captions = Captions(texts, self.config.text_length, self.config.tokens)
        for split, columns in self.columns.items():
            columns["image_caption"] = CaptionColumn(captions, self.splits.items(split))
            if self._counterpart(split) == "paired":
                columns["counterpart_image"] = columns["image"]
                columns["counterpart_caption"] = columns["image_caption"]

    def _add_features(self, field: str, files: Sequence[str], keys: Sequence[str]) -> None:
        """Stored features, if the data set has such a file."""
        root = Path(self.config.root)
        path = _existing(root, files)
        if path is None:
            return
        variable = read_variable(path, keys)
        features = number_matrix(variable.value, len(self))
        if features is None:
            raise UserError(f"{variable.place} is no matrix of features, one row per pair [N, W]; make it again")
        _check_lengths({_file(root, self.config.index, "index"): self.names, path: features})
        with np.errstate(over="ignore"):  # found below
            matrix = torch.from_numpy(np.array(features, dtype=np.float32, order="C"))
        if not bool(matrix.isfinite().all()):
            raise UserError(f"{variable.place} holds values that are not finite as float32; make it again")
        for split, columns in self.columns.items():
            columns[field] = MatrixColumn(matrix, self.splits.items(split))

    def _add_generated_counterparts(self) -> None:
        """Pictures made from the query texts, as further pictures after those of the index."""
        images, captions = self.config.counterpart_images, self.config.counterpart_captions
        if images is None or captions is None:
            raise UserError(
                "dataset.query_counterpart is generated, but counterpart_images or counterpart_captions "
                "is null; name the folder and the file, or set query_counterpart=text_only"
            )
        queries = len(self.splits.query)
        if not Path(images).is_dir():
            raise UserError(f"{images} (dataset.counterpart_images) is not a folder; make the pictures or set its path")
        self._require_same_queries(Path(images))
        texts = read_lines(Path(captions))
        if len(texts) != queries:
            raise UserError(
                f"{captions} has {len(texts)} lines, but there are {queries} queries; write one caption per query"
            )
        files = [f"{number}.png" for number in range(1, queries + 1)]
        remedy = "make them with data/make_generated_images.py, or set dataset.counterpart_images"
        paths = resolve_paths(files, Path(images), images, remedy)
        numbers = torch.arange(len(self.pictures), len(self.pictures) + queries)
        self.pictures = JoinedPictures(self.pictures, PictureFiles(paths, images))
        columns = self.columns["query"]
        columns["counterpart_image"] = PictureColumn(numbers, self.picture_shape)
        tokens = Captions([[text] for text in texts], self.config.text_length, self.config.tokens)
        columns["counterpart_caption"] = CaptionColumn(tokens, torch.arange(queries))

    def _require_same_queries(self, folder: Path) -> None:
        """Refuses pictures that are noted as made for other queries; those of other programs are taken as they are."""
        try:
            source = json.loads((folder / COUNTERPART_SOURCE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        if isinstance(source, dict) and source.get("queries", self.query_fingerprint) != self.query_fingerprint:
            raise UserError(
                f"{folder} (dataset.counterpart_images) holds pictures made for other queries; set the dataset.split "
                "that they were made for, or make those of this split with data/make_generated_images.py"
            )


def _file(root: Path, names: Sequence[str], key: str) -> Path:
    """As `_existing`; refuses where there is none."""
    path = _existing(root, names)
    if path is None:
        raise UserError(f"{root} has no {' or '.join(names)}; prepare it, or name the file in dataset.{key}")
    return path


def _existing(root: Path, names: Sequence[str]) -> Path | None:
    """The first of some files that exists."""
    return next((root / name for name in names if (root / name).is_file()), None)


def _check_lengths(files: Mapping[Path, Sized | None]) -> None:
    lengths = {path: 0 if rows is None else len(rows) for path, rows in files.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{path} has {length}" for path, length in lengths.items())
        raise UserError(f"{listed} items; they must list the same pairs in the same order: make them again together")


def _read_index(path: Path) -> tuple[list[str], Pictures | None]:
    """Names of the items (their numbers, where the file holds pictures), and the pictures if it holds them."""
    variable = read_variable(path, INDEX_KEYS, text=True)
    if isinstance(variable.value, Pictures):
        return [str(number) for number in range(len(variable.value))], variable.value
    rows = text_rows(variable.value, None)
    if rows is None or any(len(row) > 1 for row in rows):
        raise UserError(f"{variable.place} is neither a list of picture paths nor a stack of pictures; make it again")
    empty = next((number for number, row in enumerate(rows) if not row[0]), None)
    if empty is not None:
        raise UserError(f"{variable.place}: row {empty} is an empty path; mend it, or remove the row from all files")
    return [row[0] for row in rows], None


def _read_captions(
    path: Path, count: int, keys: Sequence[str] = CAPTION_KEYS
) -> tuple[list[list[str]] | None, Tensor | None]:
    """Texts of every item, or word vectors [N, V], bool or float32, where the file holds such."""
    if path.suffix == ".txt":
        return [[line] for line in read_lines(path)], None
    variable = read_variable(path, keys, text=True)
    texts = text_rows(variable.value, count)
    if texts is not None:
        return texts, None
    words = number_matrix(variable.value, count)
    if words is None:
        raise UserError(f"{variable.place} holds neither texts nor word vectors [N, V]; make it again")
    if variable.key == TOPIC_KEYS[0]:  # Wikipedia: training list and test list are two variables of one file
        test = number_matrix(read_variable(path, TOPIC_KEYS[1:]).value, count)
        if test is None or test.shape[1] != words.shape[1]:
            raise UserError(f"{path}: {' and '.join(TOPIC_KEYS)} differ in width; fetch the file again")
        words = np.concatenate([words, test])
    if not np.isfinite(words).all():
        raise UserError(f"{variable.place} holds values that are not finite; make it again")
    binary = ((words == 0) | (words == 1)).all()
    return None, torch.from_numpy(words != 0 if binary else words.astype(np.float32))


def _read_labels(path: Path, count: int) -> Tensor:
    """Multi-hot labels, [N, C] bool."""
    variable = read_variable(path, LABEL_KEYS)
    return read_labels(variable.value, count, variable.place)


def _read_lists(path: Path, count: int) -> tuple[Tensor, Tensor]:
    """Item numbers (from 0) of queries [Q] and database [D]; files number from 1."""
    lists = []
    for keys in (QUERY_LIST_KEYS, DATABASE_LIST_KEYS):
        variable = read_variable(path, keys)
        value = variable.value
        numeric = not isinstance(value, Pictures) and value.dtype.kind in "iuf"
        numbers = np.asarray(value).reshape(-1) if numeric else np.empty(0)
        inside = (numbers >= 1) & (numbers <= count) & (numbers == np.floor(numbers))
        if not len(numbers) or not inside.all():
            raise UserError(f"{variable.place} is not a list of item numbers from 1 to {count}; fetch the file again")
        lists.append(torch.from_numpy(numbers.astype(np.int64) - 1))
    if bool((torch.cat(lists).bincount() > 1).any()):
        raise UserError(f"{path} lists an item twice among queries and database; fetch the file again")
    return lists[0], lists[1]
