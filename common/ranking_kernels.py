"""The compiled loops of `common/ranking.py`: what ranks on the CPU and what sums over the relevant items."""

from typing import Any

import numpy as np
from numba.extending import intrinsic

from utils.compiled import compiled, compiled_sums

Words = np.ndarray[Any, np.dtype[np.uint64]]

_ITEMS_AT_ONCE = 1024  # database items whose distances are computed together; they stay in the first cache


def _emit_count_ones(context: Any, word: Any) -> Any:
    """Number of ones of a word, [] uint64: the processor's instruction, which numba has no name for."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return word(word), emit


count_ones: Any = intrinsic(_emit_count_ones)


@compiled
def rank_block(
    query_codes: Words,
    database_codes: Words,
    query_labels: Words,
    database_labels: Words,
    bits: int,
    ranks: np.ndarray,
    shared: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fills the start of `ranks` and `shared`; returns `relevant`, `items` and `hits` of a Ranking."""
    queries, size = len(query_codes), database_codes.shape[2]
    relevant = np.zeros(queries, np.int64)
    items = np.zeros((queries, bits + 1), np.int64)
    hits = np.zeros((queries, bits + 1), np.int64)
    both = np.empty(_ITEMS_AT_ONCE, np.uint32)  # distance in the lower half, shared labels in the upper one
    of_a_pair = np.empty(_ITEMS_AT_ONCE, np.uint32)  # distances of one of the query's codes to one of each item's
    counts = np.empty(bits + 1, np.uint32)
    found_at = np.empty(bits + 1, np.uint32)
    # Relevant items as they come: items of their distance before them, and `both` above that. An irrelevant one is
    # written too, where the next relevant one will overwrite it: no branch to mispredict.
    kept = np.empty(size + 1, np.uint64)
    smaller = np.empty(bits + 1, np.uint32)
    slots = np.empty(bits + 1, np.uint64)
    total = np.uint64(0)
    for row in range(queries):
        counts[:] = 0
        found_at[:] = 0
        found = np.uint64(0)
        for first in range(0, size, _ITEMS_AT_ONCE):
            part = both[: min(_ITEMS_AT_ONCE, size - first)]
            part[:] = 0
            # Slices, not sums of indices: only then are the loops compiled to vector instructions.
            for word in range(database_codes.shape[1]):
                code, codes = query_codes[row, 0, word], database_codes[0, word, first : first + len(part)]
                for item in range(len(part)):
                    part[item] += np.uint32(count_ones(code ^ codes[item]))
            for codes_of_a_pair in range(1, query_codes.shape[1] * len(database_codes)):
                own, other = divmod(codes_of_a_pair, len(database_codes))
                distances = of_a_pair[: len(part)]
                distances[:] = 0
                for word in range(database_codes.shape[1]):
                    code, codes = query_codes[row, own, word], database_codes[other, word, first : first + len(part)]
                    for item in range(len(part)):
                        distances[item] += np.uint32(count_ones(code ^ codes[item]))
                for item in range(len(part)):
                    part[item] = min(part[item], distances[item])
            for word in range(len(database_labels)):
                label, labels = query_labels[row, word], database_labels[word, first : first + len(part)]
                for item in range(len(part)):
                    part[item] += np.uint32(count_ones(label & labels[item])) << np.uint32(16)
            for item in range(len(part)):
                pair = part[item]
                distance = pair & np.uint32(0xFFFF)
                kept[found] = np.uint64(counts[distance]) | (np.uint64(pair) << np.uint64(32))
                counts[distance] += np.uint32(1)
                found += np.uint64(pair > np.uint32(0xFFFF))
        for place in range(found):
            found_at[(kept[place] >> np.uint64(32)) & np.uint64(0xFFFF)] += np.uint32(1)
        rank, slot = 0, total
        for distance in range(bits + 1):
            items[row, distance], hits[row, distance] = counts[distance], found_at[distance]
            smaller[distance], slots[distance] = rank, slot
            rank += counts[distance]
            slot += found_at[distance]
        for place in range(found):
            pair = kept[place] >> np.uint64(32)
            distance = pair & np.uint64(0xFFFF)
            slot = slots[distance]
            slots[distance] = slot + np.uint64(1)
            ranks[slot] = smaller[distance] + np.uint32(kept[place])
            shared[slot] = pair >> np.uint64(16)
        relevant[row] = found
        total += found
    return relevant, items, hits


@compiled_sums
def precision_sums(ranks: np.ndarray, relevant: np.ndarray, count: np.ndarray) -> np.ndarray:
    """`Ranking.precision_sum`: [q] float64 for `relevant` [q] and `count` [q]."""
    sums = np.zeros(len(relevant))
    start = 0
    for row in range(len(relevant)):
        own = ranks[start : start + count[row]]
        total = 0.0
        for place in range(len(own)):
            total += (place + 1.0) / (own[place] + 1.0)
        sums[row] = total
        start += relevant[row]
    return sums


@compiled
def hits_within(ranks: np.ndarray, relevant: np.ndarray, rank: int) -> np.ndarray:
    """`Ranking.hits_within`: [q] int64."""
    hits = np.zeros(len(relevant), np.int64)
    start = 0
    for row in range(len(relevant)):
        hits[row] = np.searchsorted(ranks[start : start + relevant[row]], rank)
        start += relevant[row]
    return hits


@compiled_sums
def gain_sums(
    ranks: np.ndarray,
    shared: np.ndarray,
    relevant: np.ndarray,
    gains: np.ndarray,
    discounts: np.ndarray,
    count: np.ndarray,
) -> np.ndarray:
    """`Ranking.gain_sum`: [q] float64."""
    sums = np.zeros(len(relevant))
    start = 0
    for row in range(len(relevant)):
        own, labels = ranks[start : start + count[row]], shared[start : start + count[row]]
        total = 0.0
        for place in range(len(own)):
            total += gains[labels[place]] * discounts[own[place]]
        sums[row] = total
        start += relevant[row]
    return sums


@compiled
def sharing(shared: np.ndarray, relevant: np.ndarray, most: int) -> np.ndarray:
    """`Ranking.sharing`: [q, most] int64. A pass for every number of labels, in vector instructions; few are needed."""
    counts = np.zeros((len(relevant), most), np.int64)
    start = 0
    for row in range(len(relevant)):
        labels = shared[start : start + relevant[row]]
        for least in range(1, most + 1):
            count = np.uint32(0)
            for place in range(len(labels)):
                count += np.uint32(labels[place] >= least)
            if count == 0:
                break
            counts[row, least - 1] = count
        start += relevant[row]
    return counts
