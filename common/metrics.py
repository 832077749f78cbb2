"""Retrieval metrics on binary codes: mean average precision in three definitions, and what papers report beside it.

An item is relevant to a query if they share a label. Items are ranked by Hamming distance; ties are broken by place in
the database, so the same codes give the same number everywhere. Distances of K bits take K + 1 values, so ranking is a
counting sort; memory is bounded by a block of queries, never queries x database.

The definitions of average precision, with r_1 < r_2 < ... the ranks (from 1) of the R relevant items:

* `relevant`: mean of j / r_j over the first min(k, R) relevant items, wherever they rank. k caps relevant items, not
  ranks. What the papers of CLIP hashing report (mAP@all).
* `top`: the list ends at rank k; mean of j / r_j over the relevant items found there, 0 if none. JDSH, CFRH (mAP@50).
* `expected`: the mean of `top` over all orders of items at the same distance, each order equally likely, exactly.

For k = all, `relevant` and `top` are the same number. A query without a relevant item has no average precision: it is
left out of means, and counted.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from common.errors import UserError

Definition = Literal["relevant", "top", "expected"]
Cutoff = int | Literal["all"]

_PAIRS_OF_A_BLOCK = 1 << 22  # pairs ranked at a time: about 200 MB


# ---------------------------------------------------------------------------------------------- the metrics


def average_precision(
    query_codes: Tensor,
    database_codes: Tensor,
    query_labels: Tensor,
    database_labels: Tensor,
    k: int | None = None,
    definition: Definition = "relevant",
) -> Tensor:
    """Average precision of every query.

    Args:
        query_codes: Codes in {-1, +1}, [Q, K], any real dtype.
        database_codes: Codes in {-1, +1}, [D, K].
        query_labels: Multi-hot labels, [Q, C].
        database_labels: Multi-hot labels, [D, C].
        k: Cut, in the sense of the definition; None for the whole list.
        definition: See the head of this file.

    Returns:
        [Q] float64, values in [0, 1]; NaN for a query without a relevant item.

    Raises:
        ValueError: If shapes disagree, a code is not -1 or +1, a label not 0 or 1, or k is below 1.

    Source:
        `relevant`: DCMHT's and MITH's released evaluation; `top`: JDSH's; `expected`: McSherry and Najork, ECIR 2008,
        Section 3.
    """
    measure = _average_precision(definition)
    cut = _rank_cut("all" if k is None else k, len(database_codes))
    pairs = _Pairs(query_codes, database_codes, query_labels, database_labels)
    return pairs.measure(lambda block: measure(block, cut).unsqueeze(1)).squeeze(1)


def map_at_k(
    query_codes: Tensor,
    database_codes: Tensor,
    query_labels: Tensor,
    database_labels: Tensor,
    k: int | None = None,
    definition: Definition = "relevant",
) -> float:
    """Mean of `average_precision` over the queries that have a relevant item; arguments [Q, K], [D, K], [Q, C], [D, C].

    Raises:
        ValueError: As `average_precision`.
        UserError: If no query has a relevant item.
    """
    values = average_precision(query_codes, database_codes, query_labels, database_labels, k, definition)
    valid = values[~values.isnan()]
    _require_valid(len(valid))
    return float(valid.mean())


def random_map(query_labels: Tensor, database_labels: Tensor, bits: int, seed: int) -> float:
    """mAP@all of random codes on the same labels: what a method that learned nothing would reach.

    Args:
        query_labels: Multi-hot labels, [Q, C].
        database_labels: Multi-hot labels, [D, C].
        bits: K, length of the codes.
        seed: Of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    query_codes, database_codes = (
        (torch.randint(0, 2, (len(labels), bits), generator=generator, dtype=torch.int8) * 2 - 1).to(labels.device)
        for labels in (query_labels, database_labels)
    )
    return map_at_k(query_codes, database_codes, query_labels, database_labels)


def metric_name(cutoff: Cutoff, definition: Definition) -> str:
    """Name of a mAP in reports: `mAP@all` in the papers' definition, else with the definition, `mAP@50(top)`."""
    return f"mAP@{cutoff}" + ("" if definition == "relevant" else f"({definition})")


def retrieval_report(
    query_codes: Tensor,
    database_codes: Tensor,
    query_labels: Tensor,
    database_labels: Tensor,
    cutoffs: Sequence[Cutoff],
    definitions: Sequence[Definition],
) -> dict[str, float]:
    """Every number that a results table needs, from one ranking. All are means over queries with a relevant item.

    Args:
        query_codes: Codes in {-1, +1}, [Q, K], any real dtype.
        database_codes: Codes in {-1, +1}, [D, K].
        query_labels: Multi-hot labels, [Q, C].
        database_labels: Multi-hot labels, [D, C].
        cutoffs: k of mAP, NDCG and (whole numbers only) precision.
        definitions: Definitions of mAP, each at every cutoff.

    Returns:
        * `mAP@<k>`, `mAP@<k>(top)`, `mAP@<k>(expected)`: see the head of this file;
        * `NDCG@<k>`: gain 2^s - 1 for s shared labels, discount log2(rank + 1), ties by place in the database;
        * `P@<k>`: share of relevant items among the first k (among all D where D < k);
        * `P(radius 2)`: share of relevant items within Hamming distance 2, 0 for a query that finds nothing there;
        * `queries`: queries that the means run over; `queries without relevant items`: those left out.

    Raises:
        ValueError: As `average_precision`.
        UserError: If no query has a relevant item.
    """
    columns: dict[str, Callable[[_RankedBlock], Tensor]] = {}
    size = len(database_codes)
    for cutoff in cutoffs:
        cut = _rank_cut(cutoff, size)
        for definition in definitions:
            measure = _average_precision(definition)
            columns[metric_name(cutoff, definition)] = lambda block, cut=cut, measure=measure: measure(block, cut)
    for cutoff in cutoffs:
        cut = _rank_cut(cutoff, size)
        columns[f"NDCG@{cutoff}"] = lambda block, cut=cut: _ndcg(block, cut)
        if cutoff != "all":
            columns[f"P@{cutoff}"] = lambda block, cut=cut: block.hits_within(cut) / cut
    columns["P(radius 2)"] = lambda block: _radius_precision(block, 2)

    pairs = _Pairs(query_codes, database_codes, query_labels, database_labels)
    values = pairs.measure(
        lambda block: torch.stack([block.relevant.double(), *(column(block) for column in columns.values())], dim=1)
    )
    valid = values[values[:, 0] > 0, 1:]
    _require_valid(len(valid))
    report = dict(zip(columns, valid.mean(dim=0).tolist(), strict=True))
    report["queries"] = float(len(valid))
    report["queries without relevant items"] = float(len(values) - len(valid))
    return report


# ---------------------------------------------------------------------------------------------- formulas


def _average_precision(definition: Definition) -> "Callable[[_RankedBlock, int], Tensor]":
    """The measure of a definition: (block, cut) -> [q] float64, NaN for a query without a relevant item."""
    measures = {"relevant": _relevant_precision, "top": _top_precision, "expected": _expected_precision}
    if definition not in measures:
        raise ValueError(f"definition {definition!r} must be one of {', '.join(get_args(Definition))}")
    return measures[definition]


def _relevant_precision(block: "_RankedBlock", cut: int) -> Tensor:
    return block.sum_of_first(cut) / block.relevant.clamp(max=cut)  # 0 / 0 is the NaN of no relevant item


def _top_precision(block: "_RankedBlock", cut: int) -> Tensor:
    hits = block.hits_within(cut)
    return (block.sum_within(cut) / hits.clamp(min=1)).where(block.relevant > 0, torch.nan)


def _expected_precision(block: "_RankedBlock", cut: int) -> Tensor:
    """Expectation of `top` over random orders of ties, in closed form per distance.

    A bucket of n items, m of them relevant, behind t items with j relevant ones: its place s is relevant with
    probability m / n, and then a = (m - 1) / (n - 1) of each of the s - 1 places before it is. So it adds

        sum_s (m / n) (j + 1 + a (s - 1)) / (t + s) = (m / n) (a n + (j + 1 - a (t + 1)) (H(t + n) - H(t)))

    with the harmonic numbers H. Of the bucket that the cut divides, the x relevant ones among its c places before the
    cut are hypergeometric; given x those places are again such a bucket.
    """
    items, hits = (counts.double() for counts in block.by_distance)  # [q, K + 1]
    before, hits_before = items.cumsum(1) - items, hits.cumsum(1) - hits
    whole = before + items <= cut
    sums = (_bucket_sum(before, hits_before, items, hits) * whole).sum(1)  # [q]
    found = (hits * whole).sum(1)

    divided = ((before < cut) & ~whole).double()  # at most one bucket of a query
    values = torch.where(found > 0, sums / found, 0.0)
    if divided.any():
        rows = divided.any(1).nonzero().squeeze(1)
        place = divided[rows].argmax(1, keepdim=True)
        n, m, t = (table[rows].gather(1, place) for table in (items, hits, before))  # [r, 1]
        sums, found = sums[rows].unsqueeze(1), found[rows].unsqueeze(1)
        c = cut - t
        x = torch.arange(int(torch.minimum(c, m).max()) + 1, device=n.device, dtype=torch.float64)  # [X]
        possible = (x <= m) & (x <= c) & (c - x <= n - m)
        chance = torch.where(possible, _log_choose(m, x) + _log_choose(n - m, c - x) - _log_choose(n, c), -torch.inf)
        mean = torch.where(found + x > 0, (sums + _bucket_sum(t, found, c, x)) / (found + x), 0.0)
        values[rows] = (chance.exp() * mean).sum(1)
    return values.where(block.relevant > 0, torch.nan)


def _bucket_sum(t: Tensor, j: Tensor, n: Tensor, m: Tensor) -> Tensor:
    """What a bucket adds to the sum of precisions, see `_expected_precision`; 0 for n = 0. All float64, broadcast."""
    a = (m - 1) / (n - 1).clamp(min=1)
    harmonic = torch.digamma(t + n + 1) - torch.digamma(t + 1)
    return torch.where(m > 0, m / n * (a * n + (j + 1 - a * (t + 1)) * harmonic), 0.0)


def _log_choose(n: Tensor, k: Tensor) -> Tensor:
    """Logarithm of the number of ways to choose k of n; anything where there is none."""
    return torch.lgamma(n + 1) - torch.lgamma(k.clamp(min=0) + 1) - torch.lgamma((n - k).clamp(min=0) + 1)


def _ndcg(block: "_RankedBlock", cut: int) -> Tensor:
    return block.gain_within(cut) / block.ideal_gain_within(cut)


def _radius_precision(block: "_RankedBlock", radius: int) -> Tensor:
    items, hits = (counts[:, : radius + 1].sum(1) for counts in block.by_distance)
    return hits / items.clamp(min=1)


def _rank_cut(cutoff: Cutoff, size: int) -> int:
    if cutoff == "all":
        return size
    if cutoff < 1:
        raise ValueError(f"k must be at least 1, not {cutoff}")
    return min(cutoff, size)


def _require_valid(count: int) -> None:
    if count == 0:
        raise UserError(
            "no query shares a label with any database item, so there is no mAP; check the labels of the data set"
        )


# ---------------------------------------------------------------------------------------------- ranking


class _RankedBlock(ABC):
    """The ranked database of q queries, reduced to what the formulas ask for."""

    relevant: Tensor  # number of relevant items, [q] int64

    @abstractmethod
    def sum_of_first(self, count: int) -> Tensor:
        """Sum of j / r_j over the first `count` relevant items, [q] float64."""

    @abstractmethod
    def sum_within(self, rank: int) -> Tensor:
        """Sum of j / r_j over the relevant items up to a rank, [q] float64."""

    @abstractmethod
    def hits_within(self, rank: int) -> Tensor:
        """Relevant items up to a rank, [q] int64."""

    @abstractmethod
    def gain_within(self, rank: int) -> Tensor:
        """Discounted gain up to a rank, [q] float64."""

    @abstractmethod
    def ideal_gain_within(self, rank: int) -> Tensor:
        """Largest discounted gain that any order could have up to a rank, [q] float64."""

    @property
    @abstractmethod
    def by_distance(self) -> tuple[Tensor, Tensor]:
        """Items and relevant items at every distance, [q, K + 1] int64 each."""


class _TorchBlock(_RankedBlock):
    """Ranking with whole-block operations of torch: for accelerators."""

    def __init__(self, distances: Tensor, shared: Tensor, bits: int) -> None:
        """Ranks q queries.

        Args:
            distances: [q, D] int16, in [0, bits].
            shared: Number of labels shared, [q, D] int16.
            bits: K.
        """
        self.bits = bits
        self.distances = distances
        self.unsorted = shared
        order = distances.sort(dim=1, stable=True).indices
        self.shared = shared.gather(1, order)
        self.found = (self.shared > 0).cumsum(1)  # [q, D]
        self.relevant = self.found[:, -1]

    @cached_property
    def running_sum(self) -> Tensor:
        """Sum of j / r_j up to every rank, [q, D] float64."""
        ranks = torch.arange(1, self.found.shape[1] + 1, device=self.found.device)
        return torch.where(self.shared > 0, self.found.double() / ranks, 0.0).cumsum(1)

    def sum_of_first(self, count: int) -> Tensor:
        last = torch.searchsorted(self.found, self.relevant.clamp(max=count).unsqueeze(1))
        return self.running_sum.gather(1, last).squeeze(1)

    def sum_within(self, rank: int) -> Tensor:
        return self.running_sum[:, rank - 1]

    def hits_within(self, rank: int) -> Tensor:
        return self.found[:, rank - 1]

    def gain_within(self, rank: int) -> Tensor:
        return self._gain(self.shared[:, :rank])

    def ideal_gain_within(self, rank: int) -> Tensor:
        return self._gain(self.shared.sort(dim=1, descending=True).values[:, :rank])

    @staticmethod
    def _gain(shared: Tensor) -> Tensor:
        ranks = torch.arange(1, shared.shape[1] + 1, device=shared.device, dtype=torch.float64)
        return torch.expm1(shared.double() * torch.log(torch.tensor(2.0))) @ (1 / torch.log2(ranks + 1))

    @property
    def by_distance(self) -> tuple[Tensor, Tensor]:
        index = self.distances.long()
        empty = index.new_zeros(len(index), self.bits + 1)
        hits = (self.unsorted > 0).long()
        return empty.scatter_add(1, index, torch.ones_like(index)), empty.scatter_add(1, index, hits)


class _Pairs:
    """Checked codes and labels of queries and database, ranked in blocks of queries."""

    def __init__(
        self, query_codes: Tensor, database_codes: Tensor, query_labels: Tensor, database_labels: Tensor
    ) -> None:
        _check("query", query_codes, query_labels)
        _check("database", database_codes, database_labels)
        for what, a, b in (("codes", query_codes, database_codes), ("labels", query_labels, database_labels)):
            if a.shape[1] != b.shape[1]:
                raise ValueError(f"query {what} and database {what} differ in width: {a.shape[1]} and {b.shape[1]}")
        self.bits = query_codes.shape[1]
        self.codes = query_codes.float(), database_codes.float()
        self.labels = query_labels.float(), database_labels.float()

    def measure(self, measure: Callable[[_RankedBlock], Tensor]) -> Tensor:
        """Applies a measure to all queries.

        Args:
            measure: Block of q queries -> [q, M].

        Returns:
            [Q, M].
        """
        rows = max(1, _PAIRS_OF_A_BLOCK // len(self.codes[1]))
        return torch.cat([measure(block) for block in self._blocks(rows)])

    def _blocks(self, rows: int) -> Iterable[_RankedBlock]:
        for codes, labels in zip(self.codes[0].split(rows), self.labels[0].split(rows), strict=True):
            distances = (self.bits - codes @ self.codes[1].T) / 2
            yield _TorchBlock(distances.short(), (labels @ self.labels[1].T).short(), self.bits)


def _check(side: str, codes: Tensor, labels: Tensor) -> None:
    """Refuses what is no code or no label; one pass each."""
    for what, table in (("codes", codes), ("labels", labels)):
        if table.ndim != 2 or 0 in table.shape:
            raise ValueError(
                f"{side} {what} must be a matrix with at least one row and column, not {list(table.shape)}"
            )
    if len(codes) != len(labels):
        raise ValueError(f"{side}: {len(codes)} codes but {len(labels)} rows of labels")
    for what, table, right in (
        ("codes", codes, codes.abs() == 1),
        ("labels", labels, (labels == 0) | (labels == 1)),
    ):
        if not right.all():
            row, column = (int(place) for place in (~right).nonzero()[0])
            allowed = "-1 or +1" if what == "codes" else "0 or 1"
            raise ValueError(
                f"{side} {what} must be {allowed}, but row {row}, column {column} is {table[row, column].item()}"
            )
