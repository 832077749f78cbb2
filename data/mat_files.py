"""Writes `.mat` files (MATLAB 5) whole or not at all, with the same bytes for the same arrays.

`scipy.io.savemat` writes the time of day into the header and leaves half a file behind when it is interrupted. Here the
header is constant, and a file gets its name only once its bytes are on the disk. Several files that belong together are
replaced by `publish`, so that files of two preparations never stand side by side.
"""

import contextlib
import errno
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import scipy.io

from common.errors import UserError

Array = npt.NDArray[Any]

# Bytes 0..115 of a MATLAB 5 file are free text; readers look only at what follows.
HEADER = b"MATLAB 5.0 MAT-file, cross-modal hashing data".ljust(116)


def write_mat(path: Path, **arrays: Array) -> None:
    """Writes one `.mat` file atomically; the same arrays always give the same bytes.

    Args:
        path: File to write; its folder exists. An older file of that name is replaced.
        **arrays: The file's variables, in this order. Strings as `string_rows` or `string_cells` make them.

    Raises:
        UserError: If the folder cannot be written to or the disk is full; no part of the file remains.
    """
    publish({path: stage_mat(path, arrays)})


def stage_mat(path: Path, arrays: Mapping[str, Array]) -> Path:
    """Writes the bytes of a future `.mat` file to a temporary name in its folder, for `publish`.

    Args:
        path: The file's name once it is published.
        arrays: The file's variables, in this order.

    Returns:
        The temporary file.

    Raises:
        UserError: As `write_mat`.
    """

    def write(stream: BinaryIO) -> None:
        scipy.io.savemat(stream, dict(arrays), do_compression=True)
        stream.seek(0)
        stream.write(HEADER)

    return _stage(path, write)


def stage_text(path: Path, text: str) -> Path:
    """Writes a future UTF-8 text file to a temporary name in its folder, for `publish`.

    Args:
        path: The file's name once it is published.
        text: Its contents.

    Returns:
        The temporary file.

    Raises:
        UserError: As `write_mat`.
    """
    return _stage(path, lambda stream: stream.write(text.encode()))


def publish(staged: Mapping[Path, Path]) -> None:
    """Gives staged files their names, as one set.

    The older files go first: whoever is killed in between leaves a set with files missing, which readers refuse, never
    a mixture of two.

    Args:
        staged: Final name to temporary file, all in one folder.

    Raises:
        UserError: If the folder cannot be written to.
    """
    with writing(next(iter(staged))):
        if len(staged) > 1:
            for path in staged:
                path.unlink(missing_ok=True)
        for path, part in staged.items():
            os.replace(part, path)
        for folder in {path.parent for path in staged}:
            _sync_folder(folder)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what the system says about a write that fails into one line for the user.

    Args:
        path: What is being written; named in the message.

    Raises:
        UserError: For a full disk, a missing right, a read-only file system or any other OSError.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{path}: the disk is full; free some space, or write to another one (--root)") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(f"{path}: no right to write here; choose a folder you own (--root)") from error
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); choose another folder (--root)"
        ) from error


def string_rows(texts: Sequence[str]) -> Array:
    """One string per item as a char matrix.

    Args:
        texts: N strings; trailing blanks do not survive, as every row is padded with them.

    Returns:
        [N] strings; SciPy reads them back as [N], padded to the longest.
    """
    # SciPy writes an array of nothing but empty strings as one without items: a blank keeps the item.
    return np.array([clean_text(text) or " " for text in texts], dtype=np.str_)


def string_cells(texts: Iterable[Sequence[str]]) -> Array:
    """Several strings per item, in any number, as a cell array.

    Args:
        texts: For each of N items its strings; an item without any gets one blank string.

    Returns:
        [1, N] objects, each a 1-D string array; SciPy reads them back so, padded to the longest of the item.
    """
    items = [string_rows(item or [""]) for item in texts]
    cells = np.empty((1, len(items)), dtype=object)
    for position, item in enumerate(items):
        cells[0, position] = item
    return cells


def clean_text(text: str) -> str:
    """A text on one line that every reader can decode: blanks joined, NUL and lone surrogates replaced.

    Args:
        text: Any string.

    Returns:
        The string without line breaks, double or outer blanks.
    """
    return " ".join(text.replace("\0", " ").encode("utf-8", "replace").decode().split())


def _stage(path: Path, write: Callable[[BinaryIO], object]) -> Path:
    # One fixed temporary name: what a killed run left behind is overwritten by the next one, never collected.
    part = path.with_name(f".{path.name}.part")
    with writing(path):
        try:
            with part.open("wb") as stream:
                write(stream)
                stream.flush()
                os.fsync(stream.fileno())
        except BaseException:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            raise
    return part


def _sync_folder(folder: Path) -> None:
    # A rename is on the disk only when its folder is.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
