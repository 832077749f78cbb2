"""Reads one variable of a .mat file, of any MATLAB version, as SciPy shows it: strings, cells, numbers.

Nothing in a file is executed: SciPy's reader and HDF5 know only data, and .npy files are read without pickles. A file
may claim or unpack to `_FLOOR` bytes and `_FACTOR` times its own size; whatever asks for more is refused unread.

hdf5storage 0.2.2 reads v7.3 too, but follows references without bound (a file of 3.6 kB took 2.2 GB), and read 700
cells a second of a list of captions where this took 1,200.
"""

import io
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import h5py
import numpy as np
import numpy.typing as npt
import scipy.io
import scipy.sparse

from common.errors import UserError
from dataset.pictures.reading import PictureArray, Pictures, PictureVolume
from utils.progress import progress

Array = npt.NDArray[Any]

# zlib reaches 1,032 : 1. The densest honest files are label and tag matrices of doubles, nearly all 0: about 150 : 1.
_FLOOR, _FACTOR = 2**28, 200
_CELL = 1024  # bytes that a cell of an HDF5 file is counted as at least: an object of Python, and the time to open it
_ARRAY = 128  # bytes of an empty array of NumPy, which SciPy makes of every element; bounds the time here, too
_ITEM = {"char": 4, "logical": 1, "int8": 1, "uint8": 1, "int16": 2, "uint16": 2, "int32": 4, "uint32": 4, "single": 4}
_MATRIX, _COMPRESSED = 14, 15  # miMATRIX, miCOMPRESSED: types of an element in a MATLAB 5 file
_OPAQUE = 17  # class of a matrix that has no dimensions
_ROOM_OF_CLASS = {1: 8, 2: 8, 3: 8, 4: 4}  # cell, struct, object, char: SciPy makes room for as many as are declared
_DIMENSIONS = 32  # SciPy reads no more
_PIECE = 2**16  # bytes of a file read at a time
_VALUES = 4096  # strings of an HDF5 file read at a time, at most


class _Room:
    """Bytes that the values of a file may still take.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.left = _FLOOR + _FACTOR * path.stat().st_size

    def take(self, count: int) -> None:
        """Counts bytes.

        Raises:
            UserError: If no honest file of this size holds so many.
        """
        self.left -= count
        if self.left < 0:
            raise UserError(
                f"{self.path} holds or claims more than {_FACTOR} times its {self.path.stat().st_size:,} bytes, "
                "which may be an attack on memory (decompression bomb); save it again without compression"
            )


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
                return list(_hdf5_names(file))
        _require_honest(path)
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
            return _read_hdf5(path, keys, text)
        _require_honest(path)
        listed = {name: (shape, kind) for name, shape, kind in scipy.io.whosmat(path)}
        key = _choose(path, keys, list(listed))
        shape, kind = listed[key]
        _Room(path).take(math.prod(shape) * _ITEM.get(kind, 8))
        value = scipy.io.loadmat(path, variable_names=[key])[key]
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
        room = _Room(path)
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


class _Inflated(io.RawIOBase):
    """What a compressed element unpacks to, piece by piece; nothing is kept.

    Args:
        file: Stands at the element's content.
        size: Bytes of the content.
        room: What is unpacked is counted here.
    """

    def __init__(self, file: IO[bytes], size: int, room: _Room) -> None:
        self._file, self._left, self._room = file, size, room
        self._inflater = zlib.decompressobj()

    def readable(self) -> bool:
        """As `io.RawIOBase`."""
        return True

    def readinto(self, buffer: Any) -> int:
        """As `io.RawIOBase`."""
        while not self._inflater.eof:
            packed = self._inflater.unconsumed_tail or self._file.read(min(self._left, _PIECE))
            if not self._inflater.unconsumed_tail:
                self._left -= len(packed)
            content = self._inflater.decompress(packed, len(buffer))
            if content:
                self._room.take(len(content))
                buffer[: len(content)] = content
                return len(content)
            if not packed:
                break
        return 0


def _require_honest(path: Path) -> None:
    """Goes through the elements of a MATLAB 5 file, keeping none, and refuses a bomb.

    SciPy makes room for the cells, fields and characters that a matrix declares before it reads them, at any depth.
    """
    room = _Room(path)
    with path.open("rb") as file:
        header = file.read(128)
        if len(header) < 128 or 0 in header[:4]:  # version 4 knows neither compression nor nesting
            return
        order = "<" if header[126:128] == b"IM" else ">"
        while len(tag := file.read(8)) == 8:
            kind, size = struct.unpack(f"{order}II", tag)
            end = file.tell() + size
            if kind == _COMPRESSED:
                _count_elements(io.BufferedReader(_Inflated(file, size, room), _PIECE), order, room, None)
            elif kind == _MATRIX:
                file.seek(-8, io.SEEK_CUR)
                _count_elements(file, order, room, end)
                if file.tell() >= end + 8:  # what follows would lie inside an element that was passed over
                    raise ValueError("an element is longer than its variable")
            else:
                raise ValueError(f"type {kind} where a variable begins")
            file.seek(end)


def _count_elements(stream: IO[bytes], order: str, room: _Room, end: int | None) -> None:
    """Counts what the matrices of a variable declare: it, and those in its cells and fields, as they follow.

    Args:
        stream: Stands at the variable's tag.
        order: Of the bytes, as `struct` writes it.
        room: Counts.
        end: Where the variable ends; None for the end of the stream.
    """
    cells = 0  # of the matrix at hand, where it has named fields
    while (end is None or stream.tell() < end) and len(tag := stream.read(8)) == 8:
        room.take(_ARRAY)
        kind, size = struct.unpack(f"{order}II", tag)
        if kind >> 16:  # a small element: its bytes are in the tag
            kind, size = kind & 0xFFFF, 0
        if kind != _MATRIX:
            room.take(cells * size)  # the names of the fields among them: at least a byte for each
            _skip(stream, -(-size // 8) * 8)
        elif size:
            flags = stream.read(16)
            if len(flags) < 16:
                return
            kind = struct.unpack(f"{order}I", flags[8:12])[0] & 0xFF
            if kind == _OPAQUE:
                continue
            declared = abs(math.prod(_dimensions(stream, order))) * _ROOM_OF_CLASS.get(kind, 0)
            room.take(declared)
            cells = declared if kind in (2, 3) else 0


def _dimensions(stream: IO[bytes], order: str) -> tuple[int, ...]:
    tag = stream.read(8)
    kind, size = struct.unpack(f"{order}II", tag)
    content = tag[4 : 4 + (kind >> 16)]
    if not kind >> 16:
        if size > 4 * _DIMENSIONS:
            raise ValueError(f"more than {_DIMENSIONS} dimensions")
        content = stream.read(-(-size // 8) * 8)[:size]
    return struct.unpack(f"{order}{len(content) // 4}i", content[: len(content) // 4 * 4])


def _skip(stream: IO[bytes], count: int) -> None:
    if stream.seekable():
        stream.seek(count, io.SEEK_CUR)
        return
    while count and (piece := stream.read(min(count, _PIECE))):
        count -= len(piece)


def _pictures_or(value: Array, path: Path) -> Array | Pictures:
    """Four-dimensional uint8 arrays as pictures: [N, H, W, 3], or [H, W, 3, N] as MATLAB users stack them."""
    if value.ndim != 4:
        return value
    if value.dtype != np.uint8 or 3 not in (value.shape[-1], value.shape[2]):
        raise UserError(
            f"{path}: an array of shape {value.shape}, {value.dtype}, is no stack of RGB pictures, [N, H, W, 3] uint8"
        )
    return PictureArray(value if value.shape[-1] == 3 else value.transpose(3, 0, 1, 2))


# ---------------------------------------------------------------------------------------------- MATLAB v7.3


def _read_hdf5(path: Path, keys: Sequence[str], text: bool) -> Variable:
    """HDF5 lists dimensions in the opposite order; values are turned back to MATLAB's."""
    with h5py.File(path, "r") as file:
        key = _choose(path, keys, list(_hdf5_names(file)))
        data = file[key]
        if not isinstance(data, h5py.Dataset):
            raise UserError(f"{path} ({key}) is a structure, not an array; save it as a plain or cell array")
        room = _Room(path)
        if data.ndim == 4:
            number_first = data.shape[1] == 3
            if data.dtype != np.uint8 or not (number_first or data.shape[0] == 3):
                raise UserError(
                    f"{path} ({key}) has shape {data.shape}, {data.dtype}: no stack of RGB pictures, [N, 3, W, H] uint8"
                )
            _admit(file, data, room)
            count = data.shape[0] if number_first else data.shape[3]
            return Variable(path, key, PictureVolume(path, key, number_first, count))
        return Variable(path, key, _hdf5_value(file, data, text, room))


def _hdf5_names(file: h5py.File) -> Iterator[str]:
    """Names of the variables; those inside a structure as `structure/name`."""
    for name in file:
        if not name.startswith("#"):
            yield name
            if isinstance(file[name], h5py.Group):
                yield from (f"{name}/{member}" for member in file[name])


def _admit(file: h5py.File, data: h5py.Dataset, room: _Room) -> None:
    """Refuses what lies in other files, and counts what is about to be read: whole chunks are unpacked."""
    if data.external or data.is_virtual or data.file.filename != file.filename:
        raise UserError(f"{room.path} ({data.name}) keeps its values in another file; save it again as one file")
    size = max(math.prod(data.shape), math.prod(data.chunks or ()))
    room.take(size * data.dtype.itemsize + _CELL)


def _hdf5_value(file: h5py.File, data: h5py.Dataset, text: bool, room: _Room) -> Array:
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
            cells[place] = _hdf5_value(file, file[value[place]], text, room)
        return cells
    if kind == "char" or (text and not kind and value.dtype in (np.uint16, np.uint32)):
        return _characters(_unrolled(value, data.attrs))
    return value


def _strings_of(data: h5py.Dataset, room: _Room) -> Array:
    """Strings of any length, a few at a time: all of them may refer to one that is as long as the file."""
    if not data.ndim:
        return np.asarray(data.asstr()[()], dtype=object)
    texts = np.empty(data.shape, dtype=object)
    axis = int(np.argmax(data.shape))
    step = min(_VALUES, max(1, _FLOOR // room.path.stat().st_size))
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
