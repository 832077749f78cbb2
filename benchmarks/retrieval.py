"""Speed and memory of mAP@all against the way that published code computes it, in one run.

    python -m benchmarks.retrieval                                        # 2,000 x 18,015 x 64 bits, 24 labels
    python -m benchmarks.retrieval --queries 5000 --database 117218 --classes 80 --no-baseline
    python -m benchmarks.retrieval --queries 5000 --database 117218 --classes 80 --no-baseline --device cuda

The baseline is written from the formula as the published repositories evaluate it: one float matrix of all distances,
one of all relevances, a full sort of every row, a Python loop over queries. `reading each pair once` is the limit: it
looks at codes and labels of every pair, in vector instructions on every core, and neither counts nor keeps anything.
`four directions` computes all definitions of mAP at two cuts, NDCG and precision, four times.
"""

import argparse
import os
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

from benchmarks.report import machine, print_table, write_results
from common.metrics import average_precision, retrieval_values
from common.ranking import pack
from common.ranking_kernels import count_ones
from utils.output import say

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
    values = torch.zeros(len(query_codes), device=query_codes.device)
    for query in range(len(query_codes)):
        ranked = relevance[query][order[query]]
        ranks = torch.nonzero(ranked).squeeze(1).float() + 1
        if len(ranks):
            values[query] = (torch.arange(1, len(ranks) + 1, device=ranks.device) / ranks).mean()
    return values


def read_pairs(problem: Problem) -> None:
    """The least that any exact way has to do: look at code and labels of every pair once, and keep nothing."""
    query_codes, database_codes, query_labels, database_labels = (pack(table.cpu() > 0) for table in problem)
    database_codes, database_labels = (np.ascontiguousarray(words.T) for words in (database_codes, database_labels))
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
) -> np.uint64:
    total = np.uint64(0)
    size, part = database_codes.shape[1], 1024  # items that the first cache holds
    for row in range(len(query_codes)):
        for first in range(0, size, part):
            for word in range(len(database_codes)):
                code, codes = query_codes[row, word], database_codes[word, first : first + part]
                for item in range(len(codes)):
                    total += count_ones(code ^ codes[item])
            for word in range(len(database_labels)):
                label, labels = query_labels[row, word], database_labels[word, first : first + part]
                for item in range(len(labels)):
                    total += np.uint64((label & labels[item]) != 0)
    return total


def all_numbers(problem: Problem) -> list[Tensor]:
    """Every number of a results table for four directions; here all four have the same codes.

    Returns:
        Numbers of the last direction, each [Q] float64 on the CPU.
    """
    for _ in range(4):
        values = retrieval_values(*problem, cutoffs=["all", 50], definitions=["relevant", "top", "expected"])
    return [value.cpu() for value in values.values()]


def measured(work: Callable[[], Any]) -> tuple[float, float]:
    """Runs once and returns seconds and the peak of memory above its start, MB: the card's if there is work on one."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        held, start = torch.cuda.memory_allocated(), time.perf_counter()
        work()
        torch.cuda.synchronize()
        return time.perf_counter() - start, (torch.cuda.max_memory_allocated() - held) / 1e6
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
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="where to rank: cpu or cuda")
    parser.add_argument(
        "--no-baseline", action="store_true", help="leave out the published way, which needs 16 B a pair"
    )
    parser.add_argument("--output", type=Path, default=Path("result/benchmarks/retrieval.json"))
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    host = make_problem(args.queries, args.database, args.bits, args.classes, args.seed)
    problem: Problem = (
        host[0].to(args.device), host[1].to(args.device), host[2].to(args.device), host[3].to(args.device)
    )  # fmt: skip
    ways: dict[str, Callable[[], Any]] = {
        "this library": lambda: average_precision(*problem),
        "four directions": lambda: all_numbers(problem),
    }
    if args.device.type == "cpu":
        ways["reading each pair once"] = lambda: read_pairs(problem)
    if not args.no_baseline:
        ways["published way"] = lambda: baseline(*problem, stable=False)
    few: Problem = (problem[0][:4], problem[1][:4], problem[2][:4], problem[3][:4])
    average_precision(*few)  # compiles, or reads what an earlier run compiled
    all_numbers(few)
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
        "settings": {name: value for name, value in vars(args).items() if name != "output"}
        | {"device": str(args.device)},
        "machine": machine(args.device),
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
    say(results["machine"])
    columns = [("median s", "median_s", ".3f"), ("fastest s", "fastest_s", ".3f"), ("ns / pair", "ns_per_pair", ".2f"),
               ("peak MB", "peak_mb", ".0f"), ("x ours", "ratio_to_this_library", ".2f")]  # fmt: skip
    print_table(results["ways"], columns)
    if not args.no_baseline:
        difference = (average_precision(*problem).nan_to_num(0) - baseline(*problem, stable=True)).abs().max()
        results["largest_difference_of_an_average_precision"] = float(difference)
        say(f"largest difference of a query's average precision under the stable tie rule: {difference:.1e}")
    if args.device.type != "cpu":
        difference = max(
            (a - b).abs().nan_to_num(0).max() for a, b in zip(all_numbers(problem), all_numbers(host), strict=True)
        )
        results["largest_difference_to_the_cpu"] = float(difference)
        say(f"largest difference of a query's numbers to the CPU's: {difference:.1e}")
    write_results(args.output, results)


if __name__ == "__main__":
    main()
