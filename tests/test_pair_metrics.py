"""Retrieval of the own partner: against a count over all orders of ties."""

from itertools import permutations

import pytest
import torch

from common import pair_metrics
from common.pair_metrics import pair_report, partner_values, random_pairs


def codes(rows: int, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randint(0, 2, (rows, *shape), generator=torch.Generator().manual_seed(seed), dtype=torch.int8) * 2 - 1


def nearest(one: torch.Tensor, other: torch.Tensor) -> int:
    """Hamming distance of the nearest pair of codes."""
    bits = one.shape[-1]
    return min(int((a != b).sum()) for a in one.view(-1, bits) for b in other.view(-1, bits))


@pytest.mark.parametrize("shape", [(3,), (2, 4)])
def test_it_is_the_mean_over_all_orders(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    images, texts = codes(7, shape, 0), codes(7, shape, 1)
    partners = torch.arange(7)
    values = partner_values(images, texts, partners)
    for query in range(7):
        distances = [nearest(images[query], text) for text in texts]
        ranks = []
        for order in permutations(range(7)):
            ranked = sorted(order, key=lambda item: distances[item])
            ranks.append(ranked.index(query) + 1)
        expected = torch.tensor(ranks, dtype=torch.float64)
        assert float(values["rank(expected)"][query]) == pytest.approx(float(expected.mean()))
        for k in (1, 5, 10):
            assert float(values[f"recall@{k}(expected)"][query]) == pytest.approx(
                float((expected <= k).double().mean())
            )
    monkeypatch.setattr(pair_metrics, "_PAIRS", 1)  # query by query
    for name, value in partner_values(images[4:], texts, partners[4:]).items():
        assert torch.equal(value, values[name][4:])
    assert all(len(value) == 0 for value in partner_values(images[:0], texts, partners[:0]).values())


def test_perfect_codes_useless_codes_and_random_ones() -> None:
    unique = torch.tensor([[1 if row >> bit & 1 else -1 for bit in range(6)] for row in range(64)])
    found = pair_report(partner_values(unique, unique, torch.arange(64)))
    assert found["recall@1(expected)"] == 1 and found["median rank(expected)"] == 1
    same = torch.ones(64, 6)
    assert pair_report(partner_values(unique, same, torch.arange(64))) == pytest.approx(random_pairs(64))
    draws = [
        pair_report(partner_values(codes(500, (64,), s), codes(500, (64,), s + 1), torch.arange(500))) for s in (2, 4)
    ]
    assert sum(draw["recall@10(expected)"] for draw in draws) / 2 == pytest.approx(0.02, abs=0.015)
