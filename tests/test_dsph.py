"""DSPH: worked values of loss, proxies and their optimizer, the table of thresholds, edge cases."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from common.errors import UserError
from common.optimizers.torch_optimizers import SGD
from common.types import Batch, Progress
from common.yaml_layers import read_yaml
from models.blocks.heads import TanhHead
from models.blocks.proxies import ClassProxies
from models.dsph import (
    CODE_DISTANCES,
    DSPH,
    DSPHConfig,
    apart_pairs,
    draw_proxies,
    proxy_loss,
    separation_loss,
    table_threshold,
)
from tests.tiny_models import CLASSES, build, rows_of, section
from tests.worked import multi_hot, wave

START = Progress(epoch=0, epochs=1, step=0, steps_per_epoch=1)
DOUBLE = torch.float64


def worked_codes() -> tuple[Tensor, Tensor, Tensor]:
    """Relaxed codes of both modalities, [6, 4] float64, and labels [6, 5]."""
    image, text = (torch.tanh(1.5 * wave(start, 6, 4, DOUBLE)).requires_grad_() for start in (0.2, 0.9))
    return image, text, multi_hot(6, 5)


def small(tmp_path: Path, **overrides: Any) -> DSPH:
    """DSPH on the tiny CLIP."""
    model = build("DSPH", str(tmp_path), **overrides)
    assert isinstance(model, DSPH)
    return model


def worked_model(tmp_path: Path, **overrides: Any) -> DSPH:
    """DSPH with 4 bits and the proxies of the worked values, in float64."""
    model = small(tmp_path, bits=4, **overrides).double()
    model.proxies.vectors.data = wave(2, 5, 4, DOUBLE)
    return model


@pytest.mark.parametrize(
    ("threshold", "weight", "total", "norms"),
    [
        (0.0, 0.8, 3.7602272741, (0.331857, 0.398086, 0.237722)),
        (0.0, 0.0, 3.1489864034, (0.146828, 0.185651, 0.237722)),
        (0.125, 0.8, 3.5028263611, (0.331857, 0.388772, 0.214588)),
        (0.125, 0.0, 3.0165854904, (0.146828, 0.164734, 0.214588)),
        (0.25, 0.8, 3.2462474137, (0.331857, 0.388772, 0.214588)),
        (0.25, 0.0, 2.8850065430, (0.146828, 0.164734, 0.214588)),
    ],
)
def test_worked_loss(
    tmp_path: Path, threshold: float, weight: float, total: float, norms: tuple[float, float, float]
) -> None:
    model = worked_model(tmp_path, threshold=threshold, separation_weight=weight)
    image, text, labels = worked_codes()
    out = model.objective(image, text, labels)
    assert out.loss.item() == pytest.approx(total, abs=1e-9)
    torch.autograd.backward(out.loss)
    gradients = [x.grad for x in (image, text, model.proxies.vectors)]
    assert [float(g.norm()) for g in gradients if g is not None] == pytest.approx(norms, abs=1e-6)


def test_worked_parts() -> None:
    image, _, labels = worked_codes()
    cosines = ClassProxies(wave(2, 5, 4, DOUBLE), trained=True)(image)
    assert proxy_loss(cosines, labels > 0, 1.0).item() == pytest.approx(1.2426255938, abs=1e-9)  # nothing is pushed
    assert proxy_loss(cosines, labels > 0, 0.125).item() == pytest.approx(1.2426255938 + 0.3342728492, abs=1e-9)
    apart = apart_pairs(labels)
    assert int(apart.sum()) == 4 and torch.equal(apart, apart.T)
    assert not apart[[2, 3]].any()  # one label each


def test_worked_optimizer_of_the_proxies() -> None:
    path = Path(__file__).parents[1] / "configs" / "DSPH" / "config.yaml"
    config = SGD.Config.model_validate(read_yaml(path.read_text(encoding="utf-8"), str(path))["optim"]["proxies"])
    proxies = torch.nn.Parameter(wave(2, 5, 4, DOUBLE))
    optimizer = SGD.build({"proxies": [proxies]}, config, total_steps=3)
    for start in (0.0, 0.1, 0.2):
        proxies.grad = wave(start, 5, 4, DOUBLE)
        optimizer.step()
    wanted = (0.9014793792, -0.2673577584, -1.0445151536, -0.2914554017)
    assert proxies[0].tolist() == pytest.approx(wanted, abs=1e-9)


def test_worked_start_of_the_proxies_whatever_the_global_generator() -> None:
    state = torch.get_rng_state()
    drawn = draw_proxies(24, 16, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert drawn[0, :4].tolist() == pytest.approx((0.0849286020, 0.2301671505, 0.3649475276, 0.2700533569), abs=1e-7)
    assert drawn[-1, -2:].tolist() == pytest.approx((0.1502183974, -0.0671504587), abs=1e-7)
    assert float(drawn.sum()) == pytest.approx(9.1876502, abs=1e-5)
    assert not torch.equal(drawn, draw_proxies(24, 16, seed=1))


def test_thresholds_of_the_benchmarks() -> None:
    for classes in (21, 24):
        assert [table_threshold(bits, classes) for bits in (16, 32, 64, 128)] == [0, 0, 0, 0]
    assert [table_threshold(bits, 80) for bits in (16, 32, 64, 128)] == [0.25, 0.125, 0, 0]
    assert [table_threshold(bits, 291) for bits in (16, 32, 64, 128)] == [0.5, 0.25, 0.125, 0.0625]
    assert table_threshold(16, 64) == 1 - 2 * 6 / 16 and table_threshold(16, 65) == 0.25  # 2^6 classes need 6 bits
    assert table_threshold(8, 2) == -1  # one bit, repeated


def test_table_keeps_the_bounds_of_coding_theory() -> None:
    for bits, distances in CODE_DISTANCES.items():
        assert distances[0] == bits and distances[1] == 2 * bits // 3
        assert all(small <= large for large, small in pairwise(distances))
        for dimension, distance in enumerate(distances, start=1):
            assert sum(math.ceil(distance / 2**i) for i in range(dimension)) <= bits  # Griesmer
    for (short, few), (long, many) in pairwise(CODE_DISTANCES.items()):
        for small, large in zip(few, many, strict=False):
            assert small <= large <= small + long - short  # a bit more is at most a difference more


@pytest.mark.parametrize(("bits", "classes"), [(17, 5), (16, 1), (16, 1025), (8, 300)])
def test_no_entry_in_the_table_names_the_key(bits: int, classes: int) -> None:
    with pytest.raises(UserError, match=rf"model\.threshold.*{bits} bits and {classes} classes") as error:
        table_threshold(bits, classes)
    assert "\n" not in str(error.value)


def test_threshold_is_the_tables_or_the_given(tmp_path: Path) -> None:
    assert small(tmp_path, threshold=None).threshold == table_threshold(16, CLASSES)
    assert small(tmp_path, bits=17, threshold=0.3).threshold == 0.3
    with pytest.raises(UserError, match=r"model\.threshold"):
        small(tmp_path, bits=17, threshold=None)
    with pytest.raises(ValidationError, match="threshold"):
        DSPHConfig.model_validate(section("DSPH", threshold=1.5))


@pytest.mark.parametrize("kind", ["no row of several labels", "no positive label", "all positive", "all share one"])
def test_means_over_nothing_are_zero(tmp_path: Path, kind: str) -> None:
    model = worked_model(tmp_path, threshold=0.0)
    image, text, _ = worked_codes()
    labels = {
        "no row of several labels": torch.eye(5)[[0, 1, 2, 3, 4, 0]],
        "no positive label": torch.zeros(6, 5),
        "all positive": torch.ones(6, 5),
        "all share one": torch.cat((torch.ones(6, 1), multi_hot(6, 4)), dim=1),
    }[kind]
    out = model.objective(image, text, labels)
    torch.autograd.backward(out.loss)
    assert out.loss.isfinite()
    assert all(out.terms[f"separation_{pair}"].item() == 0 for pair in ("image", "text", "cross"))
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (image, text, model.proxies.vectors))
    cosines = model.proxies(image.detach())
    if kind == "no positive label":
        assert out.terms["proxy_image"].item() == pytest.approx(float(cosines.clamp(min=0).mean()))
    if kind == "all positive":
        assert out.terms["proxy_image"].item() == pytest.approx(float((1 - cosines).mean()))


def test_separation_by_hand() -> None:
    a = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    apart = torch.tensor([[False, True, True], [True, False, False], [True, False, False]])
    wanted = (2 * (0.5**0.5 - 0.25) + 2 * 0) / 4
    assert float(separation_loss(a, a, apart, 0.25)) == pytest.approx(wanted)


def test_loss_does_not_depend_on_the_order_of_rows_or_the_type_of_labels(tmp_path: Path) -> None:
    model = worked_model(tmp_path, threshold=0.0)
    image, text, labels = worked_codes()
    loss = model.objective(image, text, labels).loss.item()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert model.objective(image[order], text[order], labels[order]).loss.item() == pytest.approx(loss, abs=1e-12)
    for kind in (torch.uint8, torch.bool, torch.int64, torch.float64):
        assert model.objective(image, text, labels.to(kind)).loss.item() == loss


@pytest.mark.parametrize("method", ["DSPH", "DNPH", "DNcH", "DDWSH"])
def test_a_class_that_the_model_does_not_know_is_refused(tmp_path: Path, method: str) -> None:
    model = build(method, str(tmp_path))
    for classes in (CLASSES + 1, CLASSES - 1):
        batch = Batch({**rows_of(), "labels": torch.ones(11, classes)})
        with pytest.raises(UserError, match=rf"{classes} classes.*made for {CLASSES}") as error:
            model(batch, START)
        assert "\n" not in str(error.value)


def test_dropout_silences_bits_in_training_only() -> None:
    torch.manual_seed(0)
    head = TanhHead(8, 1000, 0.2, "torch")
    features = torch.randn(4, 8)
    dropped, plain = head(features), head.eval()(features)
    silent = dropped == 0
    assert 0.15 < float(silent.float().mean()) < 0.25 and not bool((plain == 0).any())
    torch.testing.assert_close(dropped[~silent].atanh(), 1.25 * plain[~silent].atanh(), rtol=1e-3, atol=1e-4)
    assert float(head.fc.weight.abs().max()) <= 8**-0.5
