"""DPSIH: its loss by loops, its instances and what each setting of them changes."""

import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.dpsih import DPSIH, best_pairs, instance_likeness, triplet_loss
from tests.tiny_models import LENGTH, ROWS, build, rows_of
from tests.worked import multi_hot, wave

DOUBLE = torch.float64


def sets(start: float, rows: int, instances: int, bits: int) -> Tensor:
    """Vectors by formula, [rows, instances, bits] float64."""
    return wave(start, rows * instances, bits, DOUBLE).view(rows, instances, bits)


def dpsih(folder: Path, **overrides: object) -> DPSIH:
    model = build("DPSIH", str(folder), **overrides).eval()
    assert isinstance(model, DPSIH)
    return model


def triplets_by_loops(similarity: list[list[float]], labels: list[set[int]], margin: float) -> float:
    costs = [
        similarity[i][m] - similarity[i][p] + margin
        for i, p, m in itertools.product(range(len(labels)), repeat=3)
        if p != i and labels[i] & labels[p] and not labels[i] & labels[m]
    ]
    counted = [cost for cost in costs if cost >= 0]
    return sum(counted) / len(counted)


def likeness_by_loops(residuals: Tensor) -> float:
    total = 0.0
    for rows in residuals:
        pairs = itertools.permutations(rows, 2)
        total += float(sum(F.cosine_similarity(a, b, dim=0) ** 2 for a, b in pairs)) ** 0.5 / len(rows) ** 2
    return total


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_loss_is_that_of_loops(reduction: str, tmp_path: Path) -> None:
    rows, instances, bits = 6, 3, 5
    model = dpsih(tmp_path, bits=bits, instances=instances, auxiliary_reduction=reduction)
    image, text = (F.normalize(sets(start, rows, instances, bits), dim=-1).requires_grad_() for start in (0.2, 0.9))
    residuals = sets(0.4, rows, instances, bits).sigmoid(), sets(1.7, rows, instances, bits).sigmoid()
    labels = multi_hot(rows, 5)
    labels[2] = 0  # never an anchor, always a negative
    out = model.objective_of(image, text, residuals, labels)
    named = [set(row.nonzero().flatten().tolist()) for row in labels]
    wanted = [
        triplets_by_loops([[float((p @ q.T).max()) for q in b] for p in a], named, 0.25)
        for a, b in ((image, image), (text, text), (image, text))
    ]
    kernels = [
        sum(sign * float((-0.5 * (p - q).norm()).exp()) for p in a.flatten(0, 1) for q in b.flatten(0, 1))
        for a, b, sign in ((image, image, 1), (image, text, -2), (text, text, 1))
    ]
    shares = (1, 1) if reduction == "sum" else ((rows * instances) ** 2, rows)
    wanted += [
        sum(kernels) / shares[0],
        (likeness_by_loops(residuals[0]) + likeness_by_loops(residuals[1])) / shares[1],
    ]
    assert [term.item() for term in out.terms.values()] == pytest.approx(wanted, abs=1e-9)
    assert out.loss.item() == pytest.approx(100 * sum(wanted[:3]) + 0.01 * sum(wanted[3:]), abs=1e-9)


def test_only_the_first_best_pair_gets_a_gradient() -> None:
    a = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]], requires_grad=True)
    b = torch.tensor([[[0.0, 1.0], [1.0, 0.0], [0.6, 0.8]]])
    similarity = best_pairs(a, b)
    assert similarity.tolist() == [[1.0]]
    similarity.sum().backward()
    assert a.grad is not None and a.grad.tolist() == [[[1.0, 0.0], [0.0, 0.0]]]  # with the second of b


def test_triplets_on_their_margin_count_and_the_own_partner_is_no_positive() -> None:
    similar = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]]) > 0
    similarity = torch.tensor([[-1.0, 0.5, 0.25], [1.0, -1.0, 0.75], [0.0, 0.0, -1.0]])
    assert triplet_loss(similarity, similar, 0.25).item() == 0.0  # 0.25 - 0.5 + 0.25 and 0.75 - 1 + 0.25
    assert triplet_loss(similarity, similar, 0.5).item() == 0.25
    similarity[0, 2] = 1.0  # 0.75 and 0: the mean is over both
    assert triplet_loss(similarity, similar, 0.25).item() == 0.375
    assert triplet_loss(similarity, torch.eye(3) > 0, 0.25).item() == 0.0


def test_residuals_that_dropout_silenced_have_finite_gradients() -> None:
    residuals = torch.zeros(2, 3, 4, requires_grad=True)
    instance_likeness(residuals).backward()
    assert residuals.grad is not None and residuals.grad.isfinite().all()


def test_padding_has_a_say_unless_it_is_masked(tmp_path: Path) -> None:
    ids = rows_of()["text"]
    longer = F.pad(ids, (0, 4))
    found = {}
    for masked in (False, True):
        model = dpsih(tmp_path, mask_padding=masked)
        with torch.no_grad():
            found[masked] = [model.text_parts(each)[1] for each in (ids, longer)]
    assert (found[False][0] - found[False][1]).abs().max() > 1e-5
    torch.testing.assert_close(*found[True])
    assert (found[True][0] - found[False][0]).abs().max() > 1e-5
    tokens = torch.ones(ROWS, LENGTH, 64)
    weights = dpsih(tmp_path).text_instances.attention(tokens, ids == 0)
    assert torch.equal(weights == 0, (ids == 0)[:, :, None].expand_as(weights))
    torch.testing.assert_close(weights.sum(1), torch.ones(ROWS, 4))


def test_patches_are_normalised_once_or_twice(tmp_path: Path) -> None:
    image = rows_of()["image"]
    tokens = {}
    for norm in ("twice", "once"):
        model = dpsih(tmp_path, patch_norm=norm)
        with torch.no_grad():
            model.backbone.visual.ln_post.weight.mul_(2.0).add_(torch.linspace(0, 1, 64))
            tokens[norm] = model.image_tokens(image)[1]
            again = model.backbone.visual.ln_post(tokens["once"]) if norm == "once" else None
    assert again is not None
    torch.testing.assert_close(again, tokens["twice"])
    assert (tokens["once"] - tokens["twice"]).abs().max() > 0.1


def test_one_instance_has_no_axis_and_no_terms_of_its_own(tmp_path: Path) -> None:
    one, four = dpsih(tmp_path, instances=1), dpsih(tmp_path)
    assert (one.code_shape, four.code_shape) == ((16,), (4, 16))
    with torch.no_grad():
        assert one.encode_text(rows_of()).shape == (ROWS, 16)
        image, text = (F.normalize(sets(start, 4, 1, 16), dim=-1) for start in (0.1, 0.6))
        out = one.objective_of(image, text, (image, text), multi_hot(4, 5))
    assert out.terms["discrepancy"] == out.terms["diversity"] == 0


def test_an_instance_of_equal_values_is_a_vector_of_zeros(tmp_path: Path) -> None:
    head = dpsih(tmp_path).image_instances
    assert torch.equal(head(torch.zeros(1, 16), torch.full((1, 4, 16), 0.5)), torch.zeros(1, 4, 16))
