"""Runs of methods in small: their command lines, stopping them at a step, and what they leave behind."""

import json
import signal
import subprocess
import time
from pathlib import Path
from unittest import mock

import torch

from common.checkpoint import Checkpoints
from common.registry import MODELS
from runners.runner import Runner
from tests.commands import ROOT, run
from tests.processes import Forked
from tests.tiny_models import small_settings


def config(method: str) -> Path:
    return ROOT / "configs" / MODELS.folder(method) / "coco.yaml"


def arguments(method: str, folder: Path, settings: list[str], *more: str) -> list[str]:
    """A run of a method in small; `settings` and what follows have the last word."""
    return ["--config-file", str(config(method)), "--save-dir", str(folder), *small_settings(method), *settings, *more]


def interrupted_at(
    step: int, number: signal.Signals, *arguments: str | Path, seed: int | None = None
) -> tuple[int, str, str]:
    """Runs the command line in this process, which gets a signal while a run, that of a seed if given, takes a step."""
    save = Runner._save_if_due

    def save_when_asked_to_stop(runner: Runner) -> None:
        if runner.state.step == step and seed in (None, runner.config.run.seed):
            signal.raise_signal(number)
        save(runner)

    with mock.patch.object(Runner, "_save_if_due", save_when_asked_to_stop):
        return run(*arguments)


def final_state(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a run's newest checkpoint."""
    newest = Checkpoints(folder / "checkpoints", keep=1).newest()
    assert newest is not None
    return newest.model


def assert_same_state(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def losses(folder: Path) -> list[float]:
    """The loss of every step that a run has logged."""
    events = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [event["loss"] for event in events if event["event"] == "step"]


def fails_at(step: int, *arguments: str) -> tuple[int, str, str]:
    """Runs the command line in this process with a defect that shows at a step."""
    save = Runner._save_if_due

    def save_or_fail(runner: Runner) -> None:
        if runner.state.step == step:
            raise ZeroDivisionError
        save(runner)

    with mock.patch.object(Runner, "_save_if_due", save_or_fail):
        return run(*arguments)


def names_in(folder: Path) -> set[str]:
    """Everything below a run's folder but TensorBoard's files, whose names hold the time."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if "tensorboard" not in path.parts}


def wait_for_step(folder: Path, step: int, process: "subprocess.Popen[str] | Forked") -> None:
    """Until a run in another process has logged so many events."""
    log = folder / "log.jsonl"
    deadline = time.monotonic() + 120
    while not log.exists() or len(log.read_text().splitlines()) < step:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
