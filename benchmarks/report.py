"""What every benchmark ends with: a table on the terminal, and the same numbers as JSON."""

import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from utils.files import write_json
from utils.output import say


def machine(device: torch.device) -> str:
    """The machine and the versions that a figure belongs to."""
    card = f"{torch.cuda.get_device_name(device)}, " if device.type == "cuda" else ""
    return (
        f"{card}{platform.machine()}, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


def print_table(rows: Mapping[str, Mapping[str, Any]], columns: Sequence[tuple[str, str, str]]) -> None:
    """Prints one line a row.

    Args:
        rows: Name of the row -> its figures.
        columns: Heading, key of the figure, format; a figure that is None, or that the row lacks, is a dash.
    """
    width = max(len(name) for name in rows) + 2
    say(" " * width + "".join(f"{heading:>{len(heading) + 3}}" for heading, _, _ in columns))
    for name, row in rows.items():
        cells = (
            f"{'-' if row.get(key) is None else format(row[key], form):>{len(heading) + 3}}"
            for heading, key, form in columns
        )
        say(f"{name:{width}}" + "".join(cells))


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Writes the figures of a run as JSON and says where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, results)
    say(f"written to {path}")
