"""A run that was stopped and goes on: the weights of one that never stopped, to the last bit."""

import logging
import multiprocessing
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from common import checkpoint
from common.checkpoint import Checkpoints
from common.config import Config
from common.errors import UserError
from runners.runner import Runner
from tests.commands import finish, run, start
from tests.disks import small_disk_at
from tests.processes import run_processes
from tests.runs import arguments, assert_same_state, final_state, losses, names_in, wait_for_step
from tests.test_equivalence import SCHEDULE, config_of, train
from utils.distributed import is_main
from utils.logging import Record

METHOD = "MITH"  # it has memory banks
OFTEN = ["run.checkpoint_every=2", "run.loader=workers"]
STOP = 8  # in the middle of the second epoch of 5 steps


class StoppedError(Exception):
    """An error that has nothing to do with the run."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_overrides: list[str]) -> Path:
    """A run that never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    train(METHOD, folder, [*tiny_overrides, *SCHEDULE, *OFTEN, "run.workers=0"])
    return folder


def stopped_run(folder: Path, overrides: list[str]) -> None:
    """A run that an exception ends after eight steps."""
    runner = Runner(config_of(METHOD, folder, [*overrides, *SCHEDULE, *OFTEN, "run.workers=2"]))
    runner.setup()
    save = runner._save_if_due

    def save_and_stop() -> None:
        save()
        if runner.state.step == STOP:
            raise StoppedError

    runner._save_if_due = save_and_stop  # type: ignore[method-assign]
    before = set(multiprocessing.active_children())
    with pytest.raises(StoppedError):
        runner.run()
    assert set(multiprocessing.active_children()) <= before  # the loader's processes ended with the run
    assert runner.lock is not None
    runner.lock.release()


def go_on(config: Config) -> dict[str, torch.Tensor]:
    runner = Runner(config)
    runner.setup(resume=True)
    runner.run()
    if is_main():
        assert runner.lock is not None
        runner.lock.release()
    return runner.model.state_dict()


def test_after_an_exception_with_other_workers_and_less_memory(
    whole: Path, tiny_overrides: list[str], tmp_path: Path
) -> None:
    stopped_run(tmp_path, tiny_overrides)
    others = ["run.workers=1", "run.recompute=true"]
    state = go_on(config_of(METHOD, tmp_path, [*tiny_overrides, *SCHEDULE, *OFTEN, *others]))
    assert_same_state(final_state(whole), state)
    assert losses(tmp_path) == losses(whole)


def test_a_damaged_record_keeps_no_run_from_going_on(whole: Path, tiny_overrides: list[str], tmp_path: Path) -> None:
    stopped_run(tmp_path, tiny_overrides)
    log = tmp_path / "log.jsonl"
    log.write_bytes(log.read_bytes() + b'\0\0\0\n\xff\n[1]\n{"step": 1}\n{"step": "a", "event": 3}\n')
    state = go_on(config_of(METHOD, tmp_path, [*tiny_overrides, *SCHEDULE, *OFTEN, "run.workers=0"]))
    assert_same_state(final_state(whole), state)
    assert losses(tmp_path) == losses(whole)


def test_begun_anew_a_run_records_nothing_twice(tmp_path: Path) -> None:
    for _ in range(2):  # the second time after a kill before the first checkpoint
        record = Record(tmp_path, upto=0)
        record.write("untrained", 0, {})
        record.write("step", 1, {})
        record.close()
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2


def test_a_record_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with small_disk_at(tmp_path / "disk", "16k") as disk:
        record = Record(disk, upto=0)
        with pytest.raises(UserError, match=r"log\.jsonl cannot be written: No space left"):
            for step in range(2000):
                record.write("step", step, {"loss": 0.5})
        with pytest.raises(UserError, match=r"log\.jsonl cannot be written: No space left"):
            record.close()  # what was not written is not forgotten either
    (tmp_path / "log.jsonl").mkdir()
    with pytest.raises(UserError, match=r"log\.jsonl cannot be written: Is a directory"):
        Record(tmp_path, upto=0)


def test_a_damaged_newest_checkpoint_is_passed_over(
    whole: Path, tiny_overrides: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stopped_run(tmp_path, tiny_overrides)
    newest = tmp_path / "checkpoints" / f"step-{STOP:08d}.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    with caplog.at_level(logging.WARNING):
        state = go_on(config_of(METHOD, tmp_path, [*tiny_overrides, *SCHEDULE, *OFTEN, "run.workers=0"]))
    assert newest.name in caplog.text and "going back to the one before" in caplog.text
    assert_same_state(final_state(whole), state)
    assert losses(tmp_path) == losses(whole)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda meta, _: meta.pop("state"), "does not say where its run stood"),
        (lambda meta, _: meta["state"].update(step=10**9), "does not say where its run stood"),
        (lambda meta, _: meta["state"].update(step="8"), "does not say where its run stood"),
        (lambda meta, _: meta["state"].update(history=[{"epoch": 1}, 2]), "does not say where its run stood"),
        (
            lambda meta, _: meta["state"].update(history=[{"epoch": 1, "reports": {"16": {}}}]),
            "does not say where its run stood",
        ),
        (lambda meta, _: meta.pop("split"), "was trained on split None"),
        (lambda _, states: states.update(other=states.pop("main")), "optim.main is no state of BertAdam"),
        (lambda _, states: states["main"].pop("state"), "optim.main is no state of BertAdam"),
        (lambda _, states: states["main"]["state"].update({0: 3}), "optim.main is no state of BertAdam"),
        (lambda _, states: states["main"]["param_groups"].pop(), "optim.main is no state of BertAdam"),
        (lambda _, states: states["main"]["param_groups"][0].update(lr="x"), "optim.main is no state of BertAdam"),
        (
            lambda _, states: states["main"]["state"][0].update(v=torch.tensor(np.nan)),
            "main.0.v holds 1 values that are not finite",
        ),
    ],
)
def test_a_checkpoint_that_no_run_can_go_on_from(
    damage: Callable[[dict[str, Any], dict[str, Any]], object],
    expected: str,
    whole: Path,
    tiny_overrides: list[str],
    tmp_path: Path,
) -> None:
    """Whole files whose content is not what a run wrote: refused before the first step."""
    shutil.copytree(whole, tmp_path / "run")
    newest = Checkpoints(tmp_path / "run/checkpoints", keep=2).newest()
    assert newest is not None
    damage(newest.meta, newest.optimizers)
    checkpoint.save(newest.path, newest.meta, newest.model, newest.optimizers)
    runner = Runner(config_of(METHOD, tmp_path / "run", [*tiny_overrides, *SCHEDULE, *OFTEN, "run.workers=0"]))
    with pytest.raises(UserError, match=expected):
        runner.setup(resume=True)
    assert runner.lock is not None
    runner.lock.release()


def test_other_settings_are_refused_with_every_key(tiny_overrides: list[str], tmp_path: Path) -> None:
    stopped_run(tmp_path, tiny_overrides)
    changed = ["run.batch_size=10", "model.top_k=3", "run.workers=0", "run.keep_checkpoints=5"]
    runner = Runner(config_of(METHOD, tmp_path, [*tiny_overrides, *SCHEDULE, *OFTEN, *changed]))
    with pytest.raises(UserError) as error:
        runner.setup(resume=True)
    assert runner.lock is not None
    runner.lock.release()
    for part in ("model.top_k: 8 there, 3 now", "run.batch_size: 9 there, 10 now", "--save-dir"):
        assert part in str(error.value)
    assert "workers" not in str(error.value) and "keep" not in str(error.value)


def test_settings_younger_than_a_run_keep_it_from_nothing(
    whole: Path, tiny_overrides: list[str], tmp_path: Path
) -> None:
    """At their defaults; with another value they are a difference as any other."""
    stopped_run(tmp_path, tiny_overrides)
    newest = tmp_path / "checkpoints" / f"step-{STOP:08d}.pt"
    stored = checkpoint.load(newest)
    del stored.meta["config"]["run"]["matmul"], stored.meta["config"]["evaluate"]["select"]
    checkpoint.save(newest, stored.meta, stored.model, stored.optimizers)
    settings = [*tiny_overrides, *SCHEDULE, *OFTEN, "run.workers=0"]
    runner = Runner(config_of(METHOD, tmp_path, [*settings, "run.matmul=high"]))
    with pytest.raises(UserError, match="run.matmul: 'highest' there, 'high' now"):
        runner.setup(resume=True)
    assert runner.lock is not None
    runner.lock.release()
    assert_same_state(final_state(whole), go_on(config_of(METHOD, tmp_path, settings)))

    file = tmp_path / "config.yaml"
    tree = yaml.safe_load(file.read_text())
    del tree["run"]["matmul"], tree["evaluate"]["select"]
    file.write_text(yaml.safe_dump(tree))
    code, _, err = run("--resume", "--save-dir", tmp_path)
    assert code == 0, err
    assert yaml.safe_load(file.read_text())["run"]["matmul"] == "highest"
    assert_same_state(final_state(whole), final_state(tmp_path))


def go_on_together(folder: str, overrides: list[str]) -> dict[str, torch.Tensor]:
    return go_on(config_of(METHOD, Path(folder), [*overrides, *SCHEDULE, *OFTEN, "run.workers=0"]))


def test_another_number_of_processes_goes_on_to_rounding(
    whole: Path, tiny_overrides: list[str], tmp_path: Path
) -> None:
    stopped_run(tmp_path, tiny_overrides)
    wanted = final_state(whole)
    for state in run_processes(go_on_together, 2, str(tmp_path), tiny_overrides):
        for name, value in state.items():
            torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-5, msg=name)
    np.testing.assert_allclose(losses(tmp_path), losses(whole), rtol=1e-5)


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_nothing(tiny_overrides: list[str], tmp_path: Path) -> None:
    """SIGKILL while starting, training, evaluating and writing; resumed each time."""
    settings = [*tiny_overrides, "run.checkpoint_every=1", "run.epochs=12"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    undisturbed = start(*arguments(METHOD, whole, settings))
    generator = np.random.default_rng(2)
    for _ in range(20):
        done = len((killed / "log.jsonl").read_text().splitlines()) if (killed / "log.jsonl").exists() else 0
        process = start(*arguments(METHOD, killed, settings, "--resume"))
        if generator.random() < 0.2:
            time.sleep(float(generator.uniform(0, 6)))  # most likely before training begins
        else:
            wait_for_step(killed, done + 1, process)
            time.sleep(float(generator.uniform(0, 0.3)))
        process.kill()
        process.communicate()
    code, _, err = finish(start(*arguments(METHOD, killed, settings, "--resume")))
    assert code == 0, err
    assert finish(undisturbed)[0] == 0
    assert_same_state(final_state(whole), final_state(killed))
    assert (whole / "log.jsonl").read_text() == (killed / "log.jsonl").read_text()
    assert (whole / "results.json").read_text() == (killed / "results.json").read_text()
    assert names_in(whole) == names_in(killed)
