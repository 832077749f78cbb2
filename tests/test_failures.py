"""What ends a run of several processes: an error or the death of one, signals. No hang, nothing left behind."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from common.checkpoint import Checkpoints
from tests import tiny_data
from tests.commands import MAIN, ROOT, finish, start
from tests.runs import arguments, losses, wait_for_step
from tests.test_launch import alive

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
LONG = ["run.epochs=400", "evaluate.every=400", "run.checkpoint_every=1000"]
WORKERS = ["run.loader=workers", "run.workers=1"]


def start_two(launcher: str, folder: Path, settings: list[str], *options: str) -> "subprocess.Popen[str]":
    """Two processes that train DSPH."""
    if launcher == "torchrun":
        return start(*arguments("DSPH", folder, settings), command=[*TORCHRUN, *options, str(ROOT / "main.py")])
    return start(*arguments("DSPH", folder, settings, "--distribute", "--device", "cpu:2", *options))


def ranks(launcher: "subprocess.Popen[str]") -> dict[int, int]:
    """Process ids by rank."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    found = {}
    for child in map(int, children):
        rank = re.search(rb"\0RANK=(\d+)\0", Path(f"/proc/{child}/environ").read_bytes())
        if rank is not None:
            found[int(rank[1])] = child
    return found


def assert_gone(pids: dict[int, int]) -> None:
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in pids.values()):
        assert time.monotonic() < deadline, pids
        time.sleep(0.05)


def errors(err: str) -> list[str]:
    return [line for line in err.splitlines() if "error: " in line and "torch/distributed" not in line]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["distribute", "torchrun"])
def test_an_error_of_one_process_is_said_once_and_ends_all(
    launcher: str, tmp_path: Path, tiny_overrides: list[str]
) -> None:
    """A picture that only one process reads is broken."""
    data = tiny_data.make_dataset(tmp_path / "data")
    settings = [*tiny_overrides, f"dataset.root={data}", "run.loader=workers", "run.workers=0"]
    (data / "images" / "20.png").write_bytes(b"no picture")
    process = start_two(launcher, tmp_path / "run", settings)
    code, out, err = finish(process)
    assert code == (2 if launcher == "distribute" else 1), err
    assert len(errors(err)) == 1 and "20.png" in errors(err)[0], err
    assert "gloo" not in err and "GLHF" not in err and 'main.py", line' not in err, err


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["distribute", "torchrun"])
def test_sigterm_leaves_a_resumable_checkpoint(launcher: str, tmp_path: Path, tiny_overrides: list[str]) -> None:
    """Torchrun sends its signals to the whole group of a process, which loader processes must not belong to."""
    process = start_two(launcher, tmp_path / "run", [*tiny_overrides, *LONG, *WORKERS])
    wait_for_step(tmp_path / "run", 3, process)
    pids = ranks(process)
    assert len(pids) == 2
    for pid in [process.pid, *pids.values()]:  # as a scheduler does; the launcher passes its own on, too
        os.kill(pid, signal.SIGTERM)
    code, _, err = finish(process)
    assert code == (75 if launcher == "distribute" else 1), err
    assert err.count("stopped after step") == 1, err
    assert_gone(pids)
    newest = Checkpoints(tmp_path / "run" / "checkpoints", 1).newest()
    assert newest is not None and newest.meta["state"]["step"] == len(losses(tmp_path / "run"))


@pytest.mark.slow
def test_ctrl_c_reaches_all_processes_once(tmp_path: Path, tiny_overrides: list[str]) -> None:
    process = start_two("distribute", tmp_path / "run", [*tiny_overrides, *LONG])
    wait_for_step(tmp_path / "run", 3, process)
    pids = ranks(process)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 130 and err.count("--resume") == 1 and "Traceback" not in err, err
    assert_gone(pids)


@pytest.mark.slow
@pytest.mark.parametrize("loader", [WORKERS, []])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_all(victim: int, loader: list[str], tmp_path: Path, tiny_overrides: list[str]) -> None:
    """In 10 seconds, though its loader processes hold its connections, too."""
    process = start_two("distribute", tmp_path / "run", [*tiny_overrides, *LONG, *loader])
    wait_for_step(tmp_path / "run", 3, process)
    pids = ranks(process)
    os.kill(pids[victim], signal.SIGKILL)
    killed = time.monotonic()
    code, _, err = finish(process)
    assert time.monotonic() - killed < 10
    assert code == 137 and len(errors(err)) == 1 and "--resume" in errors(err)[0], err
    assert "Traceback" not in err
    assert_gone(pids)


@pytest.mark.slow
def test_torchrun_restarts_where_the_run_stood(tmp_path: Path, tiny_overrides: list[str]) -> None:
    settings = [*tiny_overrides, "run.checkpoint_every=1", "run.epochs=8", "evaluate.every=8"]
    process = start(*arguments("DSPH", tmp_path / "one", settings))
    process_two = start_two("torchrun", tmp_path / "two", settings, "--max-restarts", "2")
    wait_for_step(tmp_path / "two", 3, process_two)
    os.kill(ranks(process_two)[1], signal.SIGKILL)
    code, _, err = finish(process_two)
    assert code == 0 and "going on after step" in err, err
    assert finish(process)[0] == 0
    assert len(losses(tmp_path / "two")) == 40
    np.testing.assert_allclose(losses(tmp_path / "one"), losses(tmp_path / "two"), rtol=1e-5)


@pytest.mark.slow
def test_a_killed_torchrun_leaves_no_orphans(tmp_path: Path, tiny_overrides: list[str]) -> None:
    process = start_two("torchrun", tmp_path / "run", [*tiny_overrides, *LONG])
    wait_for_step(tmp_path / "run", 3, process)
    pids = ranks(process)
    process.kill()
    process.wait()
    assert_gone(pids)


@pytest.mark.slow
def test_errors_before_the_processes_meet_are_said_once(tmp_path: Path, tiny_overrides: list[str]) -> None:
    process = start(*arguments("DSPH", tmp_path, [*tiny_overrides, "model.bits=0"]), command=[*TORCHRUN, MAIN[1]])
    code, _, err = finish(process)
    assert code == 1 and len(errors(err)) == 1 and "model.bits" in errors(err)[0], err  # the code is torchrun's


def test_an_address_in_use_is_named(tmp_path: Path, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
        for key, value in group.items():
            monkeypatch.setenv(key, value)
        code, _, err = finish(start(*arguments("DSPH", tmp_path, tiny_overrides)))
    assert code == 2 and len(errors(err)) == 1 and f"cannot meet at 127.0.0.1:{port}" in errors(err)[0], err
    assert "free MASTER_ADDR" in errors(err)[0]
