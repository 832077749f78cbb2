"""Steps a second of a run as it is configured, and how much of them is not training.

    python -m benchmarks.loop                                          # MITH on openmoji
    python -m benchmarks.loop --config-file configs/DSPH/config.yaml model.bits=64

Runs the loop of `runners/runner.py` itself, evaluations left out. Forward (the model's training step), backward and the
optimizers' updates are timed one by one; the rest of an epoch is what the loop costs: batches, seeds, log, progress
bar, checkpoints. On a GPU every part waits for the device first, so the times add up, but the run is slower than
without measuring.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.report import machine, print_table, write_results
from common.config import Config, load_config
from common.registry import RUNNERS
from runners.runner import Runner
from utils.output import say


class Clock:
    """Seconds spent in each part since the last `take`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = {}

    def now(self) -> float:
        """The time, when all that the device was asked for is done."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose calls count as `part`."""

        def call(*args: Any, **kwargs: Any) -> Any:
            start = self.now()
            try:
                return function(*args, **kwargs)
            finally:
                self._seconds[part] = self._seconds.get(part, 0.0) + self.now() - start

        return call

    def take(self) -> dict[str, float]:
        """The seconds of every part, which then start at 0."""
        seconds, self._seconds = self._seconds, {}
        return seconds


@contextmanager
def watched(runner: Runner, clock: Clock) -> Iterator[None]:
    """Context in which forward, backward, updates and epochs of a run count on the clock."""
    runner.module.forward = clock.timed("forward", runner.module.forward)
    for optimizer in runner.optimizers.values():
        optimizer.step = clock.timed("update", optimizer.step)  # type: ignore[method-assign]
    with patch.object(torch.Tensor, "backward", clock.timed("backward", torch.Tensor.backward)):
        yield


def measure(config: Config, warmup: int) -> dict[str, Any]:
    """All figures, as they are written; prints the table.

    Args:
        config: The run.
        warmup: Epochs that are not counted.
    """
    runner = RUNNERS.get(config.run.runner)(config)
    runner.setup()
    clock = Clock(runner.device)
    epochs: list[dict[str, float]] = []

    def train_epoch() -> None:
        clock.take()
        begun, start = runner.state.step, clock.now()
        original()
        epochs.append({"seconds": clock.now() - start, "steps": runner.state.step - begun, **clock.take()})

    original, runner.train_epoch = runner.train_epoch, train_epoch
    with (
        watched(runner, clock),
        patch.object(runner, "_evaluation_is_due", lambda: False),
        patch.object(runner, "_finish", lambda: None),
    ):
        runner.run()
    runner.record.close()
    counted = epochs[warmup:]
    steps, seconds = (sum(epoch[key] for epoch in counted) for key in ("steps", "seconds"))
    parts = {part: sum(epoch.get(part, 0.0) for epoch in counted) for part in ("forward", "backward", "update")}
    parts["loop"] = seconds - sum(parts.values())
    table = {part: {"step_s": spent / steps, "share": spent / seconds} for part, spent in parts.items()}
    results = {
        "config": config.tree,
        "machine": machine(runner.device),
        "steps": steps,
        "steps_per_s": steps / seconds,
        "step_median_s": statistics.median(epoch["seconds"] / epoch["steps"] for epoch in counted),
        "parts": table,
    }
    say(
        f"{config.model.name} on {config.dataset.name}, batches of {config.run.batch_size}, {steps} steps: "
        f"{results['steps_per_s']:.2f} steps a second; {results['machine']}"
    )
    print_table(table, [("s a step", "step_s", ".4f"), ("share", "share", ".1%")])
    return results


def main() -> None:
    """Measures, prints a table, and writes the numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", type=Path, default=Path(__file__).parents[1] / "configs/MITH/config.yaml")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--warmup", type=int, default=1, help="epochs of these that are not counted")
    parser.add_argument("--output", type=Path, default=Path("result/benchmarks/loop.json"))
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        overrides = [*args.overrides, f"run.epochs={args.epochs}", "run.patience=null", f"run.save_dir={folder}/run"]
        results = measure(load_config(args.config_file, overrides), args.warmup)
    write_results(args.output, results)


if __name__ == "__main__":
    main()
