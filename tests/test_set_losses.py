"""Set losses: worked values, the formulas written out in loops, edge cases, memory."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common import set_losses
from common.set_losses import (
    DiversityScope,
    SetMode,
    chamfer,
    diversity,
    label_gain,
    maximum_mean_discrepancy,
    set_cosines,
    set_distance,
    smooth_chamfer,
    weighted_triplet,
)
from tests.worked import multi_hot, wave

DOUBLE = torch.float64
WORKED = wave(0.3, 12, 8, DOUBLE).view(4, 3, 8), wave(1.9, 12, 8, DOUBLE).view(4, 3, 8)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def triplet_in_loops(distances: Tensor, labels: Tensor, margin: float) -> float:
    """The definition, triplet by triplet."""
    shared = [[int((a * b).sum()) for b in labels.long()] for a in labels.long()]
    costs = []
    for i, row in enumerate(shared):
        ideal = sum((2**s - 1) / math.log2(r + 1) for r, s in enumerate(sorted(row, reverse=True), start=1))
        for j, positive in enumerate(row):
            for k, negative in enumerate(row):
                if positive > 0 and negative == 0:
                    gain = (2**positive - 1) / ideal
                    costs.append(max(0.0, gain * (float(distances[i, j]) - float(distances[i, k]) + margin)))
    paid = [cost for cost in costs if cost > 1e-16]
    return sum(paid) / len(paid) if paid else 0.0


# ---------------------------------------------------------------------------------------------- similarity of sets


def test_worked_smooth_chamfer() -> None:
    similarity = smooth_chamfer(set_cosines(*WORKED), 16.0, 1.0, 2.0)
    assert similarity[0].tolist() == pytest.approx((0.5675, 0.3355, 0.2760, 0.0874), abs=5e-5)


@pytest.mark.parametrize("mode", ["smooth_chamfer", "chamfer", "max", "avg"])
def test_distances_are_those_of_loops(mode: SetMode) -> None:
    a, b = random(4, 3, 5), random(6, 2, 5, seed=1)
    t, s, denominator = 7.0, 0.6, 2.5
    ours = set_distance(set_cosines(a, b), mode, t, s, denominator)
    assert ours.shape == (4, 6)
    for i in range(4):
        for j in range(6):
            cosines = [[float(F.cosine_similarity(x, y, dim=0)) for y in b[j]] for x in a[i]]
            columns = list(zip(*cosines, strict=True))
            if mode == "smooth_chamfer":
                first = sum(math.log(sum(math.exp(t * s * c) for c in row)) for row in cosines) / (3 * t * s)
                second = sum(math.log(sum(math.exp(t * c) for c in column)) for column in columns) / (2 * t)
                similarity = (first + second) / denominator
            elif mode == "chamfer":
                similarity = (sum(map(max, cosines)) / 3 + sum(map(max, columns)) / 2) / denominator
            elif mode == "max":
                similarity = max(map(max, cosines))
            else:
                similarity = sum(1 / (1 + math.exp(-c)) for row in cosines for c in row) / 6
            assert float(ours[i, j]) == pytest.approx(max(0.0, 1 - similarity), abs=1e-12)


def test_smooth_chamfer_approaches_chamfer_and_can_exceed_one() -> None:
    cosines = set_cosines(random(3, 4, 6), random(3, 4, 6, seed=1))
    sharp = smooth_chamfer(cosines, 2000.0, 1.0, 2.0)
    torch.testing.assert_close(sharp, chamfer(cosines, 2.0), atol=1e-3, rtol=0)
    same = set_cosines(torch.ones(1, 8, 4), torch.ones(1, 8, 4))
    assert float(smooth_chamfer(same, 16.0, 1.0, 2.0)) == pytest.approx(1 + math.log(8) / 16)
    assert float(set_distance(same, "smooth_chamfer", 16.0, 1.0, 2.0)) == 0


def test_a_set_of_one_member_is_a_vector() -> None:
    a, b = random(3, 1, 5), random(4, 1, 5, seed=1)
    cosines = F.cosine_similarity(a, b.transpose(0, 1), dim=-1)
    for mode in ("smooth_chamfer", "chamfer", "max"):
        torch.testing.assert_close(set_distance(set_cosines(a, b), mode, 16.0, 1.0, 2.0), 1 - cosines)


def test_a_member_of_zeros_gives_no_nan() -> None:
    sets = torch.zeros(2, 3, 4, requires_grad=True)
    set_distance(set_cosines(sets, sets), "smooth_chamfer", 16.0, 1.0, 2.0).sum().backward()
    assert sets.grad is not None and sets.grad.isfinite().all()


# ---------------------------------------------------------------------------------------------- triplets


def test_worked_gains() -> None:
    wanted = [
        [0.7262, 0.2421, 0, 0.2421],
        [0.1168, 0.8176, 0.1168, 0.1168],
        [0, 0.6131, 0.6131, 0],
        [0.4693, 0.4693, 0, 0.4693],
    ]
    torch.testing.assert_close(label_gain(multi_hot(4, 5)), torch.tensor(wanted, dtype=DOUBLE), atol=5e-5, rtol=0)


def test_worked_triplets() -> None:
    distances = set_distance(set_cosines(*WORKED), "smooth_chamfer", 16.0, 1.0, 2.0)
    labels = multi_hot(4, 5)
    assert float(weighted_triplet(distances, labels, 0.3)) == pytest.approx(0.127861864, abs=1e-9)
    assert float(weighted_triplet(distances.T, labels, 0.3)) == pytest.approx(0.119546261, abs=1e-9)


@pytest.mark.parametrize("rows", [1, 2, 7, 12])
@pytest.mark.parametrize("at_once", [1, 2**22])
def test_triplets_are_those_of_loops(rows: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(set_losses, "TRIPLETS_AT_ONCE", at_once)
    for seed in range(3):
        distances = random(rows, rows, seed=seed).abs()
        labels = (random(rows, 6, seed=seed + 10) > 0.5).double()
        ours = float(weighted_triplet(distances, labels, 0.3))
        assert ours == pytest.approx(triplet_in_loops(distances, labels, 0.3), abs=1e-12)


def test_gradient_of_triplets_is_that_of_the_loss() -> None:
    labels = (random(6, 4, seed=3) > 0.3).double()
    distances = random(6, 6, seed=4).abs().requires_grad_()
    assert torch.autograd.gradcheck(lambda d: weighted_triplet(d, labels, 0.3), distances)


def test_rows_without_labels_weigh_nothing() -> None:
    labels = multi_hot(5, 4)
    labels[2] = 0
    distances = random(5, 5).abs().requires_grad_()
    assert not label_gain(labels)[2].any() and label_gain(labels).isfinite().all()
    loss = weighted_triplet(distances, labels, 0.3)
    loss.backward()
    assert loss.item() == pytest.approx(triplet_in_loops(distances.detach(), labels, 0.3), abs=1e-12)
    assert distances.grad is not None and not distances.grad[2].any() and distances.grad[:, 2].any()


@pytest.mark.parametrize("labels", [torch.zeros(4, 3), torch.ones(4, 3)], ids=["none", "all alike"])
def test_no_triplet_is_no_loss(labels: Tensor) -> None:
    distances = torch.rand(4, 4, requires_grad=True)
    loss = weighted_triplet(distances, labels, 0.3)
    loss.backward()
    assert loss == 0 and distances.grad is not None and not distances.grad.any()


def test_many_shared_labels_do_not_overflow() -> None:
    labels = torch.zeros(3, 300, dtype=torch.uint8)
    labels[:2], labels[1, 290:], labels[2, 295:] = 1, 0, 1
    gain = label_gain(labels)
    assert gain.isfinite().all() and float(gain[0, 0]) == pytest.approx(1 / (1 + 2.0**-10 / math.log2(3)), abs=1e-9)
    assert weighted_triplet(torch.rand(3, 3), labels, 0.3).isfinite()


def test_a_nan_distance_is_not_hidden() -> None:
    distances = torch.rand(3, 3)
    distances[0, 1] = torch.nan
    assert weighted_triplet(distances, multi_hot(3, 4), 0.3).isnan()


def test_the_type_of_labels_does_not_matter() -> None:
    distances, labels = torch.rand(4, 4), multi_hot(4, 5)
    wanted = weighted_triplet(distances, labels, 0.3)
    for kind in (torch.bool, torch.uint8, torch.int64, torch.float64):
        assert torch.equal(weighted_triplet(distances, labels.to(kind), 0.3), wanted)


# ---------------------------------------------------------------------------------------------- clouds of members


def test_worked_discrepancy() -> None:
    image, text = (F.normalize(sets, dim=-1).flatten(0, 1) for sets in WORKED)
    assert float(maximum_mean_discrepancy(image, text, 0.5, exact=False)) == pytest.approx(0.037077568, abs=1e-9)


def test_discrepancy_is_that_of_loops() -> None:
    a, b = random(5, 3), random(4, 3, seed=1)

    def kernel(x: Tensor, y: Tensor) -> float:
        return sum(math.exp(-0.7 * math.dist(p, q)) for p in x.tolist() for q in y.tolist()) / (len(x) * len(y))

    wanted = kernel(a, a) - 2 * kernel(a, b) + kernel(b, b)
    for exact in (False, True):
        assert float(maximum_mean_discrepancy(a, b, 0.7, exact)) == pytest.approx(wanted, abs=1e-12)
        assert float(maximum_mean_discrepancy(a, a, 0.7, exact)) == pytest.approx(0, abs=1e-12)


def test_discrepancy_of_equal_vectors_has_finite_gradients() -> None:
    for exact in (False, True):
        vectors = torch.ones(40, 3, requires_grad=True)  # fewer take differences in any case
        maximum_mean_discrepancy(vectors, vectors * 1.0, 0.5, exact).backward()
        assert vectors.grad is not None and vectors.grad.isfinite().all()


def test_worked_diversity() -> None:
    sets = F.normalize(1 + 0.5 * wave(0.3, 12, 8, DOUBLE), dim=-1).view(4, 3, 8)
    assert float(diversity(sets, "batch")) == pytest.approx(0.620865927, abs=1e-9)
    assert float(diversity(sets, "sample")) == pytest.approx(0.064194322, abs=1e-9)
    image, text = (F.normalize(each, dim=-1) for each in WORKED)
    assert float(diversity(image, "batch") + diversity(text, "batch")) == pytest.approx(1.6266e-8, abs=1e-12)


@pytest.mark.parametrize("scope", ["batch", "sample"])
def test_diversity_is_that_of_loops(scope: DiversityScope) -> None:
    sets = random(3, 4, 2) * 0.2
    groups = sets.tolist() if scope == "sample" else [sets.flatten(0, 1).tolist()]
    total = sum(
        math.exp(-20 * math.dist(group[a], group[b]) ** 2)
        for group in groups
        for b in range(len(group))
        for a in range(b)
    )
    assert float(diversity(sets, scope)) == pytest.approx(total / len(groups) / 6, abs=1e-12)


@pytest.mark.parametrize("scope", ["batch", "sample"])
def test_one_member_is_diverse_and_equal_members_are_not(scope: DiversityScope) -> None:
    one = torch.rand(3, 1, 4, requires_grad=True)
    value = diversity(one, scope)
    value.backward()
    assert value == 0 and one.grad is not None and not one.grad.any()
    equal = torch.ones(1, 5, 4, requires_grad=True)
    value = diversity(equal, scope)
    value.backward()
    assert float(value) == pytest.approx(1) and equal.grad is not None and equal.grad.isfinite().all()


def test_memory_does_not_grow_with_the_cube_of_the_batch() -> None:
    """What the triplets keep for backward is a few B x B tensors, and no temporary exceeds its limit."""
    rows, kept = 128, list[int]()

    def keep(saved: Tensor) -> Tensor:
        kept.append(saved.numel())
        return saved

    distances, labels = torch.rand(rows, rows, requires_grad=True), multi_hot(rows, 24)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        weighted_triplet(distances, labels, 0.3).backward()
    assert kept and sum(kept) <= 8 * rows**2
