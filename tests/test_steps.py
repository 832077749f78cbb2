"""What comes after a training step's loss: the order of passes and updates, and a log that is read late."""

from typing import Any, cast

import pytest
import torch
from torch.nn import Parameter

from common.errors import UserError
from common.types import Stage, StepOutput
from runners.steps import StepLog, updates


def test_stages_see_what_came_before_and_update_their_own() -> None:
    a, b, unused = (Parameter(torch.tensor(value)) for value in (1.0, 2.0, 3.0))
    optimizers = {name: torch.optim.SGD([p], lr=0.5) for name, p in (("a", a), ("b", b), ("unused", unused))}
    stages = (
        Stage("product", ("b",), lambda: StepOutput(a * b)),
        Stage("nothing", ("a",), lambda: StepOutput(torch.tensor(7.0))),
        Stage("square", ("a",), lambda: StepOutput(a**2)),
    )
    passes = []
    for name, done in updates(StepOutput(a + 2 * b, {}, stages), optimizers):
        passes.append((name, done.loss.item(), [p.grad.item() if p.grad is not None else None for p in (a, b, unused)]))
    assert passes == [
        ("loss", 5.0, [1.0, 2.0, None]),
        ("product", 0.5, [1.0, 0.5, None]),  # a = 0.5, b = 1: the loss's update comes first
        ("nothing", 7.0, [1.0, 0.5, None]),
        ("square", 0.25, [1.0, 0.5, None]),
    ]
    assert (a.item(), b.item(), unused.item()) == (0.0, 0.75, 3.0)


def test_values_are_read_together_in_order() -> None:
    log = StepLog(2)
    log.add(4, [("loss", StepOutput(torch.tensor(4.0, requires_grad=True)))])
    assert not log.is_due
    other = StepOutput(torch.tensor(2.0), {"term": torch.tensor(0.5)})
    log.add(5, [("loss", StepOutput(torch.tensor(5.0))), ("other", other)])
    assert log.is_due
    assert log.read() == [(4, {"loss": 4.0}), (5, {"loss": 5.0, "other": 2.0, "term": 0.5})]
    assert not log.is_due and log.read() == []


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (torch.tensor(1.0), "the loss of a training step is a Tensor; return StepOutput"),
        (StepOutput(torch.ones(2, requires_grad=True)), r"loss of a training step is of the shape \[2\]"),
        (
            StepOutput(torch.ones((), requires_grad=True), {"balance": torch.ones(2, 1)}),
            r"balance of .* of the shape \[2, 1\]",
        ),
        (StepOutput(torch.ones(())), "depends on no trainable parameter"),
        (StepOutput(torch.ones((), dtype=torch.complex64)), "loss of a training step is complex"),
        (StepOutput(torch.ones(()), cast(Any, [torch.ones(())])), "terms beside the loss of .* are no dict"),
        (StepOutput(torch.ones(()), {}, cast(Any, [abs])), "stages beside the loss of .* are no Stages"),
    ],
)
def test_what_is_no_loss_is_named(output: StepOutput, said: str) -> None:
    with pytest.raises(UserError, match=said):
        next(updates(output, {}))


def test_what_is_kept_of_an_earlier_step_must_be_detached() -> None:
    weight = Parameter(torch.ones(3))
    optimizers = {"main": torch.optim.SGD([weight], lr=0.1)}
    kept = weight.square()
    assert [name for name, _ in updates(StepOutput(kept.sum()), optimizers)] == ["loss"]
    with pytest.raises(UserError, match=r"depends on an earlier step's graph; detach\(\)"):
        next(updates(StepOutput((kept * weight).sum()), optimizers))


def test_a_loss_of_one_row_counts_and_no_value_of_the_log_hides_another() -> None:
    log = StepLog(1)
    row = StepOutput(torch.ones(1), {"term": torch.tensor(2.0), "loss": torch.tensor(5.0)})
    log.add(0, [("loss", row)])
    assert log.read() == [(0, {"loss": 1.0, "term": 2.0})]
    with pytest.raises(UserError, match="two passes of a training step have values called loss, term"):
        log.add(1, [("loss", row), ("other", row)])
