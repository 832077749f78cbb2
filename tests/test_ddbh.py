"""DDBH: worked values of the loss, its boundaries by hand."""

from pathlib import Path

import pytest
import torch

from models.ddbh import DDBH, boundaries, boundary_loss, mean_of_highest
from tests.tiny_models import build
from tests.worked import multi_hot, wave

DOUBLE = torch.float64


def test_worked_loss(tmp_path: Path) -> None:
    model = build("DDBH", str(tmp_path), bits=4)
    assert isinstance(model, DDBH)
    image, text = (torch.tanh(1.5 * wave(start, 6, 4, DOUBLE)).requires_grad_() for start in (0.2, 0.9))
    out = model.objective(image, text, multi_hot(6, 5))  # row 1 is similar to all: no anchor
    wanted = (16.2558845968, 14.6829789751, 17.0325578297, 0.6294487425, 0.6984277579)
    assert [term.item() for term in out.terms.values()] == pytest.approx(wanted, abs=1e-9)
    assert out.loss.item() == pytest.approx(48.1042090516, abs=1e-9)
    torch.autograd.backward(out.loss)
    norms = [float(x.grad.norm()) for x in (image, text) if x.grad is not None]
    assert norms == pytest.approx((16.2810630804, 13.8273743736), abs=1e-9)


def test_boundaries_by_hand() -> None:
    products = torch.tensor([[6.0, 2.0, -1.0, 1.0]])
    similar = torch.tensor([[True, True, False, False]])
    above, below = boundaries(products, similar, percentile=0.5, cap=5.0)
    assert above.item() == pytest.approx(4 - (1 - 4 / 5) * (4 - 1))  # means 4 and 0; the highest of the others is 1
    assert below.item() == 0.0
    above, below = boundaries(products, similar, percentile=0.0, cap=3.0)
    assert (above.item(), below.item()) == (3.0, 0.0)  # means held in [0, 3], extremes are the whole sets


def test_extremes_are_a_tenth_and_at_least_one() -> None:
    values = torch.arange(12.0).repeat(3, 1)
    mask = torch.zeros(3, 12, dtype=torch.bool)
    mask[0, :11], mask[1, :10] = True, True
    assert mean_of_highest(values, mask, 0.9).tolist() == [9.5, 9.0, 0.0]  # 11 - floor(9.9) = 2, 10 - floor(9) = 1


def test_pairs_far_on_the_wrong_side_do_not_overflow() -> None:
    codes = torch.tensor([[1.0] * 64, [-1.0] * 64, [1.0] * 64]).requires_grad_()
    loss = boundary_loss(codes, codes, torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]]) > 0, 0.9)
    assert loss.isfinite() and loss.item() > 20
    loss.backward()
    assert codes.grad is not None and codes.grad.isfinite().all()
