"""Splits of a data set into queries, what is trained on, and the database: the protocols that deal its pairs out."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, model_validator
from torch import Tensor

from common.errors import UserError
from common.schemas import Section

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
