"""Locks of folders: one holder at a time, whoever comes and goes, and no trace afterwards. Failures of writing."""

import errno
import fcntl
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from utils.files import LOCK, FolderLock, atomic, in_turn

FORK = multiprocessing.get_context("fork")


def test_a_lock_holds_until_it_is_given_back(tmp_path: Path) -> None:
    first, second = FolderLock(tmp_path), FolderLock(tmp_path)
    assert first.acquire(wait=False) and not second.acquire(wait=False)
    first.release()
    assert list(tmp_path.iterdir()) == [] and second.acquire(wait=False)
    first.release()  # again: nothing is left to give back
    assert not FolderLock(tmp_path).acquire(wait=False)
    del second
    assert list(tmp_path.iterdir()) == []


def test_a_folder_renamed_or_removed_while_it_is_held(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    lock = FolderLock(tmp_path / "old")
    assert lock.acquire(wait=False)
    (tmp_path / "old").rename(tmp_path / "new")
    assert not FolderLock(tmp_path / "new").acquire(wait=False)
    lock.release()
    assert list((tmp_path / "new").iterdir()) == []
    lock = FolderLock(tmp_path / "new")
    assert lock.acquire(wait=False)
    (tmp_path / "new" / LOCK).unlink()
    (tmp_path / "new").rmdir()
    lock.release()


def test_a_lock_file_that_somebody_removed_costs_the_next_holder_nothing(tmp_path: Path) -> None:
    first, second = FolderLock(tmp_path), FolderLock(tmp_path)
    assert first.acquire(wait=False)
    (tmp_path / LOCK).unlink()
    assert second.acquire(wait=False)
    first.release()
    assert not FolderLock(tmp_path).acquire(wait=False)


def test_what_a_killed_process_left_is_no_lock(tmp_path: Path) -> None:
    (tmp_path / LOCK).touch()
    assert FolderLock(tmp_path).acquire(wait=False)


def test_a_forked_child_neither_holds_nor_gives_back_its_parents_lock(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    assert lock.acquire(wait=False)
    child = FORK.Process(target=lock.release)
    child.start()
    child.join()
    assert child.exitcode == 0 and not FolderLock(tmp_path).acquire(wait=False)
    sleeper = FORK.Process(target=time.sleep, args=(30,))
    sleeper.start()
    lock.release()
    assert FolderLock(tmp_path).acquire(wait=False)
    sleeper.kill()


def _add_one(folder: Path, times: int) -> None:
    for _ in range(times):
        with in_turn(folder, "--folder"):
            number = int((folder / "number").read_text())
            (folder / "number").write_text("")  # what a second process in here would read
            time.sleep(1e-4)
            (folder / "number").write_text(str(number + 1))
    os._exit(0)


def test_processes_take_turns(tmp_path: Path) -> None:
    (tmp_path / "number").write_text("0")
    processes = [FORK.Process(target=_add_one, args=(tmp_path, 50)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert (tmp_path / "number").read_text() == "200"


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.raises(UserError, match=r"\.lock cannot be locked \(No locks available\)"):
        FolderLock(tmp_path).acquire(wait=True)


def test_what_cannot_be_removed_after_a_failure_does_not_hide_it(tmp_path: Path) -> None:
    (tmp_path / ".x.part").mkdir()
    with pytest.raises(UserError, match="x cannot be written: Is a directory"), atomic(tmp_path / "x") as temporary:
        temporary.write_text("new")
    with pytest.raises(ZeroDivisionError), atomic(tmp_path / "x"):
        raise ZeroDivisionError
