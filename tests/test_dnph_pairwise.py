"""DNpH: its loss by loops, and where nothing or everything is similar."""

import math
from pathlib import Path

import pytest
import torch

from models.dnph_pairwise import DNpH, spherical_information
from tests.tiny_models import build
from tests.worked import multi_hot, wave

DOUBLE = torch.float64


def test_loss_by_loops() -> None:
    a, b, labels = wave(0.2, 6, 4, DOUBLE), wave(0.9, 6, 4, DOUBLE), multi_hot(6, 5)
    related = [[any(x and y for x, y in zip(labels[i], labels[j], strict=True)) for j in range(6)] for i in range(6)]
    share = sum(map(sum, related)) / 36
    wanted = 0.0
    for i in range(6):
        for j in range(6):
            lengths = math.sqrt(sum(x * x for x in a[i].tolist()) * sum(x * x for x in b[j].tolist()))
            closeness = (sum(x * y for x, y in zip(a[i].tolist(), b[j].tolist(), strict=True)) / lengths + 1) / 2
            wanted += (related[i][j] * closeness - 1) ** 2 + closeness**2 * share
    assert spherical_information(a, b, torch.tensor(related).to(DOUBLE)).item() == pytest.approx(wanted, abs=1e-10)


def test_a_batch_without_labels_costs_a_constant_and_a_code_of_zeros_has_a_gradient(tmp_path: Path) -> None:
    model = build("DNpH", str(tmp_path), bits=4)
    assert isinstance(model, DNpH)
    codes = torch.zeros(6, 4).requires_grad_()
    out = model.objective(codes, wave(0.2, 6, 4), torch.zeros(6, 5))
    torch.autograd.backward(out.loss)
    assert out.loss.item() == 3 * 6**2 and codes.grad is not None and not codes.grad.any()
    torch.autograd.backward(model.objective(codes, wave(0.2, 6, 4), multi_hot(6, 5)).loss)
    assert codes.grad.isfinite().all()


def test_one_row_that_is_similar_to_itself(tmp_path: Path) -> None:
    model = build("DNpH", str(tmp_path), bits=4)
    assert isinstance(model, DNpH)
    code = wave(0.2, 1, 4)
    assert model.objective(code, code, torch.ones(1, 5)).loss.item() == pytest.approx(3.0)
