"""The compiled loops of `common/ranking.py`: what ranks on the CPU and what sums over the relevant items."""

from typing import Any

import numpy as np
from numba.extending import intrinsic

from utils.compiled import compiled, compiled_sums

Words = np.ndarray[Any, np.dtype[np.uint64]]

_ITEMS_AT_ONCE = 1024  # database items whose distances are computed together; they stay in the first cache
_PAGE = np.uint64(256)  # entries; so many that a new page is a rare event, so few that they stay in the cache
_UPPER, _LOWER = np.uint64(32), np.uint64(0xFFFFFFFF)  # halves of a word: the shift to the upper, the mask of the lower


def _emit_count_ones(context: Any, word: Any) -> Any:
    """Number of ones of a word, [] uint64: the processor's instruction, which numba has no name for."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return word(word), emit


count_ones: Any = intrinsic(_emit_count_ones)


@compiled
def _distances(code: Words, codes: Words, first: int, out: np.ndarray) -> None:
    """Fills `out` [n] with the Hamming distances of a code [words] to `codes` [words, D] from the first-th on."""
    # Slices, not sums of indices: only then are the loops compiled to vector instructions.
    own, others = code[0], codes[0, first : first + len(out)]
    for item in range(len(out)):
        out[item] = np.uint32(count_ones(own ^ others[item]))
    for word in range(1, len(code)):
        own, others = code[word], codes[word, first : first + len(out)]
        for item in range(len(out)):
            out[item] += np.uint32(count_ones(own ^ others[item]))


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
    """Fills the start of `ranks` and `shared`; returns `relevant`, `items` and `hits` of a Ranking.

    The relevant items of every distance are collected on pages of their own, in the order in which they come, so that
    nothing has to be put in place one by one afterwards: the pages are copied, distance after distance.
    """
    queries, size = len(query_codes), database_codes.shape[2]
    relevant = np.zeros(queries, np.int64)
    items = np.zeros((queries, bits + 1), np.int64)
    hits = np.zeros((queries, bits + 1), np.int64)
    both = np.empty(_ITEMS_AT_ONCE, np.uint32)  # distance in the lower half, shared labels in the upper one
    of_a_pair = np.empty(_ITEMS_AT_ONCE, np.uint32)  # distances of one of the query's codes to one of each item's
    # An entry is a relevant item: `both`, and above that the items of its distance before it. The first entry of a page
    # says which page of the same distance follows.
    entries = np.empty((bits + 2 + size // (int(_PAGE) - 1)) * int(_PAGE), np.uint64)
    states = np.empty(bits + 1, np.uint64)  # of a distance: place of the next entry, and above that the items so far
    total = np.uint64(0)
    for row in range(queries):
        for distance in range(bits + 1):
            states[distance] = np.uint64(distance) * _PAGE + np.uint64(1)
        pages = np.uint64(bits + 1)
        for first in range(0, size, _ITEMS_AT_ONCE):
            last = min(first + _ITEMS_AT_ONCE, size)
            part, distances = both[: last - first], of_a_pair[: last - first]
            _distances(query_codes[row, 0], database_codes[0], first, part)
            for codes_of_a_pair in range(1, query_codes.shape[1] * len(database_codes)):
                own, other = divmod(codes_of_a_pair, len(database_codes))
                _distances(query_codes[row, own], database_codes[other], first, distances)
                for item in range(len(part)):
                    part[item] = min(part[item], distances[item])
            for word in range(len(database_labels)):
                label, labels = query_labels[row, word], database_labels[word, first:last]
                for item in range(len(part)):
                    part[item] += np.uint32(count_ones(label & labels[item])) << np.uint32(16)
            for item in range(len(part)):
                pair = np.uint64(part[item])
                state = states[pair & np.uint64(0xFFFF)]
                # An irrelevant item is written, too, where the next relevant one will overwrite it: whether an item
                # is relevant cannot be predicted, that a page is full can.
                entries[state & _LOWER] = (state & ~_LOWER) | pair
                state += (np.uint64(1) << _UPPER) + np.uint64(pair > np.uint64(0xFFFF))
                if state % _PAGE == 0:
                    entries[(state & _LOWER) - _PAGE] = pages
                    state = (state & ~_LOWER) | (pages * _PAGE + np.uint64(1))
                    pages += np.uint64(1)
                states[pair & np.uint64(0xFFFF)] = state
        smaller, slot = np.uint64(0), total
        for distance in range(bits + 1):
            end, page, start = states[distance] & _LOWER, np.uint64(distance), slot
            while True:
                begin, is_last = page * _PAGE + np.uint64(1), page == end // _PAGE
                page_entries = entries[begin : end if is_last else begin + _PAGE - np.uint64(1)]
                next_slot = slot + np.uint64(len(page_entries))
                page_ranks, page_shared = ranks[slot:next_slot], shared[slot:next_slot]
                for place in range(len(page_entries)):
                    page_ranks[place] = smaller + (page_entries[place] >> _UPPER)
                for place in range(len(page_entries)):
                    page_shared[place] = page_entries[place] >> np.uint64(16)
                slot = next_slot
                if is_last:
                    break
                page = entries[page * _PAGE]
            items[row, distance], hits[row, distance] = states[distance] >> _UPPER, slot - start
            smaller += states[distance] >> _UPPER
        relevant[row] = slot - total
        total = slot
    return relevant, items, hits


@compiled_sums
def precision_sums(ranks: np.ndarray, relevant: np.ndarray, count: np.ndarray) -> np.ndarray:
    """`Ranking.precision_sum`: [q] float64 for `relevant` [q] and `count` [q]."""
    sums = np.zeros(len(relevant))
    start = 0
    for row in range(len(relevant)):
        half = count[row] // 2
        first, second = ranks[start : start + half], ranks[start + half : start + 2 * half]
        total = 0.0
        for place in range(half):  # a / b + c / d with one division, which is what takes the time
            b, d = first[place] + 1.0, second[place] + 1.0
            total += ((place + 1.0) * d + (half + place + 1.0) * b) / (b * d)
        if count[row] % 2:
            total += count[row] / (ranks[start + count[row] - 1] + 1.0)
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
