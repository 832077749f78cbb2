"""Reads one variable of a .mat file, of any MATLAB version, as SciPy shows it: strings, cells, numbers.

Nothing in a file is executed: SciPy's reader and HDF5 know only data, and .npy files are read without pickles. A file
that asks for far more memory than it has bytes is refused unread (`mat_bounds`).
"""

import math
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import scipy  # loads its parts where they are first used: reading a configuration waits for none

from common.errors import UserError
from dataset.mat_bounds import Room, objects_error, require_honest
from dataset.mat_hdf5 import read_value, variables
from dataset.pictures.reading import PictureArray, Pictures

Array = npt.NDArray[Any]

_ITEM = {"char": 4, "logical": 1, "int8": 1, "uint8": 1, "int16": 2, "uint16": 2, "int32": 4, "uint32": 4, "single": 4}


@dataclass(frozen=True)
class Variable:
    """A variable of a file.

    Attributes:
        path: The file.
        key: The variable's name there; the file's name for a .npy file.
        value: Text as an array of str, a cell array as an array of arrays, numbers; or pictures.
    """

    path: Path
    key: str
    value: Array | Pictures

    @property
    def place(self) -> str:
        """File and key, for messages."""
        return f"{self.path} ({self.key})"


def variable_names(path: Path) -> list[str]:
    """Names of the variables of a .mat file of MATLAB v4 to v7.3, or of a .npz file.

    Raises:
        UserError: If it cannot be read.
    """
    with _readable(path):
        if path.suffix == ".npz":
            with zipfile.ZipFile(path) as archive:
                return [name.removesuffix(".npy") for name in archive.namelist()]
        if h5py.is_hdf5(path):
            with h5py.File(path, "r") as file:
                return list(variables(file))
        require_honest(path)
        return [name for name, _, _ in scipy.io.whosmat(path)]


def read_variable(path: Path, keys: Sequence[str], *, text: bool = False) -> Variable:
    """Reads the first of some variables that a file has.

    Args:
        path: A .mat file of MATLAB v4 to v7.3, a .npz or a .npy file.
        keys: Names that the variable may have, the likeliest first.
        text: Whether characters are expected: tells whether 16-bit numbers without a class in HDF5 are characters.

    Returns:
        The variable. Pictures ([N, H, W, 3] uint8 or as MATLAB stores them) come as `Pictures`.

    Raises:
        UserError: If the file cannot be read, or has none of the keys.
    """
    with _readable(path):
        if path.suffix == ".npy":
            return Variable(path, path.name, _pictures_or(np.load(path, mmap_mode="r", allow_pickle=False), path))
        if path.suffix == ".npz":
            return _read_npz(path, keys)
        if h5py.is_hdf5(path):
            with h5py.File(path, "r") as file:
                key = _choose(path, keys, list(variables(file)))
                return Variable(path, key, read_value(file, path, key, text))
        require_honest(path)
        listed = {name: (shape, kind) for name, shape, kind in scipy.io.whosmat(path)}
        key = _choose(path, keys, list(listed))
        shape, kind = listed[key]
        Room(path).take(math.prod(shape) * _ITEM.get(kind, 8))
        value = scipy.io.loadmat(path, variable_names=[key])[key]
        if value.dtype == object and any(isinstance(cell, scipy.io.matlab.MatlabOpaque) for cell in value.flat):
            raise objects_error(f"{path} ({key})")
        return Variable(path, key, _pictures_or(value.toarray() if scipy.sparse.issparse(value) else value, path))


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Context of reading a file, whose errors name it and say what to do."""
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise UserError(f"{path} is no regular file; name a .mat, .npz or .npy file")
    if not path.is_file():
        raise UserError(f"{path} is missing; put it there, or name the file that has what it should hold")
    try:
        yield
    except UserError:
        raise
    except PermissionError:
        raise UserError(f"{path} cannot be read (Permission denied); allow it to be read, or name another") from None
    except Exception as error:  # readers of broken files raise whatever they stumble over
        why = " ".join(str(error).split()) or type(error).__name__
        kind = path.suffix if path.suffix in (".npz", ".npy") else ".mat"
        raise UserError(
            f"{path} cannot be read as a {kind} file ({why}); it is truncated or not one: make or fetch it again"
        ) from None


def _read_npz(path: Path, keys: Sequence[str]) -> Variable:
    with zipfile.ZipFile(path) as archive:
        members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
        key = _choose(path, keys, list(members))
        room = Room(path)
        room.take(members[key].file_size)
        with archive.open(members[key]) as file:
            version = np.lib.format.read_magic(file)
            read_header = (
                np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            )
            shape, _, dtype = read_header(file)
            room.take(math.prod(shape) * dtype.itemsize)  # which NumPy makes room for, whatever follows
        with archive.open(members[key]) as file:
            return Variable(path, key, np.lib.format.read_array(file, allow_pickle=False))


def text_rows(value: Array | Pictures, count: int | None) -> list[list[str]] | None:
    """Texts of every item, stripped of padding.

    A cell array has one cell per item, with one or more texts; a string array has one row per item. Whether an array
    lists cells or strings is told by its dtype, so a single item is read rightly.

    Args:
        value: Array of str or of arrays: [N], [1, N], [N, 1], [N, m].
        count: Number of items that the index has, to tell items from texts of an item; None if unknown.

    Returns:
        The texts of every item, each item at least one (perhaps empty); None if the array holds something else.
    """
    if isinstance(value, Pictures) or value.dtype.kind not in "OUS" or value.ndim > 2:
        return None
    if value.ndim == 2 and value.shape[0] != count:
        if value.shape[1] == count:
            value = value.T
        elif 1 in value.shape:
            value = value.reshape(-1)
    try:
        return [[text for text in _strings(row) if text] or [""] for row in np.atleast_1d(value)]
    except _NotTextError:
        return None


def number_matrix(value: Array | Pictures, count: int) -> Array | None:
    """A matrix with one row per item, turned around if only its columns are as many as the items.

    Args:
        value: Numbers, [N, C] or [C, N]; sides of length 1 beyond two, as in [N, 1, C], do not count.
        count: Number of items N.

    Returns:
        [N, C]; as it stands where neither side fits; None if the array is no matrix of numbers.
    """
    if isinstance(value, Pictures) or value.dtype.kind not in "biuf":
        return None
    if value.ndim > 2:
        value = value.squeeze()
    if value.ndim != 2:
        return None
    return value.T if value.shape[0] != count and value.shape[1] == count else value


class _NotTextError(Exception):
    """A cell holds numbers."""


def _strings(cell: Any) -> Iterator[str]:
    """All texts of a cell, of cells in it, or of a row, without blanks around them."""
    if isinstance(cell, bytes):
        cell = cell.decode("utf-8", "replace")
    if isinstance(cell, str):
        yield cell.strip("\0 \t\r\n")
    elif isinstance(cell, np.ndarray) and (cell.dtype.kind in "OUS" or cell.size == 0):
        for part in cell.reshape(-1).tolist():
            yield from _strings(part)
    else:
        raise _NotTextError


def _choose(path: Path, keys: Sequence[str], names: Sequence[str]) -> str:
    for key in keys:
        if key in names:
            return key
    has = ", ".join(sorted(names)) or "no variable"
    raise UserError(f"{path} has none of the variables {', '.join(keys)}, but {has}; rename the variable or the file")


def _pictures_or(value: Array, path: Path) -> Array | Pictures:
    """Four-dimensional uint8 arrays as pictures: [N, H, W, 3], or [H, W, 3, N] as MATLAB users stack them."""
    if value.ndim != 4:
        return value
    if value.dtype != np.uint8 or 3 not in (value.shape[-1], value.shape[2]):
        raise UserError(
            f"{path}: an array of shape {value.shape}, {value.dtype}, is no stack of RGB pictures, [N, H, W, 3] uint8"
        )
    return PictureArray(value if value.shape[-1] == 3 else value.transpose(3, 0, 1, 2))
