"""DDWSH: its loss and drawing probabilities by loops, which triplets can be drawn, its options."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.ddwsh import DDWSH, boundary_loss
from tests.tiny_models import build
from tests.worked import multi_hot, wave

LABELS = torch.tensor(  # rows 0, 1, 2 share a label, 3 and 4 another; 5 is alone, 6 has none, 7 shares with all but 6
    [[1, 0, 0], [1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0], [1, 1, 1]]
)


def small(tmp_path: Path, **overrides: Any) -> DDWSH:
    """DDWSH on the tiny CLIP, with 4 bits and boundaries for three classes."""
    model = build("DDWSH", str(tmp_path), bits=4, **overrides)
    assert isinstance(model, DDWSH)
    model.boundaries = torch.nn.Parameter(torch.tensor([1.0, 1.2, 1.4]))
    return model


def drawn(model: DDWSH, labels: Tensor, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The triplets of one step, [A, 3] a side."""
    found: list[Tensor] = []
    draw = model.draw_triplets

    def remember(*arguments: Tensor) -> Tensor:
        found.append(draw(*arguments))
        return found[-1]

    monkeypatch.setattr(model, "draw_triplets", remember)
    model.objective(wave(0.2, len(labels), 4), wave(0.9, len(labels), 4), labels)
    return found


def test_loss_by_loops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(tmp_path, margin=0.3)
    triplets = torch.tensor([[0, 1, 3], [3, 4, 0], [7, 2, 6]])
    monkeypatch.setattr(model, "draw_triplets", lambda *_: triplets)
    image, text = wave(0.2, 8, 4), wave(0.9, 8, 4)
    out = model.objective(image, text, LABELS)
    betas = {0: 1.0, 3: 1.2, 7: 1.2}
    for name, (a, b) in {"image": (image, image), "text": (text, text), "i2t": (image, text)}.items():
        total, active = 0.0, 0
        for anchor, positive, negative in triplets.tolist():
            near, far = (
                float((a[anchor] / a[anchor].norm() - b[j] / b[j].norm()).norm()) for j in (positive, negative)
            )
            hinges = max(0.0, near - betas[anchor] + 0.3), max(0.0, betas[anchor] - far + 0.3)
            total, active = total + sum(hinges), active + (max(hinges) > 0)
        assert out.terms[f"boundary_{name}"].item() == pytest.approx(total / active, abs=1e-6)
    assert out.loss.item() == pytest.approx(sum(term.item() for term in out.terms.values()))


def test_probabilities_by_loops(tmp_path: Path) -> None:
    model = small(tmp_path)
    distances = torch.tensor([[0.1, 0.4, 0.9, 1.6, 2.0]]).repeat(5, 1)
    negative = torch.tensor([[False, True, True, True, True]]).repeat(5, 1)
    weights = []
    for length in (0.5, 0.9, 1.6, 2.0):  # 0.4 is held at 0.5
        weights.append(length ** (2 - 4) * max(1 - length**2 / 4, 1e-8) ** (-(4 - 3) / 2))
    wanted = torch.tensor([0.0, *weights], dtype=torch.float64) / math.fsum(weights)
    torch.testing.assert_close(model.negative_probabilities(distances, negative)[0], wanted, rtol=1e-6, atol=0)
    near = small(tmp_path, upper_cutoff=1.0).negative_probabilities(distances, negative)[0]
    torch.testing.assert_close(near[1:3], wanted[1:3] / wanted[1:3].sum(), rtol=1e-6, atol=0)
    assert not near[3:].any()
    out_of_reach = small(tmp_path, upper_cutoff=0.3).negative_probabilities(distances, negative)[0]
    torch.testing.assert_close(out_of_reach, wanted, rtol=1e-6, atol=0)


def test_anchors_have_positives_of_their_labels_and_negatives_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = drawn(small(tmp_path), LABELS, monkeypatch)
    assert len(sides) == 3
    for triplets in sides:
        anchors, positives, negatives = triplets.T
        assert anchors.tolist() == [0, 1, 2, 3, 4, 5, 7]
        assert ((LABELS[anchors] * LABELS[positives]).sum(1) > 0).all() and (anchors != positives).all()
        assert ((LABELS[anchors] * LABELS[negatives]).sum(1) == 0).all()


def test_own_pairs_and_texts_as_anchors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = torch.eye(3)  # an item's only similar one is itself
    sides = drawn(small(tmp_path, own_pair=True, symmetric=True), labels, monkeypatch)
    assert [len(triplets) for triplets in sides] == [0, 0, 3, 3]
    assert all(torch.equal(triplets[:, 0], triplets[:, 1]) for triplets in sides[2:])
    assert [len(triplets) for triplets in drawn(small(tmp_path), labels, monkeypatch)] == [0, 0, 0]


def test_a_batch_without_an_anchor_costs_nothing_and_keeps_the_graph(tmp_path: Path) -> None:
    model = small(tmp_path)
    image = wave(0.2, 6, 4).requires_grad_()
    loss = model.objective(image, wave(0.9, 6, 4), torch.ones(6, 3)).loss
    torch.autograd.backward(loss)
    assert loss.item() == 0 and image.grad is not None and not image.grad.any()
    assert model.boundaries.grad is not None and not model.boundaries.grad.any()


def test_equal_codes_have_a_finite_gradient() -> None:
    codes = torch.ones(3, 4).requires_grad_()
    distances = torch.cdist(codes, codes, compute_mode="donot_use_mm_for_euclid_dist")
    loss = boundary_loss(distances, torch.tensor([[0, 1, 2]]), torch.ones(3), margin=1.5)
    torch.autograd.backward(loss)
    assert loss.item() == pytest.approx(0.5 + 2.5) and codes.grad is not None and codes.grad.isfinite().all()


def test_the_rows_of_the_release_favour_those_just_beyond_two(tmp_path: Path) -> None:
    """What its weights come to: the negative whose row distance is the smallest above 2 is drawn almost surely."""
    codes = torch.nn.functional.normalize(wave(0.3, 40, 4))
    distances = torch.cdist(codes, codes)
    negative = multi_hot(40, 5) @ multi_hot(40, 5).T == 0
    rows = torch.cdist(distances, distances)
    probabilities = small(tmp_path, sampling="reference_rows").negative_probabilities(distances, negative)
    beyond = rows.masked_fill(~negative | (rows <= 2), torch.inf)
    found = beyond.isfinite().any(1)
    assert found.sum() > 10
    assert torch.equal(probabilities[found].argmax(1), beyond[found].argmin(1))
