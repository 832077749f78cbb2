"""Compilation of loops over numbers."""

from collections.abc import Callable
from typing import Any

import numba


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles a function at its first call and lets threads run it side by side.

    The machine code is kept beside the source, or in the user's cache folder, so that later processes find it.
    """
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # neither folder can be written to
        return numba.njit(nogil=True)(function)
