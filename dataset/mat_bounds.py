"""How much memory a file of data may ask for: one that claims more than it can honestly hold is refused unread."""

import io
import math
import struct
import zlib
from pathlib import Path
from typing import IO, Any

from common.errors import UserError

# zlib reaches 1,032 : 1. The densest honest files are label and tag matrices of doubles, nearly all 0: about 150 : 1.
FLOOR, FACTOR = 2**28, 200  # bytes that any file may claim or unpack to, and times its own size beside them
_ARRAY = 128  # bytes of an empty array of NumPy, which SciPy makes of every element; bounds the time here, too
_MATRIX, _COMPRESSED = 14, 15  # miMATRIX, miCOMPRESSED: types of an element in a MATLAB 5 file
_OPAQUE = 17  # class of a matrix that has no dimensions
_ROOM_OF_CLASS = {1: 8, 2: 8, 3: 8, 4: 4}  # cell, struct, object, char: SciPy makes room for as many as are declared
_DIMENSIONS = 32  # SciPy reads no more
_PIECE = 2**16  # bytes of a file read at a time


def objects_error(place: str) -> UserError:
    """What is said of objects of MATLAB's classes: how they are stored is published nowhere."""
    return UserError(
        f"{place} holds an object of MATLAB (a string in double quotes, a table, a date), which only MATLAB can read; "
        "save there cellstr(...) of texts and double(...) of numbers"
    )


class Room:
    """Bytes that the values of a file may still take.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.left = FLOOR + FACTOR * path.stat().st_size

    def take(self, count: int) -> None:
        """Counts bytes.

        Raises:
            UserError: If no honest file of this size holds so many.
        """
        self.left -= count
        if self.left < 0:
            raise UserError(
                f"{self.path} holds or claims more than {FACTOR} times its {self.path.stat().st_size:,} bytes, "
                "which may be an attack on memory (decompression bomb); save it again without compression"
            )


class _Inflated(io.RawIOBase):
    """What a compressed element unpacks to, piece by piece; nothing is kept.

    Args:
        file: Stands at the element's content.
        size: Bytes of the content.
        room: What is unpacked is counted here.
    """

    def __init__(self, file: IO[bytes], size: int, room: Room) -> None:
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


def require_honest(path: Path) -> None:
    """Goes through the elements of a MATLAB 5 file, keeping none, and refuses a bomb.

    SciPy makes room for the cells, fields and characters that a matrix declares before it reads them, at any depth.

    Args:
        path: A .mat file before v7.3.

    Raises:
        UserError: If it holds or claims more than `Room` has, or a variable is an object of MATLAB's.
        ValueError: If it is damaged.
    """
    room = Room(path)
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


def _count_elements(stream: IO[bytes], order: str, room: Room, end: int | None) -> None:
    """Counts what the matrices of a variable declare: it, and those in its cells and fields, as they follow.

    Args:
        stream: Stands at the variable's tag.
        order: Of the bytes, as `struct` writes it.
        room: Counts.
        end: Where the variable ends; None for the end of the stream.
    """
    cells = 0  # of the matrix at hand, where it has named fields
    outermost = True
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
            if kind == _OPAQUE and outermost:  # SciPy lists no variable of such a file
                raise objects_error(str(room.path))
            outermost = False
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
