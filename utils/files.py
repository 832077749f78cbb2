"""Writing files so that a reader never sees half of one, and keeping two processes out of one folder."""

import fcntl
import hashlib
import json
import logging
import os
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from common.errors import UserError

log = logging.getLogger(__name__)
LOCK = ".lock"  # in a folder that a process holds


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside `path`; when the block ends well, the file is synced and takes the name `path`.

    A process killed at any moment leaves the old file or the new one, never a part. A temporary file that a killed
    process left behind is overwritten by the next write.

    Raises:
        UserError: If the file cannot be written (no room, no permission).
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        _remove(temporary)
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}; free some room or name another folder"
        ) from None
    except BaseException:
        _remove(temporary)
        raise


def _remove(temporary: Path) -> None:
    """Removes what failed half-way, unless what failed keeps it from that, too: a file system that became read-only."""
    with suppress(OSError):
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text atomically; other bytes of a file's name become escapes, which JSON reads as they were."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value: Any) -> None:
    """Writes a value as indented JSON, atomically; NaN is refused."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def is_utf8(text: str) -> bool:
    """Whether a text can be written as UTF-8; a file's name with other bytes in it, as Python gives it, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_folder(path: Path, key: str) -> None:
    """Creates a folder and its parents, and makes sure that files can be written there.

    Args:
        path: The folder.
        key: The option that names it, for the message.

    Raises:
        UserError: If the folder cannot be created or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):  # has no name that a kill could leave behind
            pass
    except OSError as error:
        raise UserError(f"folder {path} cannot be written to ({error.strerror}); name another with {key}") from None


class FolderLock:
    """Holds a folder until `release`, the end of this object or that of the process, a kill included.

    What is locked is a file in it, `.lock`: NFS passes locks of files on to other machines, those of folders it does
    not. A kill leaves the file behind, unlocked.

    Args:
        folder: An existing folder; it may be renamed meanwhile.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._place = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        self._handle: int | None = None
        self._end = weakref.finalize(self, FolderLock._give_back, self._place, None)
        _locks.add(self)

    def acquire(self, wait: bool) -> bool:
        """Takes the lock; without `wait`, returns False at once if another process holds it.

        Raises:
            UserError: If it cannot be locked at all.
        """
        if not self._end.alive:
            raise ValueError(f"the lock of {self.folder} was given back")
        while self._handle is None:
            handle = -1
            try:
                handle = os.open(LOCK, os.O_RDWR | os.O_CREAT, 0o666, dir_fd=self._place)
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                if _is_named(handle, self._place):  # else its holder gave it back, and removed it, meanwhile
                    self._handle, handle = handle, -1
            except BlockingIOError:
                return False
            except OSError as error:
                raise UserError(
                    f"{self.folder / LOCK} cannot be locked ({error.strerror}); if a process of another user left it "
                    "behind, remove it; if the file system has no locks, name a folder on another"
                ) from None
            finally:
                if handle >= 0:
                    os.close(handle)
        self._end.detach()
        self._end = weakref.finalize(self, FolderLock._give_back, self._place, self._handle)
        return True

    def release(self) -> None:
        """Gives the folder back."""
        self._end()

    def drop(self) -> None:
        """Lets a forked process forget the lock, which stays its parent's."""
        if self._end.detach() is not None:
            os.close(self._place)
            if self._handle is not None:
                os.close(self._handle)

    @staticmethod
    def _give_back(place: int, handle: int | None) -> None:
        if handle is not None:
            with suppress(OSError):  # the folder may be gone
                if _is_named(handle, place):  # else somebody removed it, and the present one is another process's
                    os.unlink(LOCK, dir_fd=place)
            os.close(handle)
        os.close(place)


def _is_named(handle: int, place: int) -> bool:
    """Whether an open lock file is the one that lies in the open folder."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(LOCK, dir_fd=place))
    except FileNotFoundError:
        return False


@contextmanager
def claimed(folder: Path, key: str) -> Iterator[None]:
    """Makes a folder, and keeps other processes from writing there meanwhile.

    Args:
        folder: The folder.
        key: The option that names it, for the message.

    Raises:
        UserError: If it cannot be written to, or another process is writing there.
    """
    make_folder(folder, key)
    lock = FolderLock(folder)
    try:
        if not lock.acquire(wait=False):
            raise UserError(f"{key} {folder}: another run is writing there; wait for it to end")
        yield
    finally:
        lock.release()


@contextmanager
def in_turn(folder: Path, key: str) -> Iterator[None]:
    """Makes a folder and holds it, after the process that holds it now; who waited looks whether the work is done.

    Args:
        folder: The folder.
        key: The option that names it, for the message.

    Raises:
        UserError: If it cannot be written to.
    """
    make_folder(folder, key)
    lock = FolderLock(folder)
    try:
        if not lock.acquire(wait=False):
            log.info("another process is at work in %s; waiting for it", folder)
            lock.acquire(wait=True)
        yield
    finally:
        lock.release()


_locks: weakref.WeakSet[FolderLock] = weakref.WeakSet()


def _drop_locks() -> None:
    """Frees a forked child of its parent's locks: a loader process may outlive a killed run by seconds."""
    for lock in _locks:
        lock.drop()


os.register_at_fork(after_in_child=_drop_locks)


def sync_folder(folder: Path) -> None:
    """Makes a rename durable: the folder's entry must reach the disk, too."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
