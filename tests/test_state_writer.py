"""States are written as they were when asked for, one after the other, and no failure stays unsaid."""

import logging
import threading
from typing import Any

import pytest
import torch

from common.errors import UserError
from common.state_writer import StateWriter


def test_what_is_written_is_the_state_at_the_call() -> None:
    weight, moment = torch.zeros(3, 2).T, torch.zeros((), dtype=torch.float64)
    go, written = threading.Event(), []

    def write(model: dict[str, Any], optimizer: dict[str, Any]) -> None:
        assert go.wait(10)
        written.append((model["w"].clone(), optimizer["state"][0]["m"].item(), optimizer["lr"]))

    with StateWriter() as writer:
        for step in range(3):
            writer.begin(write, {"w": weight}, {"state": [{"m": moment}], "lr": step})
            weight += 1  # the next step, before anything is written
            moment += 1
            go.set()
    assert [(model.unique().tolist(), m, lr) for model, m, lr in written] == [([k], k, k) for k in (0, 1, 2)]
    assert all(model.shape == (2, 3) for model, _, _ in written)


def test_tensors_that_grow_are_copied_whole() -> None:
    written = []
    with StateWriter() as writer:
        for size in (2, 5, 1):
            writer.begin(lambda state: written.append(state["w"].tolist()), {"w": torch.ones(size)})
    assert written == [[1.0] * 2, [1.0] * 5, [1.0]]


def failing(state: dict[str, Any]) -> None:
    raise UserError("no room")


def test_a_failure_is_raised_by_the_next_state_and_at_the_end() -> None:
    with pytest.raises(UserError, match="no room"), StateWriter() as writer:
        writer.begin(failing, {})
        writer.begin(lambda state: pytest.fail("written after a failure"), {})
    with pytest.raises(UserError, match="no room"), StateWriter() as writer:
        writer.begin(failing, {})


def test_a_failure_does_not_hide_what_ended_the_run(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR), pytest.raises(KeyError), StateWriter() as writer:
        writer.begin(failing, {})
        raise KeyError
    assert "no room" in caplog.text
