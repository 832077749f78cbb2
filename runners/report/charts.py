"""Numbers of a chart as coordinates that the page's template draws: nothing here writes markup."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from common.significance import band

WIDTH, HEIGHT = 460, 250
LEFT, RIGHT, TOP, BOTTOM = 46, 18, 8, 30
TICKS = 4
COLOURS, DASHES = 9, 4  # of the style sheet; lines repeat after 36


def line_chart(
    title: str, x: str, y: str, curves: Mapping[str, tuple[Sequence[float], Sequence[Sequence[float]]]]
) -> dict[str, Any] | None:
    """Lines from the origin of y; None where no curve has a point.

    Args:
        title: What is shown.
        x: Name of the horizontal axis.
        y: Name of the vertical axis.
        curves: Name -> (x, y of every run). Of several runs the mean is drawn, in a band of one standard deviation to
            either side that ends at 0; points that are not finite are left out.
    """
    finite = {name: _mean_curve(xs, runs) for name, (xs, runs) in curves.items()}
    points = [point for series in finite.values() for point in series]
    if not points:
        return None
    whole = all(float(a).is_integer() for a, _, _ in points)
    low, high = min(a for a, _, _ in points), max(a for a, _, _ in points)
    top = max(b + (spread or 0) for _, b, spread in points) * 1.05 or 1.0
    across = _scale(low, high if high > low else low + 1, LEFT, WIDTH - RIGHT)
    up = _scale(0, top, HEIGHT - BOTTOM, TOP)
    lines = [
        {
            "name": name,
            "style": number % COLOURS,
            "dash": number % DASHES,
            "points": " ".join(f"{across(a):.1f},{up(b):.1f}" for a, b, _ in series),
            "band": " ".join(
                f"{across(a):.1f},{up(max(b + side * spread, 0)):.1f}"
                for side, way in ((1, series), (-1, series[::-1]))
                for a, b, spread in way
                if spread is not None
            ),
            "dots": [
                (
                    round(across(a), 1),
                    round(up(b), 1),
                    f"{a:g}: {b:.4f}" + (f" ± {spread:.4f}" if spread is not None else ""),
                )
                for a, b, spread in series
            ][:60],
        }
        for number, (name, series) in enumerate(finite.items())
    ]
    return {
        **_frame(title, x, y, top, up),
        "lines": lines,
        "marks": [(round(across(value), 1), f"{value:.4g}") for value in _ticks(low, high, whole)],
    }


def _mean_curve(xs: Sequence[float], runs: Sequence[Sequence[float]]) -> list[tuple[float, float, float | None]]:
    """Points of the mean over runs, with the deviation where there are several."""
    return [
        (x, y, spread if math.isfinite(spread) else None)
        for x, y, spread in zip(xs, *(values.tolist() for values in band(runs)), strict=True)
        if math.isfinite(x) and math.isfinite(y)
    ]


def bar_chart(title: str, x: str, y: str, groups: Mapping[str, Sequence[float]], first: int = 0) -> dict[str, Any]:
    """Bars of several groups side by side at every place.

    Args:
        title: What is shown.
        x: Name of the horizontal axis.
        y: Name of the vertical axis.
        groups: Name -> heights, of equal length.
        first: Number of the first place.
    """
    count = max(len(values) for values in groups.values())
    top = max(max(values) for values in groups.values()) * 1.05 or 1.0
    up = _scale(0, top, HEIGHT - BOTTOM, TOP)
    step = (WIDTH - LEFT - RIGHT) / count
    width = step * 0.8 / len(groups)
    bars = [
        {
            "style": number,
            "x": round(LEFT + place * step + step * 0.1 + number * width, 2),
            "y": round(up(value), 2),
            "width": round(width, 2),
            "height": round(HEIGHT - BOTTOM - up(value), 2),
            "says": f"{name}, {first + place}: {value:.4f}",
        }
        for number, (name, values) in enumerate(groups.items())
        for place, value in enumerate(values)
    ]
    every = max(1, -(-count // 8))
    marks = [(round(LEFT + (place + 0.5) * step, 1), str(first + place)) for place in range(0, count, every)]
    names = [{"name": name, "style": number} for number, name in enumerate(groups)]
    return {**_frame(title, x, y, top, up), "bars": bars, "lines": names, "marks": marks}


def _frame(title: str, x: str, y: str, top: float, up: Any) -> dict[str, Any]:
    levels = [(round(up(value), 1), f"{value:.3g}") for value in _ticks(0, top)]
    box = {"left": LEFT, "right": WIDTH - RIGHT, "bottom": HEIGHT - BOTTOM, "width": WIDTH, "height": HEIGHT}
    return {"title": title, "x": x, "y": y, "levels": levels, **box}


def _ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """A few round numbers within the range, without a fraction where asked."""
    span = high - low or 1.0
    step = 10 ** math.floor(math.log10(span / TICKS))
    if whole:
        step = max(step, 1)
    step *= next(factor for factor in (1, 2, 5, 10) if span / (factor * step) <= TICKS + 1)
    start = math.ceil(low / step - 1e-9)
    return [number * step for number in range(start, math.floor(high / step + 1e-9) + 1)]


def _scale(low: float, high: float, start: float, end: float) -> Any:
    return lambda value: start + (value - low) / (high - low) * (end - start)
