"""Ranking a database by Hamming distance, in blocks of queries: what the retrieval metrics are computed from.

Distances of K bits take K + 1 values, so a stable ranking needs no sort of items: counting how many lie at each
distance gives the rank where a distance begins, and a second pass over the items in database order gives every item
the next rank of its distance. On the CPU that is compiled code with bit operations, one block of queries a thread;
elsewhere torch's own operations do it.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from numba.extending import intrinsic
from torch import Tensor

from utils.compiled import compiled

Words = np.ndarray[Any, np.dtype[np.uint64]]

_PAIRS_ON_CPU = 1 << 20  # pairs ranked at a time by one thread: at most 20 MB
_PAIRS_ON_ACCELERATOR = 1 << 24  # at most 1 GB


@dataclass(frozen=True)
class Ranking:
    """The ranked database of q queries, reduced to its relevant items: those that share a label with the query.

    The n relevant items of all q queries stand one query after the other, each query's by rank.

    Attributes:
        size: D, number of database items.
        relevant: R, number of relevant items, [q] int64.
        places: row D + rank, with row and rank counted from 0; ascending, [n] int64.
        shared: Labels that the item shares with its query, [n] int16, at least 1.
        precision_sums: For the j-th relevant item of a query at rank r_j (both from 1), the sum of i / r_i over all
            i <= j, [n] float64.
        items: Items at every distance, [q, K + 1] int64.
        hits: Relevant items at every distance, [q, K + 1] int64.
    """

    size: int
    relevant: Tensor
    places: Tensor
    shared: Tensor
    precision_sums: Tensor
    items: Tensor
    hits: Tensor

    @property
    def rows(self) -> Tensor:
        """Query of every relevant item, [n] int64."""
        return torch.repeat_interleave(self.relevant)

    @property
    def starts(self) -> Tensor:
        """Where each query's relevant items start, [q] int64."""
        return self.relevant.cumsum(0) - self.relevant

    def hits_within(self, rank: int) -> Tensor:
        """Relevant items up to a rank (from 1), [q] int64."""
        if rank >= self.size:
            return self.relevant
        limits = torch.arange(len(self.relevant), device=self.relevant.device) * self.size + rank
        return torch.searchsorted(self.places, limits) - self.starts

    def precision_sum(self, count: Tensor) -> Tensor:
        """Sum of j / r_j over the first `count` [q] relevant items, [q] float64; `count` is at most `relevant`."""
        if len(self.precision_sums) == 0:
            return torch.zeros_like(count, dtype=torch.float64)
        last = (self.starts + count - 1).clamp(min=0)
        return self.precision_sums[last].where(count > 0, 0.0)


def rank_and_measure(
    codes: tuple[Tensor, Tensor], labels: tuple[Tensor, Tensor], measure: Callable[[Ranking], Tensor]
) -> Tensor:
    """Ranks the database for all queries and reduces every block of queries to numbers.

    Args:
        codes: Codes in {-1, +1} of queries [Q, K] and database [D, K], on the device that does the work.
        labels: Multi-hot labels of queries [Q, C] and database [D, C], on the same device.
        measure: Ranking of q queries -> [q, M]. Called from several threads on the CPU; the ranking is valid only
            during the call.

    Returns:
        [Q, M] in the order of the queries.
    """
    if codes[0].device.type == "cpu":
        return _on_cpu(codes, labels, measure)
    return torch.cat([measure(ranking) for ranking in rank_with_torch(codes, labels)])


def rank_with_torch(codes: tuple[Tensor, Tensor], labels: tuple[Tensor, Tensor]) -> Iterator[Ranking]:
    """Rankings of consecutive blocks of queries, by operations that every device has.

    Args:
        codes: As `rank_and_measure`.
        labels: As `rank_and_measure`.
    """
    bits, size = codes[0].shape[1], len(codes[1])
    database_codes, database_labels = codes[1].float().T, labels[1].float().T
    ranks = torch.arange(1, size + 1, device=codes[1].device)
    rows = max(1, _PAIRS_ON_ACCELERATOR // size)
    for start in range(0, len(codes[0]), rows):
        query_codes, query_labels = (table[start : start + rows].float() for table in (codes[0], labels[0]))
        distances = ((bits - query_codes @ database_codes) / 2).short()  # [q, D]; sums below 2^24 are exact
        shared = (query_labels @ database_labels).short()
        index = distances.long()
        empty = index.new_zeros(len(index), bits + 1)
        items = empty.scatter_add(1, index, torch.ones_like(index))
        hits = empty.scatter_add(1, index, (shared > 0).long())
        del index
        shared = shared.gather(1, distances.sort(dim=1, stable=True).indices)
        found = shared > 0
        precision = torch.where(found, found.cumsum(1).double() / ranks, 0.0)
        yield Ranking(
            size=size,
            relevant=hits.sum(1),
            places=found.flatten().nonzero().squeeze(1),
            shared=shared[found],
            precision_sums=precision.cumsum(1)[found],
            items=items,
            hits=hits,
        )


# ---------------------------------------------------------------------------------------------- on the CPU


def _on_cpu(
    codes: tuple[Tensor, Tensor], labels: tuple[Tensor, Tensor], measure: Callable[[Ranking], Tensor]
) -> Tensor:
    bits, size, queries = codes[0].shape[1], len(codes[1]), len(codes[0])
    query_codes, database_codes = (pack(table > 0) for table in codes)
    query_labels, database_labels = (pack(table != 0) for table in labels)
    threads = torch.get_num_threads()
    rows = max(1, min(_PAIRS_ON_CPU // size, -(-queries // threads)))
    # Every thread writes its blocks into the same memory again: fresh pages would cost as much as the ranking.
    free: SimpleQueue[list[np.ndarray]] = SimpleQueue()
    for _ in range(threads):
        free.put([np.empty(rows * size, dtype) for dtype in (np.int64, np.int16, np.float64)])

    def measure_rows(start: int) -> Tensor:
        block = slice(start, start + rows)
        out = free.get()
        try:
            relevant, items, hits = _rank(
                query_codes[block], database_codes, query_labels[block], database_labels, bits, *out
            )
            count = relevant.sum()
            places, shared, precision_sums = (torch.from_numpy(array[:count]) for array in out)
            relevant, items, hits = (torch.from_numpy(array) for array in (relevant, items, hits))
            return measure(Ranking(size, relevant, places, shared, precision_sums, items, hits))
        finally:
            free.put(out)

    with ThreadPoolExecutor(threads) as pool:
        return torch.cat(list(pool.map(measure_rows, range(0, queries, rows))))


def pack(table: Tensor) -> Words:
    """Rows of bools as rows of 64-bit words, the last one filled up with zeros.

    Args:
        table: [N, W] bool, on the CPU.

    Returns:
        [N, ceil(W / 64)].
    """
    packed = np.packbits(table.numpy(), axis=1)
    return np.ascontiguousarray(np.pad(packed, ((0, 0), (0, -packed.shape[1] % 8)))).view(np.uint64)


def _emit_count_ones(context: Any, word: Any) -> Any:
    """Number of ones of a word, [] uint64: the processor's instruction, which numba has no name for."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return word(word), emit


count_ones: Any = intrinsic(_emit_count_ones)


@compiled
def _rank(
    query_codes: Words,
    database_codes: Words,
    query_labels: Words,
    database_labels: Words,
    bits: int,
    places: np.ndarray,
    shared: np.ndarray,
    sums: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fills the start of `places`, `shared` and `sums`; returns `relevant`, `items` and `hits` of a Ranking."""
    queries, size = len(query_codes), len(database_codes)
    relevant = np.zeros(queries, np.int64)
    items = np.zeros((queries, bits + 1), np.int64)
    hits = np.zeros((queries, bits + 1), np.int64)
    distance_of = np.empty(size, np.uint16)
    shared_of = np.empty(size, np.int16)
    next_rank = np.empty(bits + 1, np.int64)
    next_hit = np.empty(bits + 1, np.int64)
    # Relevant items by distance. An irrelevant one is written too, where the next relevant one of its distance will
    # overwrite it: no branch to mispredict. Each distance has one place more for the last of them.
    rank_of = np.empty(size + bits + 1, np.int32)
    labels_of = np.empty(size + bits + 1, np.int16)
    count = 0
    for row in range(queries):
        code, label = query_codes[row], query_labels[row]
        for item in range(size):
            distance_of[item] = count_ones(code[0] ^ database_codes[item, 0])
            shared_of[item] = count_ones(label[0] & database_labels[item, 0])
        for word in range(1, len(code)):
            for item in range(size):
                distance_of[item] += count_ones(code[word] ^ database_codes[item, word])
        for word in range(1, len(label)):
            for item in range(size):
                shared_of[item] += count_ones(label[word] & database_labels[item, word])
        for item in range(size):
            items[row, distance_of[item]] += 1
            hits[row, distance_of[item]] += shared_of[item] > 0
        rank = 0
        slot = 0
        for distance in range(bits + 1):
            next_rank[distance] = rank
            next_hit[distance] = slot
            rank += items[row, distance]
            slot += hits[row, distance] + 1
        for item in range(size):
            distance = distance_of[item]
            slot = next_hit[distance]
            rank_of[slot] = next_rank[distance]
            labels_of[slot] = shared_of[item]
            next_rank[distance] += 1
            next_hit[distance] = slot + (shared_of[item] > 0)
        total = 0.0
        found = 0
        slot = 0
        for distance in range(bits + 1):
            for _ in range(hits[row, distance]):
                found += 1
                total += found / (rank_of[slot] + 1)
                places[count] = row * size + rank_of[slot]
                shared[count] = labels_of[slot]
                sums[count] = total
                count += 1
                slot += 1
            slot += 1
        relevant[row] = found
    return relevant, items, hits
