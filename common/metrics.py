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

Codes are [N, K] everywhere, or [N, n, K] for a method that gives every item n codes; the distance of two items is then
that of their nearest pair of codes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from common.errors import UserError
from common.expected_precision import Tables, expected_precision
from common.ranking import Ranking, rank_and_measure

Definition = Literal["relevant", "top", "expected"]
Cutoff = int | Literal["all"]
Measure = Callable[[Ranking], Tensor]  # [q] float64


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
    _check(query_codes, database_codes, query_labels, database_labels)
    measure = _average_precision(definition, "all" if k is None else k, len(database_codes), query_codes.device)
    return _measure_all((query_codes, database_codes), (query_labels, database_labels), [measure]).squeeze(1)


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


def random_map(query_labels: Tensor, database_labels: Tensor, shape: tuple[int, ...], seed: int) -> float:
    """mAP@all of random codes on the same labels: what a method that learned nothing would reach.

    Args:
        query_labels: Multi-hot labels, [Q, C].
        database_labels: Multi-hot labels, [D, C].
        shape: Of an item's code: (K,), or (n, K) for n codes.
        seed: Of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    query_codes, database_codes = (
        (torch.randint(0, 2, (len(labels), *shape), generator=generator, dtype=torch.int8) * 2 - 1).to(labels.device)
        for labels in (query_labels, database_labels)
    )
    return map_at_k(query_codes, database_codes, query_labels, database_labels)


def metric_name(cutoff: Cutoff, definition: Definition) -> str:
    """Name of a mAP in reports: `mAP@all` in the papers' definition, else with the definition, `mAP@50(top)`."""
    return f"mAP@{cutoff}" + ("" if definition == "relevant" else f"({definition})")


def retrieval_values(
    query_codes: Tensor,
    database_codes: Tensor,
    query_labels: Tensor,
    database_labels: Tensor,
    cutoffs: Sequence[Cutoff],
    definitions: Sequence[Definition],
) -> dict[str, Tensor]:
    """Every number that a results table needs, of every query, from one ranking.

    A query's numbers do not depend on the other queries, so processes can share them.

    Args:
        query_codes: Codes in {-1, +1}, [Q, K], any real dtype; Q may be 0.
        database_codes: Codes in {-1, +1}, [D, K].
        query_labels: Multi-hot labels, [Q, C].
        database_labels: Multi-hot labels, [D, C].
        cutoffs: k of mAP, NDCG and (whole numbers only) precision.
        definitions: Definitions of mAP, each at every cutoff.

    Returns:
        Name -> [Q] float64, NaN for a query without a relevant item:

        * `mAP@<k>`, `mAP@<k>(top)`, `mAP@<k>(expected)`: average precision, see the head of this file; `mAP@all(top)`
          only where `relevant`, which then is the same number, is not asked for;
        * `NDCG@<k>`: gain 2^s - 1 for s shared labels, discount log2(rank + 1), ties by place in the database;
        * `P@<k>`: share of relevant items among the first k (among all D where D < k);
        * `P(radius 2)`: share of relevant items within Hamming distance 2, 0 for a query that finds nothing there.

    Raises:
        ValueError: As `average_precision`.
    """
    if len(query_codes):
        _check(query_codes, database_codes, query_labels, database_labels)
    size, most_shared = len(database_codes), int(database_labels.sum(dim=1).max())
    measures: dict[str, Measure] = {}
    for cutoff in cutoffs:
        for definition in definitions:
            if (cutoff, definition) == ("all", "top") and "relevant" in definitions:
                continue  # the same number
            measures[metric_name(cutoff, definition)] = _average_precision(definition, cutoff, size, query_codes.device)
        measures[f"NDCG@{cutoff}"] = _ndcg(cutoff, size, most_shared, query_codes.device)
        if cutoff != "all":
            measures[f"P@{cutoff}"] = _precision(cutoff, size)
    measures["P(radius 2)"] = _precision_within_2
    if len(query_codes) == 0:
        return dict.fromkeys(measures, torch.zeros(0, dtype=torch.float64, device=query_codes.device))
    values = _measure_all(
        (query_codes, database_codes), (query_labels, database_labels), [_has_relevant, *measures.values()]
    )
    values = values[:, 1:].where(values[:, :1] > 0, torch.nan)
    return dict(zip(measures, values.unbind(dim=1), strict=True))


def mean_over_queries(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Means of what `retrieval_values` returned, over the queries that have a relevant item.

    Args:
        values: Name -> [Q], NaN for a query without a relevant item.

    Returns:
        The means by name; `queries`, how many they run over; `queries without relevant items`, how many were left out.

    Raises:
        UserError: If no query has a relevant item.
    """
    table = torch.stack(list(values.values()), dim=1)  # [Q, M]
    valid = table[~table.isnan().any(dim=1)]
    _require_valid(len(valid))
    report = dict(zip(values, valid.mean(dim=0).tolist(), strict=True))
    report["queries"] = float(len(valid))
    report["queries without relevant items"] = float(len(table) - len(valid))
    return report


@dataclass(frozen=True)
class RetrievalCurves:
    """Curves for plots, each the mean over the queries that have a relevant item.

    Attributes:
        ranks: N of precision@N, [P].
        precision_at: Share of relevant items among the first N, [P].
        recall_levels: Evenly spaced from 0 to 1, [L].
        precision_at_recall: Largest precision at any rank that reaches the recall, [L] (interpolated precision).
        radius_precision: Share of relevant items within Hamming distance 0, 1, ..., K, over the queries that find any
            item there, [K + 1]; NaN where no query finds one.
        radius_recall: Share of a query's relevant items that lie within the distance, [K + 1].
    """

    ranks: list[int]
    precision_at: list[float]
    recall_levels: list[float]
    precision_at_recall: list[float]
    radius_precision: list[float]
    radius_recall: list[float]


def retrieval_curves(
    query_codes: Tensor,
    database_codes: Tensor,
    query_labels: Tensor,
    database_labels: Tensor,
    ranks: Sequence[int],
    recall_levels: int,
) -> RetrievalCurves:
    """All curves from one ranking.

    Args:
        query_codes: Codes in {-1, +1}, [Q, K], any real dtype.
        database_codes: Codes in {-1, +1}, [D, K].
        query_labels: Multi-hot labels, [Q, C].
        database_labels: Multi-hot labels, [D, C].
        ranks: N of precision@N, at least 1; those beyond D are left out.
        recall_levels: L, number of levels of recall from 0 to 1, at least 2; 11 in information retrieval.

    Raises:
        ValueError: As `average_precision`, or if `recall_levels` is below 2.
        UserError: If no query has a relevant item.
    """
    _check(query_codes, database_codes, query_labels, database_labels)
    if recall_levels < 2:
        raise ValueError(f"recall_levels must be at least 2, not {recall_levels}")
    size = len(database_codes)
    ranks = [rank for rank in ranks if rank <= size]
    levels = torch.linspace(0, 1, recall_levels, dtype=torch.float64, device=query_codes.device)
    values = _measure_all(
        (query_codes, database_codes),
        (query_labels, database_labels),
        [
            _has_relevant,
            *(_precision(rank, size) for rank in ranks),
            lambda ranking: _interpolated_precision(ranking, levels),
            _radius_precision,
            _radius_recall,
        ],
    )
    valid = values[values[:, 0] > 0, 1:]
    _require_valid(len(valid))
    distances = query_codes.shape[-1] + 1
    widths = [len(ranks), recall_levels, distances, distances]
    curves = [curve.tolist() for curve in torch.split(valid.nanmean(dim=0), widths)]
    return RetrievalCurves(ranks, curves[0], levels.tolist(), *curves[1:])


# ---------------------------------------------------------------------------------------------- formulas


def _average_precision(definition: Definition, cutoff: Cutoff, size: int, device: torch.device) -> Measure:
    """The measure of a definition; NaN for a query without a relevant item."""
    cut = _rank_cut(cutoff, size)
    formula: Measure
    if definition == "relevant":
        formula = partial(_relevant_precision, cut=cut)
    elif definition == "top":
        formula = partial(_top_precision, cut=cut)
    elif definition == "expected":
        formula = partial(expected_precision, cut=cut, tables=Tables.up_to(size, device))
    else:
        raise ValueError(f"definition {definition!r} must be one of {', '.join(get_args(Definition))}")
    return lambda ranking: formula(ranking).where(ranking.relevant > 0, torch.nan)


def _relevant_precision(ranking: Ranking, cut: int) -> Tensor:
    count = ranking.relevant.clamp(max=cut)
    return ranking.precision_sum(count) / count


def _top_precision(ranking: Ranking, cut: int) -> Tensor:
    count = ranking.hits_within(cut)
    return ranking.precision_sum(count) / count.clamp(min=1)


def _ndcg(cutoff: Cutoff, size: int, most_shared: int, device: torch.device) -> Measure:
    """Measure of NDCG: discounted gain up to a rank over the largest that any order of the database could have."""
    cut, most_shared = _rank_cut(cutoff, size), max(most_shared, 1)
    discounts = 1 / torch.log2(torch.arange(2, size + 2, dtype=torch.float64, device=device))
    best = torch.cat([discounts.new_zeros(1), discounts[:cut].cumsum(0)])  # of the first 0, 1, ..., cut ranks
    gains = torch.exp2(torch.arange(most_shared + 1, dtype=torch.float64, device=device)) - 1  # by labels shared

    def measure(ranking: Ranking) -> Tensor:
        # Every further label that an item shares adds its part of the gain.
        ideal = (best[ranking.sharing(most_shared).clamp(max=cut)] * gains.diff()).sum(1)
        return ranking.gain_sum(gains, discounts, ranking.hits_within(cut)) / ideal

    return measure


def _precision(rank: int, size: int) -> Measure:
    cut = _rank_cut(rank, size)
    return lambda ranking: ranking.hits_within(cut).double() / cut


def _precision_within_2(ranking: Ranking) -> Tensor:
    hits, items = (counts[:, :3].sum(1).double() for counts in (ranking.hits, ranking.items))
    return hits / items.clamp(min=1)


def _radius_precision(ranking: Ranking) -> Tensor:
    return ranking.hits.cumsum(1).double() / ranking.items.cumsum(1)


def _radius_recall(ranking: Ranking) -> Tensor:
    return ranking.hits.cumsum(1).double() / ranking.relevant.unsqueeze(1)


def _interpolated_precision(ranking: Ranking, levels: Tensor) -> Tensor:
    """Largest precision at a rank whose recall is at least the level, [q, L]."""
    values = levels.new_full((len(ranking.relevant), len(levels)), torch.nan)
    rounding = 1e-9  # 0.3 of ten items is three items, though 0.3 * 10 is above 3
    for row, (start, count) in enumerate(zip(ranking.starts.tolist(), ranking.relevant.tolist(), strict=True)):
        if count == 0:
            continue
        ranks = ranking.ranks[start : start + count] + 1
        precision = torch.arange(1, count + 1, device=ranks.device).double() / ranks
        best = precision.flip(0).cummax(0).values.flip(0)
        values[row] = best[(levels * count - rounding).ceil().long().clamp(min=1) - 1]
    return values


def _has_relevant(ranking: Ranking) -> Tensor:
    return (ranking.relevant > 0).double()


def _rank_cut(cutoff: Cutoff, size: int) -> int:
    if cutoff == "all":
        return size
    if cutoff < 1:
        raise ValueError(f"k must be at least 1, not {cutoff}")
    return min(cutoff, size)


# ---------------------------------------------------------------------------------------------- around them


def _measure_all(codes: tuple[Tensor, Tensor], labels: tuple[Tensor, Tensor], measures: Sequence[Measure]) -> Tensor:
    """All measures of every query from one ranking, side by side, [Q, M]."""

    def columns(ranking: Ranking) -> Tensor:
        values = [measure(ranking) for measure in measures]
        return torch.cat([value.view(len(ranking.relevant), -1) for value in values], dim=1)

    return rank_and_measure(codes, labels, columns)


def _check(query_codes: Tensor, database_codes: Tensor, query_labels: Tensor, database_labels: Tensor) -> None:
    """Refuses what is no code or no label, naming the place."""
    sides = (("query", query_codes, query_labels), ("database", database_codes, database_labels))
    for side, codes, labels in sides:
        for what, table, dimensions in (("codes", codes, (2, 3)), ("labels", labels, (2,))):
            if table.ndim not in dimensions or 0 in table.shape:
                raise ValueError(
                    f"{side} {what} must have {' or '.join(map(str, dimensions))} dimensions, none of them empty, "
                    f"not the shape {list(table.shape)}"
                )
        if len(codes) != len(labels):
            raise ValueError(f"{side}: {len(codes)} codes but {len(labels)} rows of labels")
    for what, a, b in (("codes", query_codes, database_codes), ("labels", query_labels, database_labels)):
        if a.shape[-1] != b.shape[-1]:
            raise ValueError(f"query {what} and database {what} differ in width: {a.shape[-1]} and {b.shape[-1]}")
    for side, codes, labels in sides:
        if any(extreme != 1 for extreme in torch.aminmax(codes.abs())):  # a fifth of the time of comparing every value
            _require(codes.abs() == 1, codes, f"{side} codes must be -1 or +1")
        _require((labels == 0) | (labels == 1), labels, f"{side} labels must be 0 or 1")


def _require(right: Tensor, table: Tensor, demand: str) -> None:
    if not right.all():
        row, *column = (~right).nonzero()[0].tolist()
        place = ", ".join(map(str, column))
        raise ValueError(f"{demand}, but row {row}, column {place} is {table[row, *column].item()}")


def _require_valid(count: int) -> None:
    if count == 0:
        raise UserError(
            "no query shares a label with any database item, so there is no mAP; check the labels of the data set"
        )
