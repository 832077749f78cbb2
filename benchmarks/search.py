"""Queries a second, recall and memory of the embedded engines of an index, in one run beside others' ways.

    python -m benchmarks.search                                    # a million codes of 64 bits, the 100 nearest
    python -m benchmarks.search --codes 10000000 --queries 32 --repeats 3

`FAISS alone` is `IndexBinaryFlat` called directly: as it is made (`heap`), and with the counting that the engine `flat`
chooses (`counting`). `NumPy` xors, counts ones and partitions, one query after the other. `reading all codes` is the
limit of memory: eight bytes a code, added up once a query by every core, and nothing kept; only ways that look at
fewer codes, or at several queries at a time, get below it. Codes are grouped, as trained ones are: each is one of many
centres with some bits turned. Engines are measured without their catalog, which gives hits their paths and texts.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import torch

from benchmarks.report import machine, print_table, write_results
from benchmarks.retrieval import measured
from common.config import load_section
from runners.search.building import DEFAULTS
from runners.search.embedded import Neighbours
from runners.search.engine import merged
from runners.search.engines.flat import FlatNeighbours
from runners.search.engines.ivf import IvfNeighbours
from runners.search.settings import SearchConfig
from utils.output import say

Packed = npt.NDArray[np.uint8]
Hits = tuple[npt.NDArray[Any], npt.NDArray[Any]]  # numbers and distances, whole, [Q, k]
_TURNED = 0.12  # share of bits in which a code differs from its centre


def make_codes(count: int, queries: int, bits: int, centres: int, seed: int) -> tuple[Packed, Packed]:
    """Grouped codes and queries of the same groups, packed: [N, W] and [Q, W] uint8."""
    draw = np.random.default_rng(seed)
    middle = draw.integers(0, 256, (centres, bits // 8), np.uint8)
    tables = []
    for rows in (count, queries):
        packed = middle[draw.integers(0, centres, rows)]
        for start in range(0, rows, 2**18):
            part = packed[start : start + 2**18]
            part ^= np.packbits(draw.random((len(part), bits), np.float32) < _TURNED, axis=1)
        tables.append(packed)
    return tables[0], tables[1]


def numpy_search(codes: Packed, queries: Packed, k: int) -> Hits:
    """The k nearest by xor, popcount and partition: codes [N, W], queries [Q, W]."""
    words, asked = codes.view(np.uint64), queries.view(np.uint64)
    found = []
    for query in asked:
        distances = np.bitwise_count(words ^ query).sum(axis=1, dtype=np.uint16)
        places = np.argpartition(distances, k - 1)[:k]
        order = np.lexsort((places, distances[places]))
        found.append((places[order], distances[places][order].astype(np.int64)))
    ids, distances = zip(*found, strict=True)
    return np.stack(ids), np.stack(distances)


def read_all(codes: Packed, times: int, pool: ThreadPoolExecutor, threads: int) -> None:
    """Adds up all codes [N, W], some times over, a part in each thread."""
    parts = np.array_split(codes.view(np.uint64), threads)
    for _ in range(times):
        list(pool.map(np.add.reduce, parts))


def recall(found: Hits, exact: Hits) -> float:
    """Share of the k nearest that was found; of items at the distance of the last, any will do."""
    return float(((found[0] >= 0) & (found[1] <= exact[1][:, -1:])).mean())


def main() -> None:
    """Measures, prints a table, and writes the numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codes", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=128, help="asked at once")
    parser.add_argument("--bits", type=int, default=64, choices=range(64, 1025, 64), metavar="BITS")
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--centres", type=int, default=1000, help="groups of codes")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("result/benchmarks/search.json"))
    args = parser.parse_args()
    write_results(args.output, measure(args))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All figures, as they are written; prints the table."""
    faiss.omp_set_num_threads(args.threads)
    config = load_section(DEFAULTS, "search", SearchConfig, [])
    codes, queries = make_codes(args.codes, args.queries, args.bits, args.centres, args.seed)
    ids = np.arange(args.codes, dtype=np.int64)

    def engine(kind: type[Neighbours]) -> Callable[[Packed], Hits]:
        laid = kind(ids, codes, config)
        laid.search(queries[:1], args.k)  # flat lays codes out at the first question
        return lambda asked: merged([laid.search(asked, args.k)], args.k)

    def alone(use_heap: bool) -> Callable[[Packed], Hits]:
        index: Any = faiss.IndexBinaryFlat(args.bits)
        index.use_heap = use_heap
        index.add(codes)
        return lambda asked: index.search(asked, args.k)[::-1]

    makers: dict[str, Callable[[], Callable[[Packed], Hits]]] = {
        "flat": lambda: engine(FlatNeighbours),
        "FAISS alone, counting": lambda: alone(False),
        "FAISS alone, heap": lambda: alone(True),
        "ivf": lambda: engine(IvfNeighbours),
        "NumPy": lambda: lambda asked: numpy_search(codes, asked, args.k),
    }
    ways: dict[str, Callable[[Packed], Any]] = {}
    built: dict[str, tuple[float, float]] = {}
    for name, maker in makers.items():

        def build(name: str = name, maker: Callable[[], Callable[[Packed], Hits]] = maker) -> None:
            ways[name] = maker()

        built[name] = measured(build)
    pool = ThreadPoolExecutor(args.threads)
    ways["reading all codes"] = lambda asked: read_all(codes, len(asked), pool, args.threads)

    slow = {"NumPy": max(1, args.queries // 16)}  # queries that are asked of it
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    single: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, Any] = {}
    for _ in range(args.repeats):  # interleaved, so that a busy moment of the machine meets all alike
        for name, way in ways.items():
            asked = queries[: slow.get(name, args.queries)]
            start = time.perf_counter()
            found[name] = way(asked)
            seconds[name].append((time.perf_counter() - start) / len(asked))
            for query in queries[:4]:
                start = time.perf_counter()
                way(query[None])
                single[name].append(time.perf_counter() - start)
    pool.shutdown()

    exact = found["FAISS alone, counting"]
    rows: dict[str, dict[str, float]] = {}
    for name in ways:
        rows[name] = {
            "queries_per_s": 1 / statistics.median(seconds[name]),
            "single_ms": 1000 * statistics.median(single[name]),
            "ratio_to_faiss": statistics.median(seconds["FAISS alone, counting"]) / statistics.median(seconds[name]),
        }
        if name in built:
            count = len(found[name][1])
            rows[name] |= {
                "recall": recall(found[name], (exact[0][:count], exact[1][:count])),
                "build_s": built[name][0],
                "build_peak_mb": built[name][1],
            }
    results: dict[str, Any] = {
        "settings": {name: value for name, value in vars(args).items() if name != "output"}
        | {"lists": config.lists, "probes": config.probes},
        "machine": f"{machine(torch.device('cpu'))}, FAISS {faiss.__version__}",
        "codes_mb": codes.nbytes / 1e6,
        "read_gb_per_s": codes.nbytes * rows["reading all codes"]["queries_per_s"] / 1e9,
        "flat_equals_faiss": bool((found["flat"][1] == exact[1]).all()),
        "ways": rows,
    }
    say(
        f"{args.codes:,} codes of {args.bits} bits ({results['codes_mb']:.0f} MB), {args.queries} queries at once, "
        f"k = {args.k}, {args.threads} threads, {args.repeats} repeats; ivf: {config.probes} of {config.lists} lists"
    )
    say(f"{results['machine']}; memory gives {results['read_gb_per_s']:.1f} GB/s")
    columns = [("queries / s", "queries_per_s", ".0f"), ("x FAISS", "ratio_to_faiss", ".2f"),
               ("one query, ms", "single_ms", ".2f"), ("recall", "recall", ".4f"),
               ("built in s", "build_s", ".1f"), ("peak MB", "build_peak_mb", ".0f")]  # fmt: skip
    print_table(rows, columns)
    if not results["flat_equals_faiss"]:
        raise RuntimeError("flat and FAISS give other distances")
    return results


if __name__ == "__main__":
    main()
