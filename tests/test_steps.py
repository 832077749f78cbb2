"""What comes after a training step's loss: the order of passes and updates, and a log that is read late."""

import torch
from torch.nn import Parameter

from common.types import Stage, StepOutput
from runners.steps import StepLog, updates


def test_stages_see_what_came_before_and_update_their_own() -> None:
    a, b, unused = (Parameter(torch.tensor(value)) for value in (1.0, 2.0, 3.0))
    optimizers = {name: torch.optim.SGD([p], lr=0.5) for name, p in (("a", a), ("b", b), ("unused", unused))}
    stages = (
        Stage("product", ("b",), lambda: a * b),
        Stage("nothing", ("a",), lambda: torch.tensor(7.0)),
        Stage("square", ("a",), lambda: a**2),
    )
    passes = []
    for name, loss in updates(StepOutput(a + 2 * b, {}, stages), optimizers):
        passes.append((name, loss.item(), [p.grad.item() if p.grad is not None else None for p in (a, b, unused)]))
    assert passes == [
        ("loss", 5.0, [1.0, 2.0, None]),
        ("product", 0.5, [1 + 1.0, 0.5, None]),  # a = 0.5, b = 1: the loss's update comes first; a's gradient piles up
        ("nothing", 7.0, [None, 0.5, None]),
        ("square", 0.25, [1.0, 0.5, None]),
    ]
    assert (a.item(), b.item(), unused.item()) == (0.0, 0.75, 3.0)


def test_values_are_read_together_in_order() -> None:
    log = StepLog(2)
    log.add(4, {"loss": torch.tensor(4.0, requires_grad=True)})
    assert not log.is_due
    log.add(5, {"loss": torch.tensor(5.0), "extra": torch.tensor(0.5)})
    assert log.is_due
    assert log.read() == [(4, {"loss": 4.0}), (5, {"loss": 5.0, "extra": 0.5})]
    assert not log.is_due and log.read() == []
