"""What preparation scripts leave when they are killed, stopped, started twice, or run out of disk."""

import errno
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data import (
    preparation,
)
from data.preparation import REPORT
from data.source_files import JOURNAL
from tests.disks import small_disk_at
from tests.preparing import ALL, REPOSITORY, WRITTEN, contents, prepare, source_of
from tests.processes import in_child
from utils.files import FolderLock


@pytest.fixture
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process, unlike a power failure, loses nothing that was written: without waiting for the disk."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.mark.usefixtures("unsynced")
@pytest.mark.parametrize(
    "name",
    ["mirflickr25k", *(pytest.param(name, marks=pytest.mark.slow) for name in ("coco", "nuswide", "wiki", "iaprtc12"))],
)
def test_killed_at_ten_random_moments_then_run_again_gives_identical_bytes(name: str, tmp_path: Path) -> None:
    source = source_of(name, tmp_path)
    start = time.perf_counter()
    assert prepare(name, source, tmp_path / "whole") == 0
    duration = time.perf_counter() - start
    whole = contents(tmp_path / "whole")
    assert set(whole) == WRITTEN
    moments = random.Random(name)
    for attempt in range(10):
        root = tmp_path / f"root{attempt}"
        child = in_child(lambda root=root: prepare(name, source, root))  # type: ignore[misc]
        time.sleep(moments.uniform(0, 1.2 * duration))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert prepare(name, source, root) == 0
        assert contents(root) == whole


@pytest.mark.usefixtures("unsynced")
@pytest.mark.slow
def test_killed_at_every_change_of_a_name_never_leaves_a_mixture(tmp_path: Path) -> None:
    source = source_of("nuswide", tmp_path)
    mats = {"index.mat", "caption.mat", "label.mat", "labels.txt"}
    sets = {}
    for protocol in ("dcmht", "tc10"):
        assert prepare("nuswide", source, tmp_path / protocol, "--protocol", protocol) == 0
        sets[protocol] = {key: value for key, value in contents(tmp_path / protocol).items() if key in mats}

    def work(root: Path, deadline: int) -> None:
        steps = 0

        def counted(original: Callable[..., object]) -> Callable[..., object]:
            def step(*arguments: object, **more: object) -> object:
                nonlocal steps
                steps += 1
                if steps == deadline:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*arguments, **more)

            return step

        os.replace = counted(os.replace)  # type: ignore[assignment]
        Path.unlink = counted(Path.unlink)  # type: ignore[method-assign, assignment]
        prepare("nuswide", source, root, "--protocol", "tc10")

    outcomes = []
    for deadline in range(1, 40):
        root = tmp_path / f"root{deadline}"
        assert prepare("nuswide", source, root, "--protocol", "dcmht") == 0
        child = in_child(lambda root=root, deadline=deadline: work(root, deadline))  # type: ignore[misc]
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        found = {key: value for key, value in contents(root).items() if key in mats}
        if len(found) == len(mats):
            assert found in sets.values()
        outcomes.append("part" if len(found) < len(mats) else "old" if found == sets["dcmht"] else "new")
        assert prepare("nuswide", source, root, "--protocol", "tc10") == 0
        assert contents(root) == contents(tmp_path / "tc10") | {JOURNAL: contents(root)[JOURNAL]}
        if not killed:
            break
    assert {"old", "part", "new"} == set(outcomes) and outcomes[-1] == "new"


@pytest.mark.parametrize(
    ("stop", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted; run the same command again"),
        (MemoryError(), 2, "error: "),
        (OSError(errno.EIO, "Input/output error"), 2, "Input/output error; mend it and run again"),
    ],
)
def test_stopped_in_the_middle(
    stop: BaseException,
    code: int,
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, root = source_of("wiki", tmp_path), tmp_path / "root"

    def stopped(*_: object) -> None:
        raise stop

    with monkeypatch.context() as patched:
        patched.setattr(preparation, "make_report", stopped)
        assert prepare("wiki", source, root) == code
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert prepare("wiki", source, root) == 0
    assert "still to be checked" not in capsys.readouterr().err


def test_two_runs_into_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, root = source_of("wiki", tmp_path), tmp_path / "root"
    root.mkdir()
    lock = FolderLock(root)
    assert lock.acquire(wait=False)
    assert prepare("wiki", source, root) == 2
    assert "another run is writing there" in capsys.readouterr().err
    lock.release()
    assert prepare("wiki", source, root) == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 KiB."""
    with small_disk_at(tmp_path / "disk", "32k") as disk:
        yield disk


def test_full_disk_is_seen_before_the_work(
    small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (small_disk / "filler").write_bytes(bytes(32 * 1024))
    source = source_of("mirflickr25k", tmp_path)
    assert prepare("mirflickr25k", source, small_disk) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "are needed" in error and "are free" in error
    assert set(contents(small_disk)) == {"filler"}


@pytest.mark.parametrize("room", [0, 4, 8, 12])
def test_disk_that_fills_up_on_the_way(
    room: int, small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_of("mirflickr25k", tmp_path)
    (small_disk / "filler").write_bytes(bytes((32 - room) * 1024))
    monkeypatch.setattr(preparation, "_require_room", lambda *_: None)
    assert prepare("mirflickr25k", source, small_disk) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "No space left on device" in error and str(small_disk) in error
    assert not [name for name in contents(small_disk) if name.endswith((".mat", ".part")) or name == REPORT]
    (small_disk / "filler").unlink()
    assert prepare("mirflickr25k", source, small_disk) == 0


def test_read_only_folder(small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for root in (small_disk, small_disk / "new"):
        assert prepare("wiki", source_of("wiki", tmp_path), root) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert str(root) in error and "Read-only file system" in error and "--root" in error


INTERRUPTED = """
HEAVY = ("numpy", "torch")
import os, runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.addaudithook(lambda event, told: event == "import" and told[0] in HEAVY and os.kill(os.getpid(), 2))
runpy.run_path(sys.argv[1], run_name="__main__")
"""


@pytest.mark.parametrize("script", ALL)
def test_interrupted_while_packages_load_no_script_complains(script: str) -> None:
    command = [sys.executable, "-c", INTERRUPTED, str(REPOSITORY / "data" / script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")
