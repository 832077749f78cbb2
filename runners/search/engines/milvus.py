"""Codes in Milvus: a file on this machine (Milvus Lite), or a server or cluster by its address."""

from collections import Counter
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

_PART = 1000  # rows in one request: some hundred kB
_MOST_HITS = 16384  # of one search, Milvus's own bound
_CONSISTENT = "Strong"  # a search sees every change made before it
_users: Counter[str] = Counter()  # engines of this process on a file of Milvus Lite, which has one server for all


@INDEXES.register("milvus")
class Milvus(Engine):
    """Exact, in a Milvus file or on a server or cluster: the way past one machine.

    Milvus has no transactions: rows are seen and durable one request after the other, so a killed process may leave a
    part of its changes. Indexing again completes them.
    """

    ties_by_number = False

    def __init__(self, folder: Path, header: Header, config: SearchConfig, *, writable: bool) -> None:
        pymilvus = extra("pymilvus", "requirements-engines.txt", "the engine milvus")
        self.errors = (pymilvus.exceptions.MilvusException, ConnectionError, OSError, RuntimeError, ValueError)
        self.header = header
        self.name = config.collection
        if config.address is None:
            raise UserError(
                "search.address is null: the engine milvus needs a file such as codes.db, or the address of a server "
                "such as http://localhost:19530"
            )
        self.address = config.address
        if "://" not in self.address:
            extra("milvus_lite", "requirements-engines.txt", "the engine milvus with a file")
            if not self.address.endswith(".db"):
                raise UserError(f"search.address={self.address}: a file of the engine milvus ends with .db")
        with self._named():
            self.client = pymilvus.MilvusClient(self.address, timeout=20)
        self._file = None if "://" in self.address else str(Path(self.address).resolve())
        if self._file is not None:
            _users[self._file] += 1
        try:
            with self._named():
                if not self.client.has_collection(self.name):
                    if not writable:
                        raise UserError(f"{self.address} has no collection {self.name}; index again")
                    self._make(pymilvus)
                else:
                    self._require_own()
                self.client.load_collection(self.name)
        except BaseException:
            self.close()
            raise

    def count(self, kinds: Sequence[Kind] = KINDS) -> int:
        """As `Engine.count`."""
        with self._named():
            found = self.client.query(
                self.name, filter=_among(kinds), output_fields=["count(*)"], consistency_level=_CONSISTENT
            )
        return int(found[0]["count(*)"])

    def listing(self) -> Iterator[tuple[int, Kind, str, str]]:
        """As `Engine.listing`."""
        rows: list[tuple[int, Kind, str, str]] = []
        with self._named():
            pages = self.client.query_iterator(
                self.name,
                batch_size=_PART,
                filter="id >= 0",
                output_fields=["id", "kind", "key", "stamp"],
                consistency_level=_CONSISTENT,
            )
            while page := pages.next():
                rows += [(row["id"], row["kind"], row["key"], row["stamp"]) for row in page]
            pages.close()
        yield from sorted(rows)

    def metadata(self, ids: Sequence[int]) -> list[dict[str, Any]]:
        """As `Engine.metadata`."""
        return self._field("metadata", ids)

    def codes(self, ids: Sequence[int]) -> npt.NDArray[np.uint8]:
        """As `Engine.codes`."""
        found = [np.frombuffer(b"".join(value), np.uint8) for value in self._field("code", ids)]
        return np.stack(found) if found else np.empty((0, self.header.width), np.uint8)

    def add(self, rows: Rows) -> None:
        """As `Engine.add`."""
        for start in range(0, len(rows), _PART):
            part = range(start, min(start + _PART, len(rows)))
            with self._named():
                self.client.upsert(
                    self.name,
                    [
                        {
                            "id": int(rows.ids[row]),
                            "kind": rows.kinds[row],
                            "key": rows.keys[row],
                            "stamp": rows.stamps[row],
                            "code": rows.codes[row].tobytes(),
                            "metadata": rows.metadata[row],
                        }
                        for row in part
                    ],
                )

    def remove(self, ids: Sequence[int]) -> None:
        """As `Engine.remove`."""
        for start in range(0, len(ids), _PART):
            with self._named():
                self.client.delete(self.name, ids=[int(row) for row in ids[start : start + _PART]])

    def search(
        self, codes: npt.NDArray[np.uint8], k: int, kinds: Sequence[Kind] = KINDS
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """As `Engine.search`; which of several rows at the last distance are kept is Milvus's choice."""
        wanted = min(k, self.count(kinds))
        if wanted > _MOST_HITS:
            raise UserError(f"Milvus finds at most {_MOST_HITS} rows a query, not {wanted}; lower search.k")
        ids = np.full((len(codes), k), -1, np.int64)
        distances = np.full((len(codes), k), -1, np.int64)
        if wanted:
            with self._named():
                found = self.client.search(
                    self.name,
                    data=[code.tobytes() for code in codes],
                    limit=wanted,
                    filter=_among(kinds),
                    anns_field="code",
                    search_params={"metric_type": "HAMMING"},
                    consistency_level=_CONSISTENT,
                )
            for query, hits in enumerate(found):
                ids[query, : len(hits)] = [hit["id"] for hit in hits]
                distances[query, : len(hits)] = [round(hit["distance"]) for hit in hits]
        return merged([(ids, distances)], k)

    def save(self) -> None:
        """As `Engine.save`: asks Milvus to write what it holds in memory."""
        with self._named():
            self.client.flush(self.name)

    def close(self) -> None:
        """As `Engine.close`; the process that Milvus Lite starts for a file ends with the last engine that uses it."""
        self.client.close()
        if self._file is not None:
            _users[self._file] -= 1
            if not _users[self._file]:
                manager = extra("milvus_lite.server_manager", "requirements-engines.txt", "the engine milvus")
                manager.server_manager_instance.release_server(self._file)
            self._file = None

    def _make(self, pymilvus: Any) -> None:
        kind = pymilvus.DataType
        schema = self.client.create_schema(auto_id=False, enable_dynamic_field=False, description=self._description)
        schema.add_field("id", kind.INT64, is_primary=True)
        schema.add_field("kind", kind.VARCHAR, max_length=8)
        schema.add_field("key", kind.VARCHAR, max_length=65535)
        schema.add_field("stamp", kind.VARCHAR, max_length=128)
        schema.add_field("code", kind.BINARY_VECTOR, dim=8 * self.header.width)
        schema.add_field("metadata", kind.JSON)
        index = self.client.prepare_index_params()
        index.add_index("code", index_type="BIN_FLAT", metric_type="HAMMING")
        self.client.create_collection(
            self.name, schema=schema, index_params=index, consistency_level=_CONSISTENT, timeout=60
        )

    @property
    def _description(self) -> str:
        return f"{self.header.bits} bits of {self.header.fingerprint}"

    def _require_own(self) -> None:
        there = self.client.describe_collection(self.name)["description"]
        if there != self._description:
            raise UserError(
                f"the collection {self.name} of {self.address} holds other codes ({there or 'not of this library'}); "
                "choose another search.collection"
            )

    def _field(self, name: str, ids: Sequence[int]) -> list[Any]:
        found: dict[int, Any] = {}
        for start in range(0, len(ids), _PART):
            part = [int(row) for row in ids[start : start + _PART]]
            with self._named():
                rows = self.client.get(self.name, ids=part, output_fields=["id", name])
            found.update({row["id"]: row[name] for row in rows})
        return [found[int(row)] for row in ids]

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Turns what the client reports into one line that names the address."""
        try:
            yield
        except UserError:
            raise
        except self.errors as error:
            why = " ".join(str(getattr(error, "message", error)).split())[:300]
            raise UserError(f"Milvus at {self.address}: {why}; is it running, and is search.address right?") from None


def _among(kinds: Sequence[Kind]) -> str:
    return f"kind in [{', '.join(repr(kind) for kind in kinds)}]"
