"""Work that leaves Python's lock free (decoding, reading, writing), spread over threads."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_threads(function: Callable[[Item], Result], items: Iterable[Item], ahead: int = 4096) -> Iterator[Result]:
    """Applies a function to items, as many at a time as there are cores.

    Args:
        function: What to do; its first error ends the work, and what has not begun by then is not begun.
        items: Its arguments, taken as they are needed.
        ahead: Results, done or under way, that may wait to be taken.

    Yields:
        Results in the order of the items.
    """
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
