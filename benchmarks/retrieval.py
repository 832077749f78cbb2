"""Speed and memory of mAP@all against the way that published code computes it, in one run.

    python -m benchmarks.retrieval                                        # 2,000 x 18,015 x 64 bits, 24 labels
    python -m benchmarks.retrieval --queries 5000 --database 117218 --classes 80 --no-baseline

The baseline is written from the formula as the published repositories evaluate it: one float matrix of all distances,
one of all relevances, a full sort of every row, a Python loop over queries.
"""

import argparse
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from common.metrics import average_precision
from common.ranking import count_ones, pack
from utils.files import write_json
from utils.logging import say

Problem = tuple[Tensor, Tensor, Tensor, Tensor]


def make_problem(queries: int, database: int, bits: int, classes: int, seed: int) -> Problem:
    """Random codes that carry their labels, one label each and every further one with chance 0.1.

    Args:
        queries: Q.
        database: D.
        bits: K.
        classes: C.
        seed: Of the draw.

    Returns:
        Codes [Q, K] and [D, K] float32, labels [Q, C] and [D, C] float32.
    """
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(classes, bits, generator=generator)
    tables = []
    for rows in (queries, database):
        labels = (torch.rand(rows, classes, generator=generator) < 0.1).float()
        labels[torch.arange(rows), torch.randint(0, classes, (rows,), generator=generator)] = 1
        noise = 1.5 * torch.randn(rows, bits, generator=generator)
        tables.append((torch.where(labels @ directions + noise > 0, 1.0, -1.0), labels))
    (query_codes, query_labels), (database_codes, database_labels) = tables
    return query_codes, database_codes, query_labels, database_labels


def baseline(
    query_codes: Tensor, database_codes: Tensor, query_labels: Tensor, database_labels: Tensor, stable: bool
) -> Tensor:
    """Average precision of every query the published way.

    Args:
        query_codes: Codes in {-1, +1}, [Q, K] float32.
        database_codes: Codes in {-1, +1}, [D, K] float32.
        query_labels: Multi-hot labels, [Q, C] float32.
        database_labels: Multi-hot labels, [D, C] float32.
        stable: Whether ties keep the database's order; published code does not ask for it.

    Returns:
        [Q] float32; 0 for a query without a relevant item.
    """
    distances = 0.5 * (query_codes.shape[1] - query_codes @ database_codes.T)  # [Q, D]
    relevance = (query_labels @ database_labels.T > 0).float()  # [Q, D]
    order = torch.sort(distances, dim=1, stable=stable).indices
    values = torch.zeros(len(query_codes))
    for query in range(len(query_codes)):
        ranked = relevance[query][order[query]]
        ranks = torch.nonzero(ranked).squeeze(1).float() + 1
        if len(ranks):
            values[query] = (torch.arange(1, len(ranks) + 1) / ranks).mean()
    return values


def read_pairs(problem: Problem) -> None:
    """The least that any exact way has to do: look at code and labels of every pair once, and keep nothing."""
    query_codes, database_codes, query_labels, database_labels = (pack(table > 0) for table in problem)
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(
            lambda part: _sum_of_pairs(
                query_codes[part::threads], database_codes, query_labels[part::threads], database_labels
            ),
            range(threads),
        ):
            pass


@numba.njit(nogil=True)
def _sum_of_pairs(
    query_codes: np.ndarray, database_codes: np.ndarray, query_labels: np.ndarray, database_labels: np.ndarray
) -> int:
    total = 0
    for row in range(len(query_codes)):
        for word in range(query_codes.shape[1]):
            for item in range(len(database_codes)):
                total += count_ones(query_codes[row, word] ^ database_codes[item, word])
        for word in range(query_labels.shape[1]):
            for item in range(len(database_codes)):
                total += (query_labels[row, word] & database_labels[item, word]) != 0
    return total


def measured(work: Callable[[], Any]) -> tuple[float, float]:
    """Runs once and returns seconds and the peak of resident memory above its start, MB."""
    start_pages = _resident()
    peak, done = [start_pages], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], _resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    return seconds, (peak[0] - start_pages) / 1e6


def _resident() -> int:
    """Resident memory of this process, bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Measures, prints a table, and writes the numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument("--database", type=int, default=18015)
    parser.add_argument("--bits", type=int, default=64)
    parser.add_argument("--classes", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--no-baseline", action="store_true", help="leave out the published way, which needs 16 B a pair"
    )
    parser.add_argument("--output", type=Path, default=Path("result/benchmarks/retrieval.json"))
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    problem = make_problem(args.queries, args.database, args.bits, args.classes, args.seed)
    ways: dict[str, Callable[[], Any]] = {
        "this library": lambda: average_precision(*problem),
        "reading each pair once": lambda: read_pairs(problem),
    }
    if not args.no_baseline:
        ways["published way"] = lambda: baseline(*problem, stable=False)
    few: Problem = (problem[0][:4], problem[1][:4], problem[2][:4], problem[3][:4])
    average_precision(*few)  # compiles, or reads what an earlier run compiled
    read_pairs(few)

    seconds: dict[str, list[float]] = {name: [] for name in ways}
    megabytes: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.repeats):  # interleaved, so that a busy moment of the machine meets all alike
        for name, work in ways.items():
            took, grown = measured(work)
            seconds[name].append(took)
            megabytes[name].append(grown)

    pairs = args.queries * args.database
    ours = statistics.median(seconds["this library"])
    results: dict[str, Any] = {
        "settings": {name: value for name, value in vars(args).items() if name != "output"},
        "machine": f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}",
        "relevant_pairs": float((problem[2] @ problem[3][:1000].T > 0).float().mean()),
        "ways": {
            name: {
                "median_s": statistics.median(seconds[name]),
                "fastest_s": min(seconds[name]),
                "ns_per_pair": statistics.median(seconds[name]) / pairs * 1e9,
                "peak_mb": max(megabytes[name]),
                "ratio_to_this_library": statistics.median(seconds[name]) / ours,
            }
            for name in ways
        },
    }
    say(
        f"{args.queries} queries x {args.database} items x {args.bits} bits, {args.classes} labels, "
        f"{args.threads} threads, {args.repeats} repeats; {results['relevant_pairs']:.0%} of pairs relevant"
    )
    say(f"{'':24}{'median s':>10}{'fastest s':>11}{'ns / pair':>11}{'peak MB':>9}{'x ours':>8}")
    for name, row in results["ways"].items():
        say(
            f"{name:24}{row['median_s']:10.3f}{row['fastest_s']:11.3f}{row['ns_per_pair']:11.2f}{row['peak_mb']:9.0f}"
            f"{row['ratio_to_this_library']:8.2f}"
        )
    if not args.no_baseline:
        difference = (average_precision(*problem).nan_to_num(0) - baseline(*problem, stable=True)).abs().max()
        results["largest_difference_of_an_average_precision"] = float(difference)
        say(f"largest difference of a query's average precision under the stable tie rule: {difference:.1e}")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.output, results)
    say(f"written to {args.output}")


if __name__ == "__main__":
    main()
