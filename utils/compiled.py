"""Compilation of loops over numbers."""

from collections.abc import Callable
from typing import Any

import numba


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles a function at its first call and lets threads run it side by side.

    The machine code is kept beside the source, or in the user's cache folder, so that later processes find it.
    """
    return _compiled(function)


def compiled_sums(function: Callable[..., Any]) -> Callable[..., Any]:
    """`compiled` for sums of floats whose order of addition may change, so that several are added at once.

    The order depends on how many they are, and on nothing else. Division by zero gives infinity.
    """
    return _compiled(function, fastmath={"reassoc", "nsz"}, error_model="numpy")


def _compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    try:
        return numba.njit(nogil=True, cache=True, **options)(function)
    except RuntimeError:  # neither folder can be written to
        return numba.njit(nogil=True, **options)(function)
