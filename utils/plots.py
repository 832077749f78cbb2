"""Curves as PNG files: precision-recall, precision@N, training loss.

Every function takes numbers and writes one file. Colours are Okabe and Ito's, which colour-blind readers tell apart;
every line also has its own dash or marker, so that a grey print stays readable.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from common.errors import UserError
from common.significance import band
from utils.files import atomic

Curve = tuple[Sequence[float], Sequence[float]]  # x, y
Bundle = tuple[Sequence[float], Sequence[Sequence[float]]]  # x, y of every run

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31", "#7F7F7F")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
_DASHES = ("-", "--", "-.", ":")


def plot_precision_recall(curves: Mapping[str, Bundle], title: str, path: Path) -> None:
    """Precision over recall, both on [0, 1].

    Args:
        curves: Name of a method (or direction) -> (recall, precision of every run); points that are NaN are left out.
            Of several runs the mean is drawn, in a band of one standard deviation to either side.
        title: Data set, bits, direction.
        path: PNG file to write.

    Raises:
        UserError: If there is nothing to draw or the file cannot be written.
    """
    figure, axes = _open("Recall", "Precision", title)
    _draw(axes, curves)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    _save(figure, path)


def plot_precision_at(curves: Mapping[str, Bundle], title: str, path: Path) -> None:
    """Precision among the first N results.

    Args:
        curves: Name -> (N, precision@N of every run), as for `plot_precision_recall`.
        title: Data set, bits, direction.
        path: PNG file to write.

    Raises:
        UserError: As `plot_precision_recall`.
    """
    figure, axes = _open("Number of results N", "Precision@N", title)
    _draw(axes, curves)
    axes.set_xlim(left=0)
    axes.set_ylim(0, 1.02)
    _save(figure, path)


def plot_training_loss(curves: Mapping[str, Curve], title: str, path: Path) -> None:
    """Loss over optimizer steps; every step pale, their running mean (a fiftieth of the run) in full colour.

    Every curve has a panel and a scale of its own: losses of two methods have no common unit.

    Args:
        curves: Name -> (step, loss), as `read_training_log` gives them.
        title: Method, data set, bits.
        path: PNG file to write.

    Raises:
        UserError: As `plot_precision_recall`.
    """
    _require_points(curves, title)
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(5.6, 4.2) if rows == columns == 1 else (3.2 * columns, 2.4 * rows), dpi=160)
    figure.set_layout_engine("constrained")
    figure.suptitle(title, fontsize=10)
    for place, (name, (steps, losses)) in enumerate(curves.items()):
        axes = figure.add_subplot(rows, columns, place + 1)
        _style(axes, "Step" if place + columns >= len(curves) else "", "Loss" if place % columns == 0 else "", name)
        axes.plot(steps, losses, color=_COLOURS[0], alpha=0.25, linewidth=0.8)
        axes.plot(steps, _running_mean(losses), color=_COLOURS[0], linewidth=1.5)
        axes.margins(x=0)
    _save(figure, path)


def read_training_log(path: Path) -> dict[str, Curve]:
    """Loss and terms of every step of a run.

    Args:
        path: The run's `log.jsonl`; a last line that is cut off (a run still writing) is left out.

    Returns:
        `{"loss": (steps, values), <term>: ...}`.

    Raises:
        UserError: If the file cannot be read, or is no such log.
    """
    curves: dict[str, tuple[list[float], list[float]]] = {}
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"training log {path} cannot be read: {error}; name the log.jsonl of a run's folder") from None
    for number, line in enumerate(lines, start=1):
        try:
            record: Any = json.loads(line)
            step, event = record.pop("step"), record.pop("event")
            values = {name: float(value) for name, value in record.items()} if event == "step" else {}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(
                f"{path}, line {number}: not a line of a training log; name the log.jsonl of a run's folder"
            ) from None
        for name, value in values.items():
            steps, series = curves.setdefault(name, ([], []))
            steps.append(step)
            series.append(value)
    return dict(curves)


def _open(x: str, y: str, title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.6, 4.2), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    _style(axes, x, y, title)
    return figure, axes


def _style(axes: Axes, x: str, y: str, title: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title, fontsize=10)
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _draw(axes: Axes, curves: Mapping[str, Bundle]) -> None:
    bands = {name: (xs, *band(runs)) for name, (xs, runs) in curves.items()}
    means: dict[str, Curve] = {name: (xs, middle.tolist()) for name, (xs, middle, _) in bands.items()}
    _require_points(means, axes.get_title())
    finite = {name: _finite(curve) for name, curve in means.items()}
    for number, (xs, middle, spread) in enumerate(bands.values()):
        if np.isfinite(spread).any():
            colour = _COLOURS[number % len(_COLOURS)]
            axes.fill_between(xs, middle - spread, middle + spread, color=colour, alpha=0.2, linewidth=0)
    for number, (name, (xs, ys)) in enumerate(finite.items()):
        axes.plot(
            xs,
            ys,
            label=name,
            color=_COLOURS[number % len(_COLOURS)],
            linestyle=_DASHES[number % len(_DASHES)],
            marker=_MARKERS[number % len(_MARKERS)],
            markersize=3.5,
            markevery=max(1, len(xs) // 12),
            linewidth=1.5,
            clip_on=False,  # a marker on the frame is drawn whole
        )
    axes.legend(frameon=False, fontsize=8, ncols=2 if len(finite) > 5 else 1)


def _require_points(curves: Mapping[str, Curve], title: str) -> None:
    if not any(_finite(curve)[0] for curve in curves.values()):
        raise UserError(f"nothing to draw in the plot {title!r}: no curve has a number")


def _finite(curve: Curve) -> tuple[list[float], list[float]]:
    points = [(x, y) for x, y in zip(*curve, strict=True) if math.isfinite(x) and math.isfinite(y)]
    return [x for x, _ in points], [y for _, y in points]


def _running_mean(values: Sequence[float]) -> list[float]:
    """Mean over the last fiftieth of the series, [N] -> [N]."""
    window = max(1, len(values) // 50)
    means, total = [], 0.0
    for number, value in enumerate(values):
        total += value - (values[number - window] if number >= window else 0.0)
        means.append(total / min(number + 1, window))
    return means


def _save(figure: Figure, path: Path) -> None:
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png")
