"""What a data set is to the rest of the library: pictures, texts, labels, and the split into query, train, database.

A new data set is a class whose `open` reads its files and hands over pictures, captions and labels; everything behind
it (tokens, splits, loaders) is shared.
"""

import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from common.errors import UserError
from common.places import Mark
from common.registry import DATASETS
from common.schemas import DatasetConfig
from dataset.columns import CaptionColumn, Column, MatrixColumn, PictureColumn, WordColumn
from dataset.pictures.reading import Pictures
from dataset.splits import SPLITS, Split, SplitConfig, make_splits
from dataset.texts.captions import Captions
from dataset.texts.tokenizer import SMALLEST, VOCABULARY
from dataset.texts.word_vectors import WordVectors

log = logging.getLogger(__name__)


class PairedConfig(DatasetConfig):
    """The part of the `dataset:` section that every data set of pictures and texts has."""

    split: SplitConfig
    image_size: int = Field(gt=0, le=4096)  # R, pixels of the square input; must be the backbone's
    augment: bool  # training pictures: false = shorter side to R, centre crop; true = random flip and resized crop
    # pixels: shorter side in the cache; side at which `loader: memory` holds pictures
    stored_size: int = Field(gt=0, le=16384)
    # folder of the picture cache: pictures decoded once, scaled down, in one file; null = none
    cache: Annotated[str, Mark.OF_MACHINE] | None
    text_length: int = Field(ge=2, le=4096)  # L, tokens of a text with start, end and padding
    tokens: int = Field(ge=SMALLEST, le=VOCABULARY)  # different tokens that texts are made of; must be the backbone's
    vocabulary: int = Field(gt=0, le=10_000_000)  # V, words of `bag_of_words`, for the methods that read it


@dataclass(frozen=True)
class Contents:
    """What a data set reads from its files.

    Attributes:
        names: Name of every item, for messages; N of them.
        pictures: Reads the picture of an item by its number.
        captions: The texts of every item; None where there are only word vectors.
        labels: Multi-hot labels, [N, C] bool.
        words: Word vectors that the data set brings along, [N, V] bool or float32; None to make them from the captions.
        families: Equal numbers mark variants of one thing, which the split keeps together, [N] int64; None: none.
        lists: Item numbers of the queries [Q] and of the database [D], where the files list them; else None.
        column: Item numbers of every split, where the files say which each belongs to; else None.
        label_names: Names of the labels; None where they have numbers only.

    Raises:
        UserError: If something has another form, or another number of items than the labels.
    """

    names: Sequence[str]
    pictures: Pictures
    captions: Sequence[Sequence[str]] | None
    labels: Tensor
    words: Tensor | None
    families: Tensor | None = None
    lists: tuple[Tensor, Tensor] | None = None
    column: Mapping[Split, Tensor] | None = None
    label_names: Sequence[str] | None = None

    def __post_init__(self) -> None:
        labels = self.labels
        if not isinstance(labels, Tensor) or labels.dtype is not torch.bool or labels.ndim != 2:
            what = f"{labels.dtype} {list(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
            raise UserError(f"labels of a data set are a tensor of torch.bool [N, C], not {what}")
        if not isinstance(self.pictures, Pictures):
            raise UserError("pictures of a data set are Pictures, such as PictureFiles(paths, index)")
        count = len(labels)
        for name in ("names", "captions", "words", "families"):
            value = getattr(self, name)
            if value is not None and len(value) != count:
                raise UserError(f"a data set has labels of {count} items, but {name} of {len(value)}")
        if len(self.pictures) < count:
            raise UserError(f"a data set has labels of {count} items, but pictures of {len(self.pictures)}")
        if any(isinstance(texts, str) for texts in self.captions or ()):
            raise UserError("captions of a data set are a list of texts for every item, not one text")
        if self.label_names is not None and len(self.label_names) != labels.shape[1]:
            raise UserError(f"a data set has {labels.shape[1]} labels, but {len(self.label_names)} label_names")


class PairedDataset(ABC):
    """Pairs of a picture and one or more texts, with labels.

    A data set says in `open` what its files hold; a subclass may add fields to `columns`.

    Args:
        config: The `dataset:` section.

    Attributes:
        names: Name of every item, for messages.
        pictures: Reads pictures by number; the first N are those of the items.
        labels: Multi-hot labels, [N, C] bool.
        label_names: Names of the labels; None where they have numbers only.
        splits: Which items belong to which split.
        columns: The fields of every split: `columns[split][field]`.

    Raises:
        UserError: If the data cannot be read, or the splits cannot be made.
    """

    Config: ClassVar[type[PairedConfig]] = PairedConfig

    config: PairedConfig

    @classmethod  # noqa: B027 - most data sets cannot make themselves
    def ensure(cls, config: PairedConfig) -> None:
        """Makes the data set where it is missing and can make itself; called by one process, before opening."""

    @abstractmethod
    def open(self) -> Contents:
        """Reads and checks the data set's files; pictures are read later.

        Raises:
            UserError: If a file is missing or broken, or files do not fit together.
        """

    def __init__(self, config: PairedConfig) -> None:
        self.config = config
        contents = self.open()
        if not isinstance(contents, Contents):
            raise UserError(f"{type(self).__name__}.open returned a {type(contents).__name__}; return Contents(...)")
        self.names = contents.names
        self.pictures = contents.pictures
        self.labels = contents.labels
        self.label_names = contents.label_names
        shared = next(iter(contents.labels.all(dim=0).nonzero().squeeze(1).tolist()), None)
        if shared is not None:
            name = shared if contents.label_names is None else contents.label_names[shared]
            log.warning("every pair has the label %s, so all are relevant to all, and every mAP is 1", name)
        self.splits = make_splits(contents.labels, config.split, contents.families, contents.lists, contents.column)
        self.picture_shape = (3, config.image_size, config.image_size)
        self.columns: dict[Split, dict[str, Column]] = {}
        captions = contents.captions
        tokens = None if captions is None else Captions(captions, config.text_length, config.tokens)
        vectors = None if captions is None else WordVectors(captions, config.vocabulary)
        for split in SPLITS:
            items = self.splits.items(split)
            columns = self.columns[split] = {}
            columns["image"] = PictureColumn(items, self.picture_shape)
            columns["labels"] = MatrixColumn(self.labels, items)
            if tokens is not None:
                columns["text"] = CaptionColumn(tokens, items)
            if contents.words is not None:
                columns["bag_of_words"] = MatrixColumn(contents.words, items)
            elif vectors is not None:
                columns["bag_of_words"] = WordColumn(vectors, items)

    def __len__(self) -> int:
        """Number of pairs N, all splits together."""
        return len(self.labels)

    @property
    def query_fingerprint(self) -> str:
        """Short digest of the names of the query items in order: what pictures generated for them belong to."""
        names = [self.names[number] for number in self.splits.query.tolist()]
        return hashlib.sha256(json.dumps(names).encode()).hexdigest()[:12]

    def offers(self, split: Split) -> dict[str, tuple[int, ...]]:
        """Shape of one row of every batch field that a split offers."""
        return {field: column.shape for field, column in self.columns[split].items()}

    def constant_fields(self, split: Split) -> frozenset[str]:
        """The fields of a split whose rows are the same in every epoch: not augmented, with nothing to choose from."""
        moving = PictureColumn if self.config.augment else ()
        return frozenset(
            field for field, column in self.columns[split].items() if column.constant and not isinstance(column, moving)
        )

    def marks(self, fields: frozenset[str]) -> tuple[str, ...]:  # noqa: ARG002 - most data sets have none
        """Remarks that results must carry when codes are made from these fields."""
        return ()

    def require(self, split: Split, fields: frozenset[str]) -> None:
        """Checks that a split offers some fields.

        Raises:
            UserError: If it does not, with what to do about it, or if a class from outside gives something else.
        """
        for field in sorted(fields - set(self.columns[split]) - {"index"}):
            raise UserError(
                f"data set {self.config.name} has no {field!r} for the {split} split; {self.way_out(field, split)}"
            )
        for field in sorted(fields & set(self.columns[split])):
            if not isinstance(self.columns[split][field], Column):
                raise UserError(f"the field {field!r} of {self.config.name} is no Column; dataset/columns.py has them")

    def promised(self, split: Split) -> frozenset[str]:  # noqa: ARG002 - most data sets promise nothing
        """Fields that methods can do without, but that the settings say texts of a split go with."""
        return frozenset()

    def way_out(self, field: str, split: Split) -> str:
        """What the user can do when `split` does not offer `field`."""
        return f"it offers {', '.join(self.columns[split])}: choose another data set or method"


def dataset_class(name: str) -> type[PairedDataset]:
    """The data set that is registered under a name.

    Raises:
        UserError: If there is none, or it is no whole data set.
    """
    cls = DATASETS.get(name)
    if not (isinstance(cls, type) and issubclass(cls, PairedDataset)):
        raise UserError(f"the data set {name} is no PairedDataset; derive its class from that of dataset/base.py")
    if cls.__abstractmethods__:
        raise UserError(f"the data set {name} lacks {', '.join(sorted(cls.__abstractmethods__))}; see dataset/base.py")
    return cls
