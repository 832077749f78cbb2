"""Devices, and starting several processes."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from utils.launch import devices, pick_device

ROOT = Path(__file__).parent.parent


def test_cpu_devices() -> None:
    assert devices("cpu") == [torch.device("cpu")]
    assert len(devices("cpu:3")) == 3
    assert pick_device("cpu", distribute=False).type == "cpu"


def test_several_devices_need_distribute() -> None:
    with pytest.raises(UserError, match="--distribute"):
        pick_device("cpu:2", distribute=False)


def test_absent_and_repeated_devices_are_named() -> None:
    with pytest.raises(UserError, match="GPU 97 is not there"):
        devices("97")
    with pytest.raises(UserError, match="GPU 1 is named twice"):
        devices("0,1,1")


def test_cuda_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="has no GPU"):
        devices("cuda")
    assert devices("auto") == [torch.device("cpu")]


def launcher(tmp_path: Path, body: str, count: int = 2) -> subprocess.Popen[str]:
    """A script that starts `count` copies of itself; a copy runs `body`."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, time, signal\n"
        "if 'RANK' not in os.environ:\n"  # a copy needs no torch, which takes seconds to load
        f"    sys.path.insert(0, {str(ROOT)!r})\n"
        f"    from utils.launch import launch\n    sys.exit(launch({count}))\n"
        "rank = int(os.environ['RANK'])\n" + textwrap.dedent(body)
    )
    return subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"


def wait_for(files: list[Path]) -> list[int]:
    deadline = time.monotonic() + 60
    while not all(file.exists() and file.read_text() for file in files):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return [int(file.read_text()) for file in files]


def test_all_end_well(tmp_path: Path) -> None:
    body = "os.write(1, f\"rank {rank} {os.environ['WORLD_SIZE']}\\n\".encode())"  # in one piece
    process = launcher(tmp_path, body, count=3)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert sorted(output.splitlines()) == ["rank 0 3", "rank 1 3", "rank 2 3"]


@pytest.mark.slow  # waits for the grace that one which ignores signals has
def test_one_failing_ends_all(tmp_path: Path) -> None:
    body = """
        open(f"{sys.argv[1]}/{rank}", "w").write(str(os.getpid()))
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if rank == 1:
            while not os.path.exists(f"{sys.argv[1]}/0"): time.sleep(0.01)
            sys.exit(7)
        time.sleep(600)
    """
    process = launcher(tmp_path, body)
    process.communicate(timeout=120)
    assert process.returncode == 7
    assert not any(alive(pid) for pid in wait_for([tmp_path / "0", tmp_path / "1"]))


def test_a_killed_launcher_leaves_no_orphans(tmp_path: Path) -> None:
    body = 'open(f"{sys.argv[1]}/{rank}", "w").write(str(os.getpid()))\ntime.sleep(600)\n'
    process = launcher(tmp_path, body)
    pids = wait_for([tmp_path / "0", tmp_path / "1"])
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_signals_are_passed_on_once(tmp_path: Path) -> None:
    body = """
        seen = []
        signal.signal(signal.SIGINT, lambda *_: seen.append(1))
        open(f"{sys.argv[1]}/{rank}", "w").write(str(os.getpid()))
        while not seen: time.sleep(0.01)
        time.sleep(0.3)
        sys.exit(75 if len(seen) == 1 else 1)
    """
    process = launcher(tmp_path, body)
    wait_for([tmp_path / "0", tmp_path / "1"])
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 75
