"""Codes in PostgreSQL with the extension pgvector."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import UserError
from common.registry import INDEXES
from runners.search.engine import KINDS, Engine, Header, Kind, Rows, merged
from runners.search.settings import SearchConfig
from utils.extras import extra


@INDEXES.register("pgvector")
class PgVector(Engine):
    """Exact, in a table of any PostgreSQL with pgvector; changes are one transaction."""

    def __init__(self, folder: Path, header: Header, config: SearchConfig, *, writable: bool) -> None:
        psycopg = extra("psycopg", "requirements-engines.txt", "the engine pgvector")
        self.errors = psycopg.Error
        self.bits = 8 * header.width
        self.width = header.width
        self.table = config.collection
        if config.address is None:
            raise UserError(
                "search.address is null: the engine pgvector needs a connection string such as "
                "postgresql://user@localhost/database"
            )
        description = f"{header.bits} bits of {header.fingerprint}"
        with self._named():
            self.connection = psycopg.connect(config.address, connect_timeout=20)
            try:
                if writable:
                    self._claim(description)
                self._require_own(description)
                self.connection.commit()
            except BaseException:
                self.connection.close()
                raise

    def count(self, kinds: Sequence[Kind] = KINDS) -> int:
        """As `Engine.count`."""
        return int(self._rows(f"SELECT COUNT(*) FROM {self.table} WHERE kind = ANY(%s)", [list(kinds)])[0][0])

    def listing(self) -> Iterator[tuple[int, Kind, str, str]]:
        """As `Engine.listing`."""
        yield from self._rows(f"SELECT id, kind, key, stamp FROM {self.table} ORDER BY id", [])

    def metadata(self, ids: Sequence[int]) -> list[dict[str, Any]]:
        """As `Engine.metadata`."""
        return self._field("metadata", ids)

    def codes(self, ids: Sequence[int]) -> npt.NDArray[np.uint8]:
        """As `Engine.codes`."""
        words = self._field("code::text", ids)
        bits = np.array([[digit == "1" for digit in word] for word in words], bool).reshape(len(words), self.bits)
        return np.packbits(bits, axis=1)

    def add(self, rows: Rows) -> None:
        """As `Engine.add`."""
        words = _words(rows.codes)
        with self._named(), self.connection.cursor() as cursor:
            with cursor.copy(f"COPY {self.table} (id, kind, key, stamp, code, metadata) FROM STDIN") as copy:
                for row, word in enumerate(words):
                    # JSON escapes, so that the value holds no character that PostgreSQL's text cannot hold
                    stored = json.dumps(rows.metadata[row]).replace("\\u0000", "")
                    copy.write_row(
                        (int(rows.ids[row]), rows.kinds[row], rows.keys[row], rows.stamps[row], word, stored)
                    )

    def remove(self, ids: Sequence[int]) -> None:
        """As `Engine.remove`."""
        with self._named():
            self.connection.execute(f"DELETE FROM {self.table} WHERE id = ANY(%s)", [[int(row) for row in ids]])

    def search(
        self, codes: npt.NDArray[np.uint8], k: int, kinds: Sequence[Kind] = KINDS
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """As `Engine.search`."""
        ids = np.full((len(codes), k), -1, np.int64)
        distances = np.full((len(codes), k), -1, np.int64)
        nearest = (
            f"SELECT id, code <~> %s::bit({self.bits}) AS distance FROM {self.table} WHERE kind = ANY(%s) "
            "ORDER BY distance, id LIMIT %s"
        )
        for query, word in enumerate(_words(codes)):
            found = self._rows(nearest, [word, list(kinds), k])
            ids[query, : len(found)] = [row[0] for row in found]
            distances[query, : len(found)] = [int(row[1]) for row in found]
        return merged([(ids, distances)], k)

    def save(self) -> None:
        """As `Engine.save`: commits."""
        with self._named():
            self.connection.commit()

    def close(self) -> None:
        """As `Engine.close`."""
        self.connection.close()

    def _claim(self, description: str) -> None:
        """Keeps other writers out until the connection ends, and makes the table where it is missing."""
        taken = self.connection.execute("SELECT pg_try_advisory_lock(hashtext(%s))", [self.table]).fetchone()
        if taken is None or not taken[0]:
            raise UserError(f"another process is changing the table {self.table}; wait for it to end")
        self.connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
        there = self.connection.execute("SELECT to_regclass(%s)", [self.table]).fetchone()
        if there is None or there[0] is None:
            self.connection.execute(
                f"CREATE TABLE {self.table} (id bigint PRIMARY KEY, kind text NOT NULL, key text NOT NULL, "
                f"stamp text NOT NULL, code bit({self.bits}) NOT NULL, metadata jsonb NOT NULL)"
            )
            self.connection.execute(f"COMMENT ON TABLE {self.table} IS '{description}'")  # digits and hexadecimal

    def _require_own(self, description: str) -> None:
        found = self.connection.execute("SELECT obj_description(to_regclass(%s))", [self.table]).fetchone()
        there = None if found is None else found[0]
        if there != description:
            raise UserError(
                f"the table {self.table} holds other codes ({there or 'not of this library'}) or is not there; choose "
                "another search.collection, or index again"
            )

    def _rows(self, statement: str, values: list[Any]) -> list[Any]:
        with self._named():
            return list(self.connection.execute(statement, values).fetchall())

    def _field(self, column: str, ids: Sequence[int]) -> list[Any]:
        wanted = [int(row) for row in ids]
        found = dict(self._rows(f"SELECT id, {column} FROM {self.table} WHERE id = ANY(%s)", [wanted]))
        return [found[row] for row in wanted]

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Turns what the server reports into one line."""
        try:
            yield
        except self.errors as error:
            why = " ".join(str(error).split())[:300]
            raise UserError(f"PostgreSQL: {why}; is the server running, and is search.address right?") from None


def _words(codes: npt.NDArray[np.uint8]) -> list[str]:
    """Packed codes [N, W] as words of zeros and ones."""
    return ["".join("01"[bit] for bit in row) for row in np.unpackbits(codes, axis=1).tolist()]
