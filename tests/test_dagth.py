"""DAGtH: worked values of loss and rotation, parts of a batch, and an epoch of the rotation at the end of a run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from common.errors import UserError
from common.types import Progress
from models.blocks.householder import HouseholderRotation, bit_variance
from models.dagth import AdaptiveTriplets, DAGtH, DAGtHConfig, adaptive_triplet_loss
from tests.commands import ROOT, run
from tests.tiny_models import build, rows_of, section
from tests.worked import multi_hot, wave

DOUBLE = torch.float64


def worked(x: Tensor, **overrides: Any) -> AdaptiveTriplets:
    """The loss within one modality, of 6 rows with 5 labels."""
    labels = multi_hot(6, 5).double()
    similar = labels @ labels.T > 0
    config = DAGtHConfig.model_validate(section("DAGtH", **overrides))
    return adaptive_triplet_loss(x, x, similar & ~torch.eye(6, dtype=torch.bool), ~similar, config)


@pytest.mark.parametrize(
    ("settings", "loss", "kept", "threshold", "norm"),
    [
        ({}, 0.9157813215, (19, 0), 0.0, 0.4730765318),
        ({"triplets": "hard"}, 0.9157813215, (19, 0), 0.0, 0.4730765318),
        ({"pair_term": True, "pair_weight": 0.7}, 0.9586675987, (19, 3), 0.5541400265, 0.5897669139),
        ({"distance": "euclidean"}, 0.6398935276, (19, 0), 0.0, 0.3488660722),
        ({"triplets": "semi_hard"}, 0.0, (0, 0), 0.0, 0.0),
    ],
)
def test_worked_losses(
    settings: dict[str, Any], loss: float, kept: tuple[int, int], threshold: float, norm: float
) -> None:
    x = torch.tanh(1.5 * wave(0.2, 6, 4, DOUBLE)).requires_grad_()
    found = worked(x, **settings)
    assert found.loss.item() == pytest.approx(loss, abs=1e-9) and found.margin.item() == 0
    assert (found.triplets.item(), found.pairs.item()) == kept
    assert found.threshold.item() == pytest.approx(threshold, abs=1e-9)
    found.loss.backward()
    assert x.grad is not None and float(x.grad.norm()) == pytest.approx(norm, abs=1e-9)


def test_anchors_in_parts_cost_what_they_cost_together(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for at_once in (1 << 24, 2 * 36):
        monkeypatch.setattr("common.losses._TRIPLETS_AT_ONCE", at_once)
        x = torch.tanh(1.5 * wave(0.2, 6, 4, DOUBLE)).requires_grad_()
        one = worked(x)
        one.loss.backward()
        found.append((one.loss.item(), one.triplets.item(), x.grad))
    assert found[0][:2] == pytest.approx(found[1][:2], abs=1e-12)
    torch.testing.assert_close(found[0][2], found[1][2], rtol=1e-10, atol=1e-14)


def test_worked_rotation() -> None:
    rotation = HouseholderRotation(4).double()
    with torch.no_grad():
        rotation.weights.add_(wave(1.0, 4, 4, DOUBLE), alpha=0.5)
    rows = wave(0.2, 6, 4, DOUBLE)
    rotated = rotation(rows)
    assert rotated[0].tolist() == pytest.approx((-0.2694056797, 0.5506608693, 0.6533005685, 1.0068027594), abs=1e-9)
    torch.testing.assert_close(rotated.norm(dim=1), rows.norm(dim=1))
    loss = bit_variance(rotated)
    loss.backward()
    assert loss.item() == pytest.approx(0.2229498541, abs=1e-9)
    assert rotation.weights.grad is not None
    assert float(rotation.weights.grad.norm()) == pytest.approx(0.0025220039, abs=1e-9)


def test_the_last_epochs_train_the_rotation_alone(tmp_path: Path, tiny_overrides: list[str]) -> None:
    rotation = "{type: SGD, lr: {rotation: 1.0}, momentum: 0.0, weight_decay: 0.0, nesterov: false, schedule: constant}"
    arguments = ["--config-file", str(ROOT / "configs/DAGtH/coco.yaml"), "--save-dir", str(tmp_path), *tiny_overrides,
                 "model.rotation_epochs=1", f"optim.rotation={rotation}", "evaluate.select=last"]  # fmt: skip
    code, out, err = run(*arguments)
    assert code == 0 and "note: a reconstruction" in out, err
    steps = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    terms = ["bit_variance" in step for step in steps if step["event"] == "step"]
    assert terms == [False] * 5 + [True] * 5
    states = [torch.load(path, weights_only=True)["model"] for path in sorted((tmp_path / "checkpoints").glob("*.pt"))]
    assert {name for name in states[0] if not torch.equal(states[0][name], states[1][name])} == {"rotation.weights"}


def test_a_run_needs_epochs_for_the_codes(tmp_path: Path) -> None:
    model = build("DAGtH", str(tmp_path), rotation_epochs=2)
    assert isinstance(model, DAGtH)
    with pytest.raises(UserError, match=r"model\.rotation_epochs is 2, but run\.epochs 2 leaves none"):
        model(rows_of(), Progress(epoch=0, epochs=2, step=0, steps_per_epoch=1))
