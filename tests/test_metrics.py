"""Metrics against recorded numbers of the references, brute force written here, and properties that must hold."""

import copy
import itertools
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from common import metrics, ranking
from common.errors import UserError
from common.metrics import (
    average_precision,
    map_at_k,
    mean_over_queries,
    random_map,
    retrieval_curves,
    retrieval_values,
)

GOLDEN = Path(__file__).parent / "golden" / "map.npz"
Problem = tuple[Tensor, Tensor, Tensor, Tensor]
DEFINITIONS: list[Any] = ["relevant", "top", "expected"]


def problem(
    queries: int = 9,
    database: int = 60,
    bits: int = 8,
    classes: int = 5,
    density: float = 0.3,
    seed: int = 0,
    several: tuple[int, int] | None = None,
) -> Problem:
    """Codes that carry the labels a little, with many ties; `several` codes a query and a database item."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(classes, bits, generator=generator)
    labels = [(torch.rand(n, classes, generator=generator) < density) for n in (queries, database)]
    codes = []
    for y, n in zip(labels, several or (1, 1), strict=True):
        noisy = (y.float() @ directions).unsqueeze(1) + torch.randn(len(y), n, bits, generator=generator)
        codes.append(torch.where(noisy > 0, 1.0, -1.0) if several else torch.where(noisy.squeeze(1) > 0, 1.0, -1.0))
    return codes[0], codes[1], labels[0], labels[1]


def ranked(query: Tensor, database: Tensor, query_label: Tensor, database_label: Tensor) -> tuple[list[int], list[int]]:
    """Distance and number of shared labels of every item in rank order, ties by place, in plain Python."""
    bits = query.shape[-1]
    distances = [
        min(int((own != other).sum()) for own in query.view(-1, bits) for other in codes.view(-1, bits))
        for codes in database
    ]
    shared = [int((query_label.bool() & label.bool()).sum()) for label in database_label]
    order = sorted(range(len(distances)), key=lambda item: (distances[item], item))
    return [distances[item] for item in order], [shared[item] for item in order]


def brute_ap(shared: list[int], k: int | None, definition: str) -> float:
    if not any(shared):
        return float("nan")
    precisions, found = [], 0
    for rank, count in enumerate(shared, start=1):
        if definition == "top" and k is not None and rank > k:
            break
        if count:
            found += 1
            precisions.append(found / rank)
    if definition == "relevant" and k is not None:
        precisions = precisions[:k]
    return sum(precisions) / len(precisions) if precisions else 0.0


def brute(p: Problem, k: int | None, definition: str) -> list[float]:
    rows = [ranked(code, p[1], label, p[3])[1] for code, label in zip(p[0], p[2], strict=True)]
    return [brute_ap(shared, k, definition) for shared in rows]


@pytest.fixture(params=["compiled", "torch"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a test on the CPU's ranking and on the one that accelerators use."""
    if request.param == "torch":

        def with_torch(codes: Any, labels: Any, measure: Any) -> Tensor:
            return torch.cat([measure(r) for r in ranking.rank_with_torch(codes, labels)])

        monkeypatch.setattr(metrics, "rank_and_measure", with_torch)


# ---------------------------------------------------------------------------------------------- known numbers


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("name", ["p0", "p1", "p2"])
def test_golden(name: str) -> None:
    golden = np.load(GOLDEN)
    parts = ("query_code", "db_code", "query_label", "db_label")
    p = cast(Problem, tuple(torch.tensor(golden[f"{name}/in/{part}"]) for part in parts))
    for k in (None, 50, 100):
        values = average_precision(*p, k)
        np.testing.assert_allclose(values.nan_to_num(0).numpy(), golden[f"{name}/out/ap/{k or 'all'}"], atol=1e-6)
        zero_counted = values.nan_to_num(0).mean().item()
        assert zero_counted == pytest.approx(float(golden[f"{name}/out/map/{k or 'all'}"]), abs=1e-6)
        matrix = float(golden[f"{name}/out/map_matrix/{k or 'all'}"])
        assert np.isnan(matrix) == bool(values.isnan().any())
    for k in (None, 50):
        values = average_precision(*p, k, "top").nan_to_num(0)
        assert values.mean().item() == pytest.approx(float(golden[f"{name}/out/top_map/{k or 'all'}"]), abs=1e-6)


def published() -> Problem:
    def wave(a: float, n: int, m: int) -> Tensor:
        i, j = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(m, dtype=torch.float64)[None]
        return torch.sin(a + 0.7 * i + 1.3 * j + 0.11 * i * j).sign()

    def labels(n: int, classes: int) -> Tensor:
        rows = [[(3 * i + 5 * c + i * c) % 7 < 2 or c == i % classes for c in range(classes)] for i in range(n)]
        return torch.tensor(rows)

    return wave(0.4, 4, 6), wave(1.7, 12, 6), labels(4, 5), labels(12, 5)


@pytest.mark.usefixtures("both_ways")
def test_published_values() -> None:
    p = published()
    assert average_precision(*p).tolist() == pytest.approx(
        [0.7202741504, 0.9622222781, 0.7933332920, 0.8100000620], abs=1e-6
    )
    assert map_at_k(*p) == pytest.approx(0.8214573860, abs=1e-6)
    assert average_precision(*p, 3).tolist() == pytest.approx([0.9166666865, 1, 0.9166666865, 0.8055555820], abs=1e-6)
    assert map_at_k(*p, 1) == 1.0
    p[2][2] = False
    values = average_precision(*p)
    assert values.nan_to_num(0).mean().item() == pytest.approx(0.6231241226, abs=1e-6)
    assert map_at_k(*p) == pytest.approx(0.6231241226 * 4 / 3, abs=1e-6), "the empty query is left out of the mean"


# ---------------------------------------------------------------------------------------------- brute force


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("definition", ["relevant", "top"])
@pytest.mark.parametrize("k", [None, 1, 2, 7, 59, 60, 1000])
def test_average_precision_equals_brute_force(k: int | None, definition: Any) -> None:
    p = problem()
    np.testing.assert_allclose(average_precision(*p, k, definition), brute(p, k, definition), rtol=1e-12)


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize(("several", "bits"), [((4, 4), 8), ((2, 3), 65), ((1, 1), 8)])
def test_of_several_codes_the_nearest_pair_decides(several: tuple[int, int], bits: int) -> None:
    p = problem(bits=bits, several=several)
    for definition, k in (("relevant", None), ("top", 7)):
        values = average_precision(*p, k, cast(Any, definition))
        np.testing.assert_allclose(values, brute(p, k, definition), rtol=1e-12)
    curves = retrieval_curves(*p, [1, 5], 3)
    assert len(curves.radius_recall) == bits + 1 and curves.radius_recall[-1] == 1
    if several == (1, 1):
        single = (p[0].squeeze(1), p[1].squeeze(1), p[2], p[3])
        np.testing.assert_array_equal(average_precision(*p, 7), average_precision(*single, 7))


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize(
    ("queries", "database", "bits", "classes"),
    [(1, 1, 1, 1), (1, 30, 1, 2), (3, 1, 8, 3), (4, 40, 63, 64), (4, 40, 65, 65), (2, 25, 300, 200), (2, 9, 2048, 3)],
)
def test_sizes_at_the_edge(queries: int, database: int, bits: int, classes: int) -> None:
    p = problem(queries, database, bits, classes, density=0.1)
    p[2][0, 0] = p[3][0, 0] = True
    for definition in DEFINITIONS[:2]:
        expected = brute(p, 5, definition)
        np.testing.assert_allclose(average_precision(*p, 5, definition), expected, rtol=1e-12)
    values = mean_over_queries(retrieval_values(*p, ["all", 1], DEFINITIONS)).values()
    assert all(np.isfinite(value) for value in values)


@pytest.mark.parametrize("k", [None, 1, 5, 13])
def test_expected_is_the_mean_over_orders_of_ties(k: int | None) -> None:
    p = problem(queries=3, database=40, bits=4, classes=4, density=0.5)
    generator = torch.Generator().manual_seed(1)
    draws = []
    for _ in range(400):
        order = torch.randperm(40, generator=generator)
        draws.append(average_precision(p[0], p[1][order], p[2], p[3][order], k, "top"))
    sample = torch.stack(draws)
    error = sample.std(0) / len(draws) ** 0.5
    expected = average_precision(*p, k, "expected")
    assert ((expected - sample.mean(0)).abs() < 4.5 * error + 1e-12).all()


def test_expected_equals_all_orders_of_a_small_database() -> None:
    """Every order of six tied items with two relevant ones, by enumeration, at every cut."""
    query, codes = torch.ones(1, 3), torch.ones(6, 3)
    labels = torch.tensor([1, 0, 0, 1, 0, 0])[:, None]
    orders = set(itertools.permutations([1, 1, 0, 0, 0, 0]))
    for k in range(1, 7):
        exact = sum(brute_ap(list(order), k, "top") for order in orders) / len(orders)
        value = average_precision(query, codes, torch.ones(1, 1), labels, k, "expected")
        assert value.item() == pytest.approx(exact, abs=1e-12)


def test_without_ties_all_definitions_of_the_whole_list_agree() -> None:
    codes = torch.tril(torch.ones(8, 8)) * 2 - 1  # distances 7, 6, ..., 0 from all ones
    labels = torch.tensor([0, 1, 1, 0, 0, 1, 0, 1])[:, None]
    one = torch.ones(1, 8), codes, torch.ones(1, 1), labels
    values = [map_at_k(*one, definition=definition) for definition in DEFINITIONS]
    assert values == pytest.approx([values[0]] * 3, abs=1e-12)
    assert values[0] == pytest.approx((1 + 2 / 3 + 3 / 6 + 4 / 7) / 4)
    assert map_at_k(*one, 4, "expected") == pytest.approx(map_at_k(*one, 4, "top"), abs=1e-12)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    assert map_at_k(one[0], codes[order], one[2], labels[order]) == pytest.approx(values[0], abs=1e-12)


@pytest.mark.usefixtures("both_ways")
def test_report_equals_brute_force() -> None:
    p = problem(queries=12, density=0.2)
    p[2][0] = False
    report = mean_over_queries(retrieval_values(*p, ["all", 10], DEFINITIONS))
    rows = [ranked(code, p[1], label, p[3]) for code, label in zip(p[0], p[2], strict=True)]
    rows = [row for row in rows if any(row[1])]

    def dcg(shared: list[int], k: int) -> float:
        return float(sum((2**s - 1) / np.log2(rank + 2) for rank, s in enumerate(shared[:k])))

    for k in (10, 60):
        ndcg = np.mean([dcg(shared, k) / dcg(sorted(shared, reverse=True), k) for _, shared in rows])
        assert report[f"NDCG@{'all' if k == 60 else k}"] == pytest.approx(ndcg, rel=1e-12)
    assert report["P@10"] == pytest.approx(np.mean([sum(s > 0 for s in shared[:10]) / 10 for _, shared in rows]))
    near = [[s > 0 for d, s in zip(*row, strict=True) if d <= 2] for row in rows]
    assert report["P(radius 2)"] == pytest.approx(np.mean([np.mean(hits) if hits else 0.0 for hits in near]))
    for definition in DEFINITIONS:
        for cut in (None, 10):
            name = metrics.metric_name(cut or "all", definition)
            if name == "mAP@all(top)":
                assert name not in report  # mAP@all under another name
                continue
            assert report[name] == pytest.approx(map_at_k(*p, cut, definition), rel=1e-12)
    assert {"mAP@all", "mAP@10(top)", "mAP@all(expected)"} <= set(report)
    assert report["queries"] == len(rows)
    assert report["queries without relevant items"] == 12 - len(rows) > 0


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("shares", [2, 5, 15])
def test_queries_can_be_shared_out(shares: int) -> None:
    """Every share alone gives the same numbers to the last bit, shares without a query and without a label included."""
    p = problem(queries=12, density=0.2)
    p[2][0] = False
    whole = retrieval_values(*p, ["all", 10], DEFINITIONS)
    parts = [
        retrieval_values(p[0][own], p[1], p[2][own], p[3], ["all", 10], DEFINITIONS)
        for own in torch.arange(12).tensor_split(shares)
    ]
    for name, values in whole.items():
        assert values[0].isnan() and values.shape == (12,)
        assert torch.equal(torch.cat([part[name] for part in parts]).nan_to_num(-1), values.nan_to_num(-1)), name


@pytest.mark.usefixtures("both_ways")
def test_curves_equal_brute_force() -> None:
    p = problem(queries=12, density=0.2)
    p[2][0] = False
    curves = retrieval_curves(*p, ranks=[1, 5, 60, 61], recall_levels=11)
    rows = [ranked(code, p[1], label, p[3]) for code, label in zip(p[0], p[2], strict=True)]
    rows = [row for row in rows if any(row[1])]
    assert curves.ranks == [1, 5, 60]
    for n, value in zip(curves.ranks, curves.precision_at, strict=True):
        assert value == pytest.approx(np.mean([sum(s > 0 for s in shared[:n]) / n for _, shared in rows]))
    for level, value in zip(curves.recall_levels, curves.precision_at_recall, strict=True):
        best = []
        for _, shared in rows:
            found = np.cumsum([s > 0 for s in shared])
            precision = found / np.arange(1, 61)
            best.append(precision[found / found[-1] >= level - 1e-12].max())
        assert value == pytest.approx(np.mean(best))
    for radius in range(9):
        near = [[s > 0 for d, s in zip(*row, strict=True) if d <= radius] for row in rows]
        recall = [sum(hits) / sum(s > 0 for s in row[1]) for hits, row in zip(near, rows, strict=True)]
        assert curves.radius_recall[radius] == pytest.approx(np.mean(recall))
        some = [np.mean(hits) for hits in near if hits]
        if some:
            assert curves.radius_precision[radius] == pytest.approx(np.mean(some))
        else:
            assert np.isnan(curves.radius_precision[radius])


# ---------------------------------------------------------------------------------------------- properties


def test_blocks_do_not_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(queries=50, database=200)

    def values() -> list[Tensor]:
        return [average_precision(*p, k, definition).nan_to_num(-1) for definition in DEFINITIONS for k in (None, 20)]

    whole = values()
    for pairs in (1, 700, 4000):
        monkeypatch.setattr(ranking, "_PAIRS_ON_CPU", pairs)
        parts = values()
        assert all(torch.equal(a, b) for a, b in zip(whole[:4], parts[:4], strict=True)), "relevant, top"
        for a, b in zip(whole[4:], parts[4:], strict=True):  # expected: exp rounds by its place in a vector
            torch.testing.assert_close(a, b, rtol=1e-13, atol=0)


@pytest.mark.parametrize("lane", [1, 7, 90, 256])
def test_ranking_with_torch_in_blocks_equals_the_compiled_one(monkeypatch: pytest.MonkeyPatch, lane: int) -> None:
    p = problem(queries=20, database=90, bits=70, classes=70, density=0.05)
    monkeypatch.setattr(ranking, "_PAIRS_ON_ACCELERATOR", 300)
    monkeypatch.setattr(ranking, "_ITEMS_OF_A_LANE", lane)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    compiled: list[ranking.Ranking] = []

    def keep(block: ranking.Ranking) -> Tensor:
        compiled.append(copy.deepcopy(block))  # its memory is used again
        return block.relevant.unsqueeze(1)

    ranking.rank_and_measure(p[:2], p[2:], keep)
    blocks = list(ranking.rank_with_torch(p[:2], p[2:]))
    assert len(compiled) == 1 and len(blocks) > 5
    for name in ("relevant", "ranks", "shared", "items", "hits"):
        parts = torch.cat([getattr(block, name) for block in blocks])
        assert torch.equal(parts, getattr(compiled[0], name)), name


def test_compiled_sums_over_a_ranking_equal_those_of_torch() -> None:
    p = problem(queries=20, database=90, bits=70, classes=70, density=0.05)
    p[2][3] = False

    def compare(block: ranking.Ranking) -> Tensor:
        assert isinstance(block, ranking.CompiledRanking)
        with_torch = ranking.Ranking(**vars(block))
        for rank in (1, 30, 90, 1000):
            assert torch.equal(block.hits_within(rank), with_torch.hits_within(rank))
        most = int(block.shared.max())
        assert most > 1 and torch.equal(block.sharing(most), with_torch.sharing(most))
        assert torch.equal(block.sharing(most + 2)[:, 0], block.relevant)
        gains, discounts = torch.rand(most + 1).double(), torch.rand(90).double()
        for count in (block.relevant, torch.arange(len(block.relevant)).minimum(block.relevant)):
            for own, other in (
                (block.precision_sum(count), with_torch.precision_sum(count)),
                (block.gain_sum(gains, discounts, count), with_torch.gain_sum(gains, discounts, count)),
            ):
                torch.testing.assert_close(own, other, rtol=1e-14, atol=0)
        return block.relevant.unsqueeze(1)

    assert len(ranking.rank_and_measure(p[:2], p[2:], compare)) == 20


def test_ties_are_broken_by_place() -> None:
    codes, one = torch.ones(3, 4), torch.ones(1, 4)
    labels = torch.tensor([[0], [1], [0]])
    assert map_at_k(one, codes, torch.ones(1, 1), labels) == 0.5
    assert map_at_k(one, codes, torch.ones(1, 1), labels.roll(1, 0)) == pytest.approx(1 / 3)
    assert map_at_k(one, codes, torch.ones(1, 1), labels, definition="expected") == pytest.approx(
        (1 + 1 / 2 + 1 / 3) / 3
    )


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float16, torch.float64])
def test_any_dtype_of_codes_and_labels(dtype: torch.dtype) -> None:
    p = problem()
    expected = average_precision(*p)
    given = average_precision(p[0].to(dtype), p[1].to(dtype), p[2].to(dtype), p[3].to(dtype))
    assert given.dtype == torch.float64
    assert torch.equal(given.nan_to_num(-1), expected.nan_to_num(-1))


def test_a_query_without_relevant_items_is_nan_and_left_out() -> None:
    p = problem()
    p[2][3] = False
    for definition in DEFINITIONS:
        values = average_precision(*p, 5, definition)
        assert values.isnan().nonzero().flatten().tolist() == [3]
        assert map_at_k(*p, 5, definition) == pytest.approx(values[~values.isnan()].mean().item())


def test_top_is_zero_where_the_relevant_items_lie_beyond_the_cut() -> None:
    codes = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    values = [
        average_precision(torch.ones(1, 2), codes, torch.ones(1, 1), torch.tensor([[0], [1]]), 1, definition).item()
        for definition in DEFINITIONS
    ]
    assert values == [0.5, 0.0, 0.0]


def test_random_map_is_repeatable_and_near_chance() -> None:
    labels = torch.rand(400, 4, generator=torch.Generator().manual_seed(0)) < 0.25
    value = random_map(labels[:100], labels[100:], (64,), seed=3)
    assert value == random_map(labels[:100], labels[100:], (64,), seed=3)
    assert value != random_map(labels[:100], labels[100:], (64,), seed=4)
    assert random_map(labels[:100], labels[100:], (4, 64), seed=3) == pytest.approx(value, abs=0.05)
    has_label = labels[:100].any(1)
    chance = (labels[:100][has_label].float() @ labels[100:].float().T > 0).float().mean().item()
    assert value == pytest.approx(chance, abs=0.03)


# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("value", [0.0, float("nan"), 0.5, -2.0, float("inf")])
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_no_code_is_refused_with_its_place(value: float, side: int) -> None:
    p = problem()
    p[side][4, 2] = value
    place = f"{('query', 'database')[side]} codes must be -1 or [+]1, but row 4, column 2 is {value}"
    with pytest.raises(ValueError, match=place):
        average_precision(*p)


def test_what_is_no_label_is_refused() -> None:
    p = problem()
    labels = p[3].float()
    labels[7, 1] = 2
    with pytest.raises(ValueError, match=r"database labels must be 0 or 1, but row 7, column 1 is 2\.0"):
        retrieval_values(p[0], p[1], p[2], labels, ["all"], ["relevant"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: (p[0][:, :4], p[1], p[2], p[3]), "query codes and database codes differ in width: 4 and 8"),
        (lambda p: (p[0], p[1], p[2][:, :2], p[3]), "query labels and database labels differ in width: 2 and 5"),
        (lambda p: (p[0][:3], p[1], p[2], p[3]), "query: 3 codes but 9 rows of labels"),
        (
            lambda p: (p[0], p[1][:0], p[2], p[3][:0]),
            r"database codes must have 2 or 3 dimensions, none of them empty, not the shape \[0, ",
        ),
        (lambda p: (p[0][0], p[1], p[2], p[3]), "query codes must have 2 or 3 dimensions"),
    ],
)
def test_shapes_that_disagree_are_refused(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        average_precision(*change(problem()))


def test_no_valid_query_is_the_users_error() -> None:
    p = problem()
    p[2][:] = False
    for call in (
        lambda: map_at_k(*p),
        lambda: mean_over_queries(retrieval_values(*p, ["all"], ["relevant"])),
        lambda: retrieval_curves(*p, [1], 11),
    ):
        with pytest.raises(UserError, match="no query shares a label"):
            call()


def test_cut_and_definition_are_checked() -> None:
    with pytest.raises(ValueError, match="k must be at least 1, not 0"):
        average_precision(*problem(), 0)
    with pytest.raises(ValueError, match="definition 'hits' must be one of relevant, top, expected"):
        average_precision(*problem(), None, "hits")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="recall_levels must be at least 2"):
        retrieval_curves(*problem(), [1], 1)


@pytest.mark.gpu
def test_on_the_gpu_as_on_the_cpu() -> None:
    p = problem(queries=50, database=3000, bits=128, classes=80, density=0.05)
    there = cast(Problem, tuple(table.cuda() for table in p))
    for definition in DEFINITIONS:
        for k in (None, 100):
            on_gpu = average_precision(*there, k, definition)
            torch.testing.assert_close(
                on_gpu.cpu(), average_precision(*p, k, definition), rtol=1e-9, atol=0, equal_nan=True
            )
