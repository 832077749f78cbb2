"""DPBE: worked values of loss and curvature, triplets by hand, draws that hang on the seed alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.blocks.posterior import PosteriorHead, head_curvature, outputs_of, to_sphere
from models.dpbe import DPBE, drawn_balance
from tests.tiny_models import build, rows_of
from tests.worked import multi_hot, wave

DOUBLE = torch.float64


def head(weight: float, bias: float) -> PosteriorHead:
    """A head of three features and four bits, by formula; its draws are its means."""
    made = PosteriorHead(3, 4, curvature=100, samples=0, seed=0).double()
    made.fc.weight.data, made.fc.bias.data = wave(weight, 4, 3, DOUBLE), wave(bias, 1, 4, DOUBLE)[0]
    return made


def worked(tmp_path: Path, **overrides: Any) -> tuple[DPBE, Tensor, Tensor, Tensor]:
    """DPBE with heads by formula and draws of 0, and features and labels."""
    model = build("DPBE", str(tmp_path), bits=4, **overrides)
    assert isinstance(model, DPBE)
    model.image_head, model.text_head, model.rows = head(1.0, 2.0), head(1.5, 2.5), 100
    none = torch.zeros(model.config.train_samples, 16, dtype=DOUBLE)
    model.draw = lambda: (none, none)  # type: ignore[method-assign]
    image, text = (wave(start, 6, 3, DOUBLE).requires_grad_() for start in (0.2, 0.9))
    return model, image, text, multi_hot(6, 5).double()


@pytest.mark.parametrize("average", [False, True])
def test_worked_loss(average: bool, tmp_path: Path) -> None:
    """All draws are alike, so the mean over them is five times the last one's fifth."""
    model, image, text, labels = worked(tmp_path, average_samples=average)
    out = model.probabilistic_objective(image, text, labels)
    assert [term.item() for term in out.terms.values()] == pytest.approx(
        (0.2870977043, 0.4323100263, 0.3687778026), abs=1e-9
    )
    assert out.loss.item() == pytest.approx(0.2176371066 * (5 if average else 1), abs=1e-9)
    out.loss.backward()
    tensors = (image, text, model.image_head.fc.weight, model.image_head.fc.bias)
    norms = [float(x.grad.norm()) / (5 if average else 1) for x in tensors if x.grad is not None]
    assert norms == pytest.approx((0.0816236010, 0.0784104922, 0.0747879924, 0.0763970401), abs=1e-9)


def test_worked_curvature(tmp_path: Path) -> None:
    model, image, _, labels = worked(tmp_path, train_samples=1)
    drawn = model.image_head
    assert isinstance(drawn, PosteriorHead)
    with torch.no_grad():
        outputs = outputs_of(image, *drawn.drawn(torch.zeros(1, 16, dtype=DOUBLE)))
        mean = head_curvature(image, outputs, torch.full((6,), 1 / 6, dtype=DOUBLE))[0]
        assert float(mean.sum()) == pytest.approx(2.6813063739, abs=1e-9)
        assert mean[:3].tolist() == pytest.approx((0.0402920564, 0.2908859607, 0.0569249370), abs=1e-9)
        assert mean[12:14].tolist() == pytest.approx((0.3317649918, 0.3328756664), abs=1e-9)
        counts = labels @ labels.T
        balance = drawn_balance(counts > 0, counts != 1, 5000).double()
        contrast = head_curvature(image, outputs, balance)[0]
        assert float(contrast.sum()) == pytest.approx(-91.4470645149, abs=1e-8)
        assert contrast[:3].tolist() == pytest.approx((-0.2057814007, -14.5685707575, -0.4934985945), abs=1e-8)
        model.update_hessian(drawn, image, outputs, counts)
        assert float(drawn.hessian.sum()) == pytest.approx(2060.6942023896, rel=1e-6)
        deviations = drawn.drawn(torch.ones(1, 16, dtype=DOUBLE))[0][0] - drawn.fc.weight
        assert deviations[0, :2].tolist() == pytest.approx((0.0962933093, 0.0813646281), abs=1e-7)


@pytest.mark.parametrize(("strict", "triplets"), [(False, 15), (True, 0)])
def test_items_that_share_two_labels_count_as_dissimilar_as_released(
    strict: bool, triplets: int, tmp_path: Path
) -> None:
    """The Hessian shows how many triplets there were; without any it stays."""
    model, image, _, _ = worked(tmp_path, strict_triplets=strict, train_samples=1, max_pairs=10**6)
    drawn, labels = model.image_head, torch.tensor([[1, 1, 0], [1, 1, 0], [0, 1, 1]], dtype=DOUBLE)
    assert isinstance(drawn, PosteriorHead)
    before, features = drawn.hessian.clone(), image[:3].detach()
    outputs = outputs_of(features, *drawn.drawn(torch.zeros(1, 16, dtype=DOUBLE))).detach()
    model.update_hessian(drawn, features, outputs, labels @ labels.T)
    if triplets:
        added = head_curvature(features, outputs, torch.full((3,), 1 / 3, dtype=DOUBLE))[0] * 100**2 / triplets
        torch.testing.assert_close(drawn.hessian, 0.999 * before + added)
    else:
        assert torch.equal(drawn.hessian, before)


def test_some_triplets_are_drawn(tmp_path: Path) -> None:
    counts = multi_hot(6, 5) @ multi_hot(6, 5).T
    torch.manual_seed(3)
    balance = drawn_balance(counts > 0, counts != 1, 7)
    assert balance.sum() == 0 and balance.abs().sum() <= 14


def test_codes_hang_on_the_seed_alone(tmp_path: Path) -> None:
    codes = []
    for seed, state in ((1, 5), (1, 6), (2, 5)):
        model = build("DPBE", str(tmp_path), eval_seed=seed, bits=64).eval()
        with torch.no_grad():
            for name in ("image_head", "text_head"):
                getattr(model, name).hessian.fill_(0.0)  # draws far apart
        torch.manual_seed(state)
        codes.append(model.encode_image(rows_of()))
        assert model.marks == (f"codes are means over 5 heads that were drawn with the seed {seed}",)
    assert torch.equal(codes[0], codes[1]) and not torch.equal(codes[0], codes[2])
    means = build("DPBE", str(tmp_path), eval_samples=0, bits=64).eval()
    assert isinstance(means, DPBE) and means.marks == ()
    features = means.backbone.image_features(rows_of()["image"])
    assert torch.equal(means.encode_image(rows_of()) > 0, to_sphere(means.image_head.fc(features)) >= 0)
