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
from typing import Annotated, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, model_validator
from torch import Tensor

from common.errors import UserError
from common.places import Mark
from common.schemas import DatasetConfig, Section
from dataset.columns import CaptionColumn, Column, MatrixColumn, PictureColumn, WordColumn
from dataset.pictures.reading import Pictures
from dataset.texts.captions import Captions
from dataset.texts.tokenizer import SMALLEST, VOCABULARY
from dataset.texts.word_vectors import WordVectors

log = logging.getLogger(__name__)
Split = Literal["query", "train", "database", "validation"]
SPLITS: tuple[Split, ...] = ("query", "train", "database", "validation")


class PerLabelConfig(Section):
    """`dataset.split.per_label`: what every label but the first gives; the first gives what is left."""

    query: int = Field(gt=0)
    train: int = Field(gt=0)


class SplitConfig(Section):
    """`dataset.split`: the protocol that deals the pairs out."""

    # permutation: at random; per_label: at random, label by label (JDSH, CFRH); lists: queries and database as the
    # label file (COCO.mat) lists them; last: the last pairs are the queries (Wikipedia's published lists);
    # column: as the split column of a manifest says
    protocol: Literal["permutation", "per_label", "lists", "last", "column"]
    seed: int = Field(ge=0, lt=2**32)  # of the permutations; independent of run.seed
    query: int = Field(gt=0)  # pairs of the query split
    train: int = Field(gt=0)  # pairs of the training split, which is a part of the database
    # pairs of the database, not trained on, as queries for choosing the epoch: the last of the protocol's order
    validation: int = Field(ge=0)
    per_label: PerLabelConfig | None  # shares of a label, with protocol per_label

    @model_validator(mode="after")
    def _shares(self) -> Self:
        if self.protocol == "per_label" and self.per_label is None:
            raise ValueError("protocol per_label needs per_label, e.g. {query: 80, train: 200}")
        return self


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
class Splits:
    """Which items belong to which split.

    Attributes:
        query: Item numbers of the query split, [Q] int64.
        train: Item numbers of the training split, [N] int64; all of them are in `database`.
        database: Item numbers that queries search, [D] int64.
        validation: Item numbers of the validation split, [V] int64; all are in `database`, none in `train`.
        fingerprint: Short digest of the lists and the labels, equal wherever the same pairs are compared.
    """

    query: Tensor
    train: Tensor
    database: Tensor
    validation: Tensor
    fingerprint: str

    def items(self, split: Split) -> Tensor:
        """Item numbers of one split, [n] int64."""
        items: Tensor = getattr(self, split)
        return items

    def searched_by(self, split: Split) -> Tensor:
        """Places in `database` of what the queries of a split search, [n] int64: no validation query finds itself."""
        own = self.validation if split == "validation" else self.validation[:0]
        return (~torch.isin(self.database, own)).nonzero().squeeze(1)


def make_splits(
    labels: Tensor,
    config: SplitConfig,
    families: Tensor | None = None,
    lists: tuple[Tensor, Tensor] | None = None,
    column: Mapping[Split, Tensor] | None = None,
) -> Splits:
    """Deals items out by a seeded protocol: first the queries, then the training set; all but queries are searched.

    Args:
        labels: Multi-hot labels, [N, C] bool.
        config: Protocol, seed and sizes.
        families: Items with equal numbers are variants of one thing and stay on one side of the query split, [N] int64;
            None where every item stands for itself.
        lists: Item numbers of the queries [Q] and of the database [D], for protocol `lists`.
        column: Item numbers [n] of every split, those of the database without what is trained on or held out, for
            protocol `column`.

    Returns:
        The splits.

    Raises:
        UserError: If there are fewer items than asked for, a query has no label (nothing is relevant to it), or whole
            families do not fill the query split.

    Source:
        `permutation`: the rule that the released code of DCMHT, MITH, DSPH and DNPH shares, with NumPy's legacy
        generator. The others: those of JDSH's and CFRH's code, which draw without a seed.
    """
    query, train, validation = config.query, config.train, config.validation
    order = _order(labels, config, lists, column)
    if query + train + validation > len(order):
        asked = (
            f"{query} query, {train} train and {validation} validation"
            if validation
            else f"{query} query and {train} train"
        )
        raise UserError(
            f"dataset.split asks for {asked} pairs, but there are {len(order)} pairs; "
            f"lower dataset.split.query{', validation' if validation else ''} or dataset.split.train"
        )
    if families is not None and config.protocol == "column":
        _require_together(families, order, (query, len(order) - validation))
        families = None
    if families is not None:
        order = _keep_together(order, families, query, "query")
    asking, database = order[:query], order[query:]
    kept = database.flip(0)  # validation is taken from the end: what is trained on stays what it is without
    if validation and families is not None:
        kept = _keep_together(kept, families, validation, "validation")
    held_out, trained = kept[:validation].flip(0), kept[validation:].flip(0)[:train]
    for split, items in (("query", asking), ("validation", held_out)):
        _require_labels(labels, items, split)
    digest = hashlib.sha256()
    for part in (asking, trained, database, *([held_out] if validation else [])):
        digest.update(f"{len(part)};".encode() + part.numpy().astype("<i8").tobytes())
    digest.update(f"{tuple(labels.shape)};".encode() + np.packbits(labels.numpy()).tobytes())
    return Splits(asking, trained, database, held_out, digest.hexdigest()[:12])


def _require_labels(labels: Tensor, items: Tensor, split: str) -> None:
    """Refuses queries [n] to which nothing can be relevant."""
    unlabelled = items[~labels[items].any(dim=1)]
    if len(unlabelled) and labels.shape[1]:  # without any label pairs are what is retrieved
        rows = ", ".join(str(int(row)) for row in unlabelled[:5]) + (", ..." if len(unlabelled) > 5 else "")
        raise UserError(
            f"{len(unlabelled)} pairs of the {split} split have no label, so nothing is relevant to them: rows {rows} "
            "(from 0); label them, leave them out, or choose another dataset.split.seed"
        )


def _require_together(families: Tensor, order: Tensor, borders: tuple[int, int]) -> None:
    """Refuses a family [N] that a split column divides: its items lie on two sides of a border of the order [n]."""
    sides: dict[int, int] = {}
    for place, family in enumerate(families[order].tolist()):
        side = sum(place >= border for border in borders)
        if sides.setdefault(family, side) != side:
            raise UserError(
                f"the split column divides the family of row {int(order[place])} (from 0) between queries, validation "
                "and the others, so that variants of what is trained on would be queries; put a family into one split"
            )


def _order(
    labels: Tensor,
    config: SplitConfig,
    lists: tuple[Tensor, Tensor] | None,
    column: Mapping[Split, Tensor] | None,
) -> Tensor:
    """Item numbers by the protocol: the queries, then the training set, then the rest of the database; [n] int64."""
    draw, count = np.random.RandomState(config.seed), len(labels)
    if config.protocol == "permutation":
        return torch.from_numpy(draw.permutation(count).astype(np.int64))
    if config.protocol == "last":
        return torch.arange(count).roll(config.query)
    if config.protocol == "per_label":
        return _label_by_label(labels, config, draw)
    if config.protocol == "column":
        return _order_of_column(config, column)
    if lists is None:
        raise UserError("dataset.split.protocol is lists, but this data set lists no queries; choose another protocol")
    query, database = lists
    if len(query) != config.query:
        raise UserError(f"the data set lists {len(query)} queries; set dataset.split.query={len(query)}")
    return torch.cat([query, database[torch.from_numpy(draw.permutation(len(database)))]])


def _order_of_column(config: SplitConfig, column: Mapping[Split, Tensor] | None) -> Tensor:
    """[n] int64: queries, what is trained on, the rest, what is held out."""
    if column is None:
        raise UserError(
            "dataset.split.protocol is column, but this data set has no such column; choose another protocol"
        )
    sizes: dict[Split, int] = {"query": config.query, "train": config.train, "validation": config.validation}
    if any(len(column[split]) != size for split, size in sizes.items()):
        found = " ".join(f"dataset.split.{split}={len(column[split])}" for split in sizes)
        raise UserError(f"the split column has other sizes than dataset.split; set {found}")
    return torch.cat([column["query"], column["train"], column["database"], column["validation"]])


def _label_by_label(labels: Tensor, config: SplitConfig, draw: np.random.RandomState) -> Tensor:
    """Every label in turn gives its share of queries and of training items, of the items not yet taken; [N] int64.

    Labels with too few items give fewer to the training set, which is then filled up at random.
    """
    share, others = config.per_label, labels.shape[1] - 1
    if share is None:  # refused by the schema
        raise ValueError("protocol per_label needs per_label")
    shares = [(config.query - others * share.query, config.train - others * share.train)]
    shares += [(share.query, share.train)] * others
    if min(shares[0]) < 0:
        raise UserError(
            f"dataset.split.per_label: {others} labels with {share.query} query and {share.train} train pairs each "
            f"take more than {config.query} and {config.train}; lower them, or raise dataset.split.query or train"
        )
    matrix = labels.numpy()
    free = np.ones(len(matrix), dtype=bool)
    query: list[npt.NDArray[np.int64]] = []
    train: list[npt.NDArray[np.int64]] = []
    for label, (queries, trained) in enumerate(shares):
        items = draw.permutation(np.flatnonzero(matrix[:, label] & free))
        if len(items) < queries:
            raise UserError(
                f"label {label} (from 0) has {len(items)} pairs left for its {queries} queries; lower "
                "dataset.split.per_label.query, or choose another dataset.split.protocol"
            )
        query.append(items[:queries])
        train.append(items[queries : queries + trained])
        free[items[: queries + trained]] = False
    rest = draw.permutation(np.flatnonzero(free))
    return torch.from_numpy(np.concatenate([*query, *train, rest]).astype(np.int64))


def _keep_together(order: Tensor, families: Tensor, count: int, split: str) -> Tensor:
    """Moves whole families to the front, in the order in which they turn up, until `count` items are there.

    A family that no longer fits is passed over; both parts keep their order. [N] int64.
    """
    sizes = torch.bincount(families[order]).tolist()
    chosen: list[int] = []
    room = count
    for family in dict.fromkeys(families[order].tolist()):
        if sizes[family] <= room:
            chosen.append(family)
            room -= sizes[family]
    if room:
        raise UserError(
            f"whole families of variants do not fill a {split} split of {count}; change dataset.split.{split}"
        )
    front = torch.isin(families[order], torch.tensor(chosen))
    return torch.cat([order[front], order[~front]])


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
            UserError: If it does not, with what to do about it.
        """
        for field in sorted(fields - set(self.columns[split]) - {"index"}):
            raise UserError(
                f"data set {self.config.name} has no {field!r} for the {split} split; {self.way_out(field, split)}"
            )

    def promised(self, split: Split) -> frozenset[str]:  # noqa: ARG002 - most data sets promise nothing
        """Fields that methods can do without, but that the settings say texts of a split go with."""
        return frozenset()

    def way_out(self, field: str, split: Split) -> str:
        """What the user can do when `split` does not offer `field`."""
        return f"it offers {', '.join(self.columns[split])}: choose another data set or method"
