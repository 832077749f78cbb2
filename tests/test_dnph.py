"""DNPH: worked values of loss and assignment, random targets, imports."""

from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.checkpoint import Checkpoint
from common.errors import UserError
from common.registry import MODELS, Registry
from common.types import Progress
from models.blocks.proxies import ClassProxies
from models.dnph import DNPH, agreement, assign_targets, proxy_loss
from runners.setup import load_weights
from tests.tiny_models import CLASSES, SHAPE, build, rows_of
from tests.worked import multi_hot, wave

START = Progress(epoch=0, epochs=1, step=0, steps_per_epoch=1)
DOUBLE = torch.float64


def signs(rows: list[str]) -> Tensor:
    """Codes written as + and -, [rows, K] float64."""
    return torch.tensor([[1.0 if sign == "+" else -1.0 for sign in row] for row in rows], dtype=DOUBLE)


TARGETS = signs(["+--+", "--++", "--++", "-++-", "-++-", "++--"])
ASSIGNED = {
    "image": signs(["-++-", "++--", "-++-", "+--+", "--++", "--++"]),
    "text": signs(["-++-", "++--", "+--+", "--++", "--++", "-++-"]),
}


def worked_codes() -> tuple[Tensor, Tensor]:
    """Relaxed codes of both modalities, [6, 4] float64."""
    image, text = (torch.tanh(1.5 * wave(start, 6, 4, DOUBLE)).requires_grad_() for start in (0.2, 0.9))
    return image, text


def small(tmp_path: Path, **overrides: Any) -> DNPH:
    """DNPH on the tiny CLIP."""
    model = build("DNPH", str(tmp_path), **overrides)
    assert isinstance(model, DNPH)
    return model


def worked_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **overrides: Any) -> DNPH:
    """DNPH with 4 bits, and with the proxies and targets of the worked values, in float64."""
    model = small(tmp_path, bits=4, **overrides).double()
    model.proxies.vectors.data = wave(2, 5, 4, DOUBLE)
    monkeypatch.setattr(model, "draw_targets", lambda rows: TARGETS[:rows])
    return model


def test_worked_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = worked_model(tmp_path, monkeypatch, train_proxies=True)
    codes = worked_codes()
    logits = wave(0.4, 6, 5, DOUBLE).requires_grad_(), wave(0.6, 6, 5, DOUBLE).requires_grad_()
    out = model.joint_objective(codes, logits, multi_hot(6, 5))
    wanted = {
        "proxy": 6.2434506639,
        "classification_image": 1.9712577420,
        "classification_text": 1.9518917062,
        "uniformity_image": 1.8516916689,
        "uniformity_text": 2.1518018310,
    }
    assert {name: float(term) for name, term in out.terms.items()} == pytest.approx(wanted, abs=1e-9)
    assert out.loss.item() == pytest.approx(9.7662507621, abs=1e-9)
    torch.autograd.backward(out.loss)
    norms = [float(x.grad.norm()) for x in (*codes, *logits, model.proxies.vectors) if x.grad is not None]
    wanted_norms = (0.2659696272, 0.2529729273, 0.3926301213, 0.3905502854, 0.4836914317)
    assert norms == pytest.approx(wanted_norms, abs=1e-8)


def test_worked_assignment() -> None:
    for codes, wanted in zip(worked_codes(), ASSIGNED.values(), strict=True):
        assigned = assign_targets(codes, TARGETS)
        assert torch.equal(assigned, wanted) and not assigned.requires_grad


def test_assignment_is_the_cheapest_of_all() -> None:
    draw = torch.Generator().manual_seed(5)
    for _ in range(10):
        codes = torch.rand(5, 7, generator=draw) * 2 - 1
        targets = torch.randint(2, (5, 7), generator=draw).float() * 2 - 1

        def cost(order: list[int], codes: Tensor = codes, targets: Tensor = targets) -> float:
            return float((codes.double() - targets[order].double()).norm(dim=-1).sum())

        cheapest = min(permutations(range(5)), key=lambda order: cost(list(order)))
        found = assign_targets(codes, targets)
        assert float((codes.double() - found.double()).norm(dim=-1).sum()) == pytest.approx(cost(list(cheapest)))
        assert sorted(map(tuple, found.tolist())) == sorted(map(tuple, targets.tolist()))  # every target once


def test_agreement_is_largest_for_equal_codes() -> None:
    codes = signs(["+-+", "--+"])
    assert float(agreement(codes, codes)) == 3 and float(agreement(codes, -codes)) == -3


def test_targets_are_signs_drawn_anew_from_the_global_generator(tmp_path: Path) -> None:
    model = small(tmp_path)
    torch.manual_seed(3)
    first, second = model.draw_targets(200), model.draw_targets(200)
    torch.manual_seed(3)
    assert torch.equal(model.draw_targets(200), first) and not torch.equal(first, second)
    assert first.shape == (200, 16) and torch.equal(first.abs(), torch.ones_like(first))
    assert abs(float(first.double().mean())) < 0.05


def test_proxy_loss_by_hand() -> None:
    cosines = torch.tensor([[1.0, 0.0, -1.0], [0.5, 0.5, 0.5]])
    positive = torch.tensor([[True, False, False], [True, True, False]])
    first = -(-torch.tensor([0.0 + 1, 2, 4])).log_softmax(0)[0]
    second = -(-torch.tensor([1.0 + 1, 1 + 1, 1])).log_softmax(0)[:2].sum()
    assert float(proxy_loss(cosines, positive, 1.0)) == pytest.approx(float((first + second) / 2))


@pytest.mark.parametrize("kind", ["no positive label", "all positive", "one label each"])
def test_edges_of_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    model = worked_model(tmp_path, monkeypatch)
    labels, first = {
        "no positive label": (torch.zeros(6, 5), [0] * 6),
        "all positive": (torch.ones(6, 5), [0] * 6),
        "one label each": (torch.eye(5)[[3, 1, 4, 0, 2, 2]], [3, 1, 4, 0, 2, 2]),
    }[kind]
    codes, logits = worked_codes(), wave(0.4, 6, 5, DOUBLE)
    out = model.joint_objective(codes, (logits, logits), labels)
    torch.autograd.backward(out.loss)
    assert out.loss.isfinite() and all(x.grad is not None and x.grad.isfinite().all() for x in codes)
    assert out.terms["classification_image"].item() == pytest.approx(
        float(F.cross_entropy(logits, torch.tensor(first)))
    )
    assert (out.terms["proxy"].item() == 0) == (kind == "no positive label")


def test_classifiers_learn_the_first_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = worked_model(tmp_path, monkeypatch)
    logits = wave(0.4, 6, 5, DOUBLE)
    first = torch.tensor([0, 1, 2, 3, 1, 0])
    for kind in (torch.uint8, torch.bool, torch.float32):
        out = model.joint_objective(worked_codes(), (logits, logits), multi_hot(6, 5).to(kind))
        wanted = float(F.cross_entropy(logits, first))
        assert out.terms["classification_text"].item() == pytest.approx(wanted)
        assert out.terms["proxy"].item() == pytest.approx(6.2434506639, abs=1e-9)  # no type of labels wraps around


def test_codes_that_are_not_finite_give_such_a_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = worked_model(tmp_path, monkeypatch)
    logits = wave(0.4, 6, 5, DOUBLE)
    codes = torch.full((6, 4), torch.nan, dtype=DOUBLE)
    assert model.joint_objective((codes, codes), (logits, logits), multi_hot(6, 5)).loss.isnan()


def test_fixed_proxies_are_saved_but_not_trained(tmp_path: Path) -> None:
    fixed, trained = small(tmp_path).proxies, small(tmp_path, train_proxies=True).proxies
    assert set(small(tmp_path, train_proxies=True).param_groups()) == {"main", "proxies"}
    assert not fixed.vectors.requires_grad and trained.vectors.requires_grad
    assert torch.equal(fixed.vectors, trained.vectors)
    assert "proxies.vectors" in small(tmp_path).state_dict()
    assert 0.05 < float(fixed.vectors.std()) < 0.2


def test_initial_weights(tmp_path: Path) -> None:
    torch_like, fan_out = small(tmp_path), small(tmp_path, initialization="fan_out")
    bound = SHAPE.embed_dim**-0.5
    for linear in (torch_like.image_head.fc, torch_like.text_classifier):
        assert 0.8 * bound < float(linear.weight.abs().max()) <= bound and bool(linear.bias.any())
    for linear, outputs in ((fan_out.text_head.fc, 16), (fan_out.image_classifier, CLASSES)):
        assert 0.8 * (6 / outputs) ** 0.5 < float(linear.weight.abs().max()) <= (6 / outputs) ** 0.5
        assert not linear.bias.any()


@pytest.mark.parametrize("layout", ["authors", "unified", "unified before its backbone was renamed"])
def test_reference_layouts(tmp_path: Path, layout: str) -> None:
    model = small(tmp_path, classifier_outputs=None)
    source = small(tmp_path, classifier_outputs=None if layout == "authors" else 80)  # unified: whatever the data
    torch.nn.init.normal_(source.image_head.fc.weight)
    renamed = {}
    for name, value in source.state_dict().items():
        name = name.replace("_head.", "_hash.").replace("_classifier.", "_pre.fc.")
        if layout == "authors":
            name = name.replace("backbone.", "clip.")
        else:
            name = name if name.startswith(("backbone.", "proxies.")) else f"hash.{name}"
            name = name.replace("proxies.vectors", "loss.proxies")
            name = name if layout == "unified" else name.replace("backbone.", "clip.")
        renamed[name] = value
    if layout == "authors":
        del renamed["proxies.vectors"]  # the authors never save them
    imported = DNPH.import_reference(renamed)
    assert imported.keys() <= source.state_dict().keys()
    load_weights(model, {"": imported}, Checkpoint({}, renamed, path=Path("unified.pth")))
    model.eval(), source.eval()
    with torch.no_grad():
        assert torch.equal(model.encode_image(rows_of()), source.encode_image(rows_of()))
    other = small(tmp_path, bits=32)
    with pytest.raises(UserError, match="does not fit DNPH with 32 bits"):
        load_weights(other, {"": imported}, Checkpoint({}, renamed, path=Path("unified.pth")))


def test_the_name_is_taken_for_the_other_method_too() -> None:
    assert MODELS.get("DNPH") is DNPH
    registry: Registry[type] = Registry("model", "models")
    registry.register("DNPH")(DNPH)
    with pytest.raises(UserError, match="'DNpH' would share the folders of 'DNPH'"):
        registry.register("DNpH")(ClassProxies)
