"""Rows of an index in one SQLite file: what the embedded engines are rebuilt from, and what hits are shown with."""

import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt

from common.errors import UserError
from runners.search.engine import KINDS, Kind, Rows

_TABLES = """
CREATE TABLE IF NOT EXISTS state (generation INTEGER NOT NULL);
INSERT INTO state SELECT 0 WHERE NOT EXISTS (SELECT 1 FROM state);
CREATE TABLE IF NOT EXISTS rows (
    id INTEGER PRIMARY KEY, kind TEXT NOT NULL, key TEXT NOT NULL, stamp TEXT NOT NULL, code BLOB NOT NULL,
    metadata TEXT NOT NULL
);
"""
_PART = 500  # row numbers in one statement


def connect(path: Path, *, writable: bool, tables: str) -> sqlite3.Connection:
    """Opens a SQLite file, with its tables made where they are missing.

    Raises:
        UserError: If it cannot be opened, or is none.
    """
    with sqlite_errors(path):
        # Readers open it for writing, too, where they may: after a kill SQLite has to undo half a commit first.
        mode = "rwc" if writable else "rw"
        connection = sqlite3.connect(
            f"file:{quote(str(path.absolute()))}?mode={mode}", uri=True, check_same_thread=False
        )
        try:
            if writable:
                connection.executescript(tables)
            else:
                connection.execute("SELECT * FROM sqlite_schema").fetchall()
                connection.execute("PRAGMA query_only = ON")
        except BaseException:
            connection.close()
            raise
        return connection


@contextmanager
def sqlite_errors(path: Path) -> Iterator[None]:
    """Turns what SQLite reports into one line that names the file."""
    try:
        yield
    except sqlite3.Error as error:
        raise UserError(
            f"{path} cannot be read or written ({error}); free some room, restore it, or remove its folder and index "
            "again"
        ) from None


class Catalog:
    """The rows of an embedded engine. Changes are one transaction, from the first after a `commit` to the next.

    Args:
        path: The SQLite file; made where it is missing and `writable`.
        width: Bytes W of a code.
        writable: Whether it will be changed.
    """

    def __init__(self, path: Path, width: int, *, writable: bool) -> None:
        self.path = path
        self.width = width
        self._connection = connect(path, writable=writable, tables=_TABLES)

    @property
    def generation(self) -> int:
        """Number of commits so far."""
        with sqlite_errors(self.path):
            return int(self._connection.execute("SELECT generation FROM state").fetchone()[0])

    def count(self, kinds: Sequence[Kind] = KINDS) -> int:
        """Number of rows of some kinds."""
        marks = ",".join("?" * len(kinds))
        with sqlite_errors(self.path):
            found = self._connection.execute(f"SELECT COUNT(*) FROM rows WHERE kind IN ({marks})", tuple(kinds))
            return int(found.fetchone()[0])

    def listing(self) -> Iterator[tuple[int, Kind, str, str]]:
        """Number, kind, key and stamp of every row, by number."""
        with sqlite_errors(self.path):
            yield from self._connection.execute("SELECT id, kind, key, stamp FROM rows ORDER BY id")

    def metadata(self, ids: Sequence[int]) -> list[dict[str, Any]]:
        """The JSON values stored with some rows.

        Raises:
            KeyError: If there is no such row.
        """
        return [json.loads(text) for text in self._column("metadata", ids)]

    def codes(self, ids: Sequence[int]) -> npt.NDArray[np.uint8]:
        """Packed codes of some rows, [N, W] uint8.

        Raises:
            KeyError: If there is no such row.
        """
        return self._unpack(self._column("code", ids))

    def all_codes(self, kind: Kind) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
        """Numbers [N] int64 and packed codes [N, W] uint8 of all rows of a kind, by number."""
        with sqlite_errors(self.path):
            rows = self._connection.execute("SELECT id, code FROM rows WHERE kind = ? ORDER BY id", (kind,)).fetchall()
        return np.array([row[0] for row in rows], np.int64), self._unpack([row[1] for row in rows])

    def add(self, rows: Rows) -> None:
        """Adds rows."""
        values = zip(
            rows.ids.tolist(),
            rows.kinds,
            rows.keys,
            rows.stamps,
            (code.tobytes() for code in rows.codes),
            (json.dumps(value, ensure_ascii=False) for value in rows.metadata),
            strict=True,
        )
        with sqlite_errors(self.path):
            self._connection.executemany("INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?)", values)

    def remove(self, ids: Sequence[int]) -> None:
        """Removes rows."""
        with sqlite_errors(self.path):
            self._connection.executemany("DELETE FROM rows WHERE id = ?", ((int(row),) for row in ids))

    def commit(self) -> int:
        """Makes the changes since the last commit durable, together; returns the new generation."""
        with sqlite_errors(self.path):
            self._connection.execute("UPDATE state SET generation = generation + 1")
            self._connection.commit()
        return self.generation

    def close(self) -> None:
        """Closes the file; what was not committed is dropped."""
        self._connection.close()

    def _column(self, name: str, ids: Sequence[int]) -> list[Any]:
        found: dict[int, Any] = {}
        with sqlite_errors(self.path):
            for start in range(0, len(ids), _PART):
                part = [int(row) for row in ids[start : start + _PART]]
                marks = ",".join("?" * len(part))
                found.update(self._connection.execute(f"SELECT id, {name} FROM rows WHERE id IN ({marks})", part))
        return [found[int(row)] for row in ids]

    def _unpack(self, blobs: Sequence[bytes]) -> npt.NDArray[np.uint8]:
        joined = b"".join(blobs)
        if len(joined) != len(blobs) * self.width:
            raise UserError(f"{self.path} holds codes of another length; remove its folder and index again")
        return np.frombuffer(joined, np.uint8).reshape(len(blobs), self.width)
