"""Writes `.mat` files (MATLAB 5) whole or not at all, with the same bytes for the same arrays.

`scipy.io.savemat` writes the time of day into the header; here the header is constant. Files that belong together are
written by `write_set`, so that files of two preparations never stand side by side.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.io

from common.errors import UserError
from utils.files import atomic

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
    write_set({path: arrays})


def write_set(files: Mapping[Path, Mapping[str, Array] | str]) -> None:
    """Writes several files as one set.

    All bytes are on the disk before the first older file goes; older files go before the first new name appears.
    Whoever is killed in between leaves a set with files missing, which readers refuse, never a mixture of two.

    Args:
        files: Path to a `.mat` file's variables, in order, or to the text of a text file.

    Raises:
        UserError: As `write_mat`.
    """
    with ExitStack() as names:
        for path, content in files.items():
            with names.enter_context(atomic(path)).open("wb") as stream:
                if isinstance(content, str):
                    stream.write(content.encode(errors="backslashreplace"))
                else:
                    scipy.io.savemat(stream, dict(content), do_compression=True)
                    stream.seek(0)
                    stream.write(HEADER)
        if len(files) > 1:
            for path in files:
                path.unlink(missing_ok=True)


def made_here(path: Path) -> bool:
    """Whether a file is one that `write_mat` wrote.

    Args:
        path: An existing file.
    """
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return stream.read(len(HEADER)) == HEADER


@contextmanager
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
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}; free some room or name another folder"
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
