"""Progress bars, on a terminal and in a log file."""

import os
import sys
from collections.abc import Iterable
from typing import Any, TypeVar

from tqdm.auto import tqdm

T = TypeVar("T")


class _Lines:
    """What a log file sees of a progress bar: every state on a line of its own, none written over."""

    def write(self, text: str) -> None:
        if text.strip():
            sys.stderr.write(text.strip() + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress(items: Iterable[T] | None = None, **options: Any) -> "tqdm[T]":
    """A progress bar with rate and remaining time; silent on all processes but the first.

    A log file gets the first and the last state and one every 15 seconds, each on a line of its own; of bars with
    `leave=False`, which are passing, nothing before 15 seconds.
    """
    first = os.environ.get("RANK", "0") == "0"  # of the launcher's group; a preparation script need not load torch
    if sys.stderr.isatty():
        look: dict[str, Any] = {"mininterval": 0.2, "dynamic_ncols": True}
    else:
        delay = 0.0 if options.get("leave", True) else 15.0
        look = {"mininterval": 15.0, "delay": delay, "file": _Lines()}
    return tqdm(items, disable=not first, **look, **options)
