"""MATLAB v7.3: values of an HDF5 file as SciPy shows those of older .mat files.

hdf5storage 0.2.2 reads v7.3 too, but follows references without bound (a file of 3.6 kB took 2.2 GB), and read 700
cells a second of a list of captions where this took 1,200.
"""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import scipy  # loads its parts where they are first used

from common.errors import UserError
from dataset.mat_bounds import FLOOR, Room, objects_error
from dataset.pictures.reading import Pictures, PictureVolume
from utils.progress import progress

Array = npt.NDArray[Any]

_CELL = 1024  # bytes that a cell is counted as at least: an object of Python, and the time to open it
_OBJECT = 3  # `MATLAB_object_decode` of strings, tables and other objects of classes
_VALUES = 4096  # strings read at a time, at most


def variables(file: h5py.File) -> Iterator[str]:
    """Names of the variables; those inside a structure as `structure/name`."""
    for name in file:
        if not name.startswith("#"):
            yield name
            if isinstance(file[name], h5py.Group):
                yield from (f"{name}/{member}" for member in file[name])


def read_value(file: h5py.File, path: Path, key: str, text: bool) -> Array | Pictures:
    """Reads one variable; HDF5 lists dimensions in the opposite order: values are turned back to MATLAB's.

    Args:
        file: The open file.
        path: Its path.
        key: Name of the variable, of those that `variables` lists.
        text: Whether 16-bit numbers without a class are characters.

    Returns:
        Text as an array of str, a cell array as an array of arrays, numbers; or pictures.

    Raises:
        UserError: If it is of a kind that is not read, lies in another file, or asks for too much memory.
    """
    data = file[key]
    room = Room(path)
    if not isinstance(data, h5py.Dataset) or data.ndim != 4:
        return _value_of(file, data, text, room)
    number_first = data.shape[1] == 3
    if data.dtype != np.uint8 or not (number_first or data.shape[0] == 3):
        raise UserError(
            f"{path} ({key}) has shape {data.shape}, {data.dtype}: no stack of RGB pictures, [N, 3, W, H] uint8"
        )
    _admit(file, data, room)
    return PictureVolume(path, key, number_first, data.shape[0] if number_first else data.shape[3])


def _admit(file: h5py.File, data: h5py.Dataset, room: Room) -> None:
    """Refuses what lies in other files, and counts what is about to be read: whole chunks are unpacked."""
    if data.external or data.is_virtual or data.file.filename != file.filename:
        raise UserError(f"{room.path} ({data.name}) keeps its values in another file; save it again as one file")
    size = max(math.prod(data.shape), math.prod(data.chunks or ()))
    room.take(size * data.dtype.itemsize + _CELL)


def _value_of(file: h5py.File, data: h5py.Dataset | h5py.Group, text: bool, room: Room) -> Array:
    if data.attrs.get("MATLAB_object_decode", 0) == _OBJECT:
        raise objects_error(f"{room.path} ({data.name.removeprefix('/')})")
    if not isinstance(data, h5py.Dataset):
        if "MATLAB_sparse" in data.attrs:
            return _sparse_of(file, data, room)
        name = data.name.removeprefix("/")
        raise UserError(f"{room.path} ({name}) is a structure, not an array; save it as a plain or cell array")
    kind = data.attrs.get("MATLAB_class", b"")
    kind = kind.decode() if isinstance(kind, bytes) else str(kind)
    if data.attrs.get("MATLAB_empty", 0):
        room.take(_CELL)
        return np.array([], dtype=np.str_)
    _admit(file, data, room)
    if (strings := h5py.check_string_dtype(data.dtype)) is not None:
        return _strings_of(data, room) if strings.length is None else np.asarray(data.asstr()[()], dtype=object)
    if data.dtype.hasobject and h5py.check_ref_dtype(data.dtype) is None:
        raise UserError(f"{room.path} ({data.name}) holds lists or records; save it as a plain or cell array")
    value = np.asarray(data[()]).T
    if h5py.check_ref_dtype(data.dtype) is not None:
        cells = np.empty(value.shape, dtype=object)
        for place in progress(np.ndindex(value.shape), total=value.size, desc=f"cells of {data.name}", leave=False):
            cells[place] = _value_of(file, file[value[place]], text, room)
        return cells
    if kind == "char" or (text and not kind and value.dtype in (np.uint16, np.uint32)):
        return _characters(_unrolled(value, data.attrs))
    return value


def _sparse_of(file: h5py.File, group: h5py.Group, room: Room) -> Array:
    """A sparse matrix in full: `jc` says where in `ir` (rows) and `data` (values) each column begins."""
    parts = {name: group[name] for name in ("data", "ir", "jc") if name in group}  # of zeros alone: `jc`
    for part in parts.values():
        _admit(file, part, room)
    shape = int(group.attrs["MATLAB_sparse"]), len(parts["jc"]) - 1
    values = parts["data"][()] if "data" in parts else np.zeros(0)
    rows = parts["ir"][()] if "ir" in parts else np.zeros(0)
    room.take(math.prod(shape) * values.dtype.itemsize)
    matrix = scipy.sparse.csc_matrix((values, rows.astype(np.int64), parts["jc"][()].astype(np.int64)), shape)
    matrix.check_format()
    return np.asarray(matrix.toarray())


def _strings_of(data: h5py.Dataset, room: Room) -> Array:
    """Strings of any length, a few at a time: all of them may refer to one that is as long as the file."""
    if not data.ndim:
        return np.asarray(data.asstr()[()], dtype=object)
    texts = np.empty(data.shape, dtype=object)
    axis = int(np.argmax(data.shape))
    step = min(_VALUES, max(1, FLOOR // room.path.stat().st_size))
    for place in np.ndindex(*data.shape[:axis], *data.shape[axis + 1 :]):
        for start in range(0, data.shape[axis], step):
            part = (*place[:axis], slice(start, start + step), *place[axis:])
            texts[part] = data.asstr()[part]
            room.take(sum(map(len, texts[part])))
    return texts


def _unrolled(codes: Array, attributes: Mapping[str, Any]) -> Array:
    """Undoes what hdf5storage does to NumPy's string arrays: it lays all strings out in one row."""
    stored = re.fullmatch(r"str(\d+)", np.bytes_(attributes.get("Python.numpy.UnderlyingType", b"")).decode())
    if stored is None or "Python.Shape" not in attributes or not codes.size:
        return codes
    return codes.reshape(*attributes["Python.Shape"], int(stored[1]) // 32)  # 32 bits to a character


def _characters(codes: Array) -> Array:
    """Character codes [..., length] -> strings [...]."""
    if codes.ndim == 0:
        codes = codes.reshape(1, 1)
    encoding = {1: "utf-8", 2: "utf-16-le", 4: "utf-32-le"}[codes.dtype.itemsize]
    rows = codes.reshape(-1, codes.shape[-1])
    texts = [row.astype(row.dtype.newbyteorder("<")).tobytes().decode(encoding, "replace") for row in rows]
    return np.array(texts, dtype=object).reshape(codes.shape[:-1])
