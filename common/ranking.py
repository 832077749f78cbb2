"""Ranking a database by Hamming distance, in blocks of queries: what the retrieval metrics are computed from.

Distances of K bits take K + 1 values, so a stable ranking needs no sort: the rank of an item is the number of items at
smaller distances, plus the number at its own distance that stand before it. One pass in database order counts both;
only relevant items are then put in place. On the CPU that is compiled code with bit operations, one block of queries a
thread; elsewhere torch's own operations do it.

An item may have n codes; the distance of two items is then that of their nearest pair of codes.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from queue import SimpleQueue

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common import ranking_kernels as kernels

_PAIRS_ON_CPU = 1 << 20  # pairs ranked at a time by one thread: at most 6 MB
_PAIRS_ON_ACCELERATOR = 1 << 27  # ranked at a time, where its free memory allows so many
_ITEMS_OF_A_LANE = 256  # database items that one counter goes through, one after the other


@dataclass(frozen=True)
class Ranking:
    """The ranked database of q queries, reduced to its relevant items: those that share a label with the query.

    The n relevant items of all q queries stand one query after the other, each query's by rank.

    Attributes:
        size: D, number of database items.
        relevant: R, number of relevant items, [q] int64.
        ranks: From 0; ascending within a query, [n] int32.
        shared: Labels that the item shares with its query, [n] int16, at least 1.
        items: Items at every distance, [q, K + 1] int64.
        hits: Relevant items at every distance, [q, K + 1] int64.
    """

    size: int
    relevant: Tensor
    ranks: Tensor
    shared: Tensor
    items: Tensor
    hits: Tensor

    @cached_property
    def rows(self) -> Tensor:
        """Query of every relevant item, [n] int64."""
        return torch.repeat_interleave(self.relevant)

    @cached_property
    def numbers(self) -> Tensor:
        """Of every relevant item among those of its query, from 1, [n] int64."""
        return torch.arange(1, len(self.ranks) + 1, device=self.ranks.device) - self.starts[self.rows]

    @property
    def starts(self) -> Tensor:
        """Where each query's relevant items start, [q] int64."""
        return self.relevant.cumsum(0) - self.relevant

    @cached_property
    def places(self) -> Tensor:
        """Row times D, plus rank, of every relevant item; ascending, [n] int64."""
        return self.rows * self.size + self.ranks

    def hits_within(self, rank: int) -> Tensor:
        """Relevant items up to a rank (from 1), [q] int64."""
        if rank >= self.size:
            return self.relevant
        limits = torch.arange(len(self.relevant), device=self.relevant.device) * self.size + rank
        return torch.searchsorted(self.places, limits) - self.starts

    def precision_sum(self, count: Tensor) -> Tensor:
        """Sum of j / r_j over the first `count` [q] relevant items, r_j being the rank (from 1) of the j-th.

        Returns:
            [q] float64; `count` is at most `relevant`.
        """
        precision = (self.numbers.double() / (self.ranks + 1)).where(self.numbers <= count[self.rows], 0.0)
        return torch.segment_reduce(precision, "sum", lengths=self.relevant, unsafe=True)

    def gain_sum(self, gains: Tensor, discounts: Tensor, count: Tensor) -> Tensor:
        """Sum over the first `count` relevant items of the gain for the labels shared times the discount of the rank.

        Args:
            gains: For every number of shared labels from 0, [S + 1] float64.
            discounts: For every rank, [D] float64.
            count: At most `relevant`, [q] int64.

        Returns:
            [q] float64.
        """
        products = (gains[self.shared.int()] * discounts[self.ranks]).where(self.numbers <= count[self.rows], 0.0)
        return products.new_zeros(len(self.relevant)).index_add(0, self.rows, products)

    def sharing(self, most: int) -> Tensor:
        """Relevant items that share at least 1, 2, ..., `most` labels with their query, [q, most] int64.

        Args:
            most: S, which the labels shared never exceed.
        """
        counts = torch.bincount(self.rows * most + (most - self.shared), minlength=len(self.relevant) * most)
        return counts.view(-1, most).cumsum(1).flip(1)


class CompiledRanking(Ranking):
    """A ranking on the CPU, which compiled loops sum over without anything of the size of its relevant items."""

    def hits_within(self, rank: int) -> Tensor:
        """As `Ranking`, [q]."""
        return torch.from_numpy(kernels.hits_within(self.ranks.numpy(), self.relevant.numpy(), rank))

    def precision_sum(self, count: Tensor) -> Tensor:
        """As `Ranking`, for `count` [q], [q]."""
        return torch.from_numpy(kernels.precision_sums(self.ranks.numpy(), self.relevant.numpy(), count.numpy()))

    def gain_sum(self, gains: Tensor, discounts: Tensor, count: Tensor) -> Tensor:
        """As `Ranking`, for `gains` [S + 1], `discounts` [D] and `count` [q], [q]."""
        tables = (table.numpy() for table in (self.ranks, self.shared, self.relevant, gains, discounts, count))
        return torch.from_numpy(kernels.gain_sums(*tables))

    def sharing(self, most: int) -> Tensor:
        """As `Ranking`, [q, most]."""
        return torch.from_numpy(kernels.sharing(self.shared.numpy(), self.relevant.numpy(), most))


def rank_and_measure(
    codes: tuple[Tensor, Tensor], labels: tuple[Tensor, Tensor], measure: Callable[[Ranking], Tensor]
) -> Tensor:
    """Ranks the database for all queries and reduces every block of queries to numbers.

    Args:
        codes: Codes in {-1, +1} of queries [Q, K] or [Q, n, K] and database [D, K] or [D, m, K], on the device that
            does the work.
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

    Nothing is sorted. The database is cut into lanes of consecutive items, each with a counter for every distance; all
    lanes of all queries of a block take their next item at once, which tells how many of its distance came before it in
    the lane. Adding what earlier lanes and smaller distances hold gives its rank.

    Args:
        codes: As `rank_and_measure`.
        labels: As `rank_and_measure`.
    """
    bits, size, device = codes[0].shape[-1], len(codes[1]), codes[0].device
    length = min(_ITEMS_OF_A_LANE, size)
    lanes = -(-size // length)
    missing = lanes * length - size
    # The i-th items of all lanes stand together, [length, lanes, ...]; what fills up the last lane is farther than all.
    *database_codes, database_labels = (
        F.pad(table.float(), (0, 0, 0, missing)).view(lanes, length, -1).transpose(0, 1).flatten(0, 1).T
        for table in (*_by_place(codes[1]), labels[1])
    )
    filled = torch.arange(length, device=device)[:, None] + torch.arange(lanes, device=device) * length >= size
    rows = max(1, _pairs_at_once(device, bits, length) // (lanes * length))
    for start in range(0, len(codes[0]), rows):
        query_codes, query_labels = (table[start : start + rows].float() for table in (codes[0], labels[0]))
        queries = len(query_codes)
        pairs = product(_by_place(query_codes), database_codes)
        products = torch.matmul(*next(pairs))  # of the nearest codes, [q, length lanes]; sums < 2^24 are exact
        for pair in pairs:
            torch.maximum(products, torch.matmul(*pair), out=products)
        distances = products.sub_(bits).mul_(-0.5)
        distance = distances.view(queries, length, lanes).masked_fill_(filled, bits + 1).transpose(0, 1).long()
        del products, distances
        seen = torch.zeros(queries, lanes, bits + 2, dtype=torch.int32, device=device)
        before = torch.empty(length, queries, lanes, dtype=torch.int32, device=device)
        for i in range(length):
            which = distance[i].unsqueeze(-1)  # [q, lanes, 1]
            count = seen.gather(2, which)
            before[i] = count.squeeze(-1)
            seen.scatter_(2, which, count.add_(1))
        items = seen.sum(1)  # [q, K + 2] int64
        smaller = (items.cumsum(1) - items).int()
        seen = seen.cumsum(1, dtype=torch.int32).sub_(seen).add_(smaller.unsqueeze(1))
        before += seen.expand(length, -1, -1, -1).gather(3, distance.unsqueeze(-1)).squeeze(-1)
        del seen, distance
        shared = (query_labels @ database_labels).short()  # 0 for what fills up
        by_rank = torch.empty(queries, length * lanes, dtype=torch.int16, device=device)
        by_rank.scatter_(1, before.transpose(0, 1).flatten(1).long(), shared)
        del before, shared
        by_rank = by_rank[:, :size]
        found = by_rank > 0
        row, rank = found.nonzero(as_tuple=True)
        relevant = found.sum(1)
        del found
        ends = items[:, : bits + 1].cumsum(1) + torch.arange(queries, device=device).unsqueeze(1) * size
        within = torch.searchsorted(row * size + rank, ends) - (relevant.cumsum(0) - relevant).unsqueeze(1)
        yield Ranking(
            size=size,
            relevant=relevant,
            ranks=rank.int(),
            shared=by_rank[row, rank],
            items=items[:, : bits + 1],
            hits=within.diff(dim=1, prepend=within.new_zeros(queries, 1)),
        )


def _by_place(codes: Tensor) -> tuple[Tensor, ...]:
    """The first codes of all items, their second ones and so on: [N, K] or [N, n, K] -> n of [N, K]."""
    return codes.unbind(dim=1) if codes.ndim == 3 else (codes,)


def _pairs_at_once(device: torch.device, bits: int, length: int) -> int:
    """Pairs of query and item that one block may have, by the memory that is free."""
    if device.type != "cuda":
        return _PAIRS_ON_ACCELERATOR
    bytes_of_a_pair = 128 + 8 * (bits + 2) // length  # largest while relevant items are measured; then the counters
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(_PAIRS_ON_ACCELERATOR, free // (2 * bytes_of_a_pair))


# ---------------------------------------------------------------------------------------------- on the CPU


def _on_cpu(
    codes: tuple[Tensor, Tensor], labels: tuple[Tensor, Tensor], measure: Callable[[Ranking], Tensor]
) -> Tensor:
    bits, size, queries = codes[0].shape[-1], len(codes[1]), len(codes[0])
    query_codes = np.stack([pack(table > 0) for table in _by_place(codes[0])], axis=1)  # [Q, n, words]
    # Words of all items side by side, so that compiled loops run over neighbours.
    database_codes = np.stack([pack(table > 0).T for table in _by_place(codes[1])])  # [m, words, D]
    query_labels, database_labels = pack(labels[0] != 0), np.ascontiguousarray(pack(labels[1] != 0).T)
    threads = torch.get_num_threads()
    rows = max(1, min(_PAIRS_ON_CPU // size, -(-queries // threads)))
    # Every thread writes its blocks into the same memory again: fresh pages would cost as much as the ranking.
    free: SimpleQueue[list[np.ndarray]] = SimpleQueue()
    for _ in range(threads):
        free.put([np.empty(rows * size, dtype) for dtype in (np.int32, np.int16)])

    def measure_rows(start: int) -> Tensor:
        block = slice(start, start + rows)
        out = free.get()
        try:
            relevant, items, hits = kernels.rank_block(
                query_codes[block], database_codes, query_labels[block], database_labels, bits, *out
            )
            count = relevant.sum()
            ranks, shared = (torch.from_numpy(array[:count]) for array in out)
            relevant, items, hits = (torch.from_numpy(array) for array in (relevant, items, hits))
            return measure(CompiledRanking(size, relevant, ranks, shared, items, hits))
        finally:
            free.put(out)

    with ThreadPoolExecutor(threads) as pool:
        return torch.cat(list(pool.map(measure_rows, range(0, queries, rows))))


def pack(table: Tensor) -> kernels.Words:
    """Rows of bools as rows of 64-bit words, the last one filled up with zeros.

    Args:
        table: [N, W] bool, on the CPU.

    Returns:
        [N, ceil(W / 64)].
    """
    packed = np.packbits(table.numpy(), axis=1)
    return np.ascontiguousarray(np.pad(packed, ((0, 0), (0, -packed.shape[1] % 8)))).view(np.uint64)
