"""Work that leaves Python's lock free (decoding, reading, writing), spread over threads."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
_TASKS = 4096  # handed to the threads at a time: bounds what waits to be taken


def in_threads(function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """Applies a function to items, as many at a time as there are cores.

    Args:
        function: What to do; its first error ends the work, and what has not begun by then is not begun.
        items: Its arguments.

    Yields:
        Results in the order of the items.
    """
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    try:
        for start in range(0, len(items), _TASKS):
            yield from pool.map(function, items[start : start + _TASKS])
    finally:
        pool.shutdown(cancel_futures=True)
