"""What a command writes to standard output: tables and results. It loads no heavy package."""

import os
import sys
from collections.abc import Sequence

from common.errors import UserError

BROKEN_PIPE = 141  # exit code of a program whose reader has gone: 128 + SIGPIPE


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equal length as aligned text; the first is the heading."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def say(text: str) -> None:
    """Writes results to stdout, on the first process only; what its encoding lacks becomes an escape.

    Raises:
        BrokenPipeError: If nobody reads them any more.
        UserError: If they cannot be written: the disk is full, or stdout is closed.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    try:
        if sys.stdout is None:
            raise OSError("it is closed")
        try:
            sys.stdout.write(text + "\n")
        except UnicodeEncodeError:  # a terminal of another encoding, or a file's name that is not UTF-8
            encoding = sys.stdout.encoding
            sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        sys.stdout.flush()
    except OSError as error:
        _forget_stdout()
        if isinstance(error, BrokenPipeError):
            raise
        raise UserError(f"standard output cannot be written ({error.strerror or error}); name another place") from None


def _forget_stdout() -> None:
    """Python would try once more to write what is left, at its end, and complain."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
