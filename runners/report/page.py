"""`--report`: one HTML file about the runs of a folder, without another file or host."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import scipy.stats
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from common.config import FREE_KEYS
from common.errors import UserError
from runners.comparison import TASKS
from runners.report.charts import bar_chart, line_chart
from runners.report.runs import ReportedRun, differences, epochs, find_runs
from utils.files import write_text
from utils.output import say
from utils.progress import progress

TEMPLATES = Path(__file__).parent / "page"
SHOWN = 12  # groups of runs that are shown in detail, which bounds the page's size


def write_report(folder: Path) -> None:
    """Writes `report.html` into a folder of runs.

    Args:
        folder: The folder of a run or of a sweep.

    Raises:
        UserError: If no run is there, or one is damaged.
    """
    runs, unfinished = find_runs(folder)
    page = render(folder.resolve().name, runs, unfinished)
    path = folder / "report.html"
    write_text(path, page)
    say(f"written to {path}: {len(runs)} runs, {len(page.encode()) / 1e6:.1f} MB")


def render(title: str, runs: list[ReportedRun], unfinished: list[str]) -> str:
    """The page; every value that comes from a run is escaped by the template engine.

    Args:
        title: Name of the folder.
        runs: At least one.
        unfinished: Names of runs without results.
    """
    groups = _groups(runs)
    details = [_details(group) for group in progress(groups[:SHOWN], desc="report", unit="method")]
    firsts = {f"{group[0].model}, {group[0].bits} bits": group[0] for group in groups[:SHOWN]}
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined)
    return environment.get_template("report.html").render(
        title=title,
        style=(TEMPLATES / "report.css").read_text(encoding="utf-8"),
        script=(TEMPLATES / "report.js").read_text(encoding="utf-8"),
        metrics=_metrics(runs),
        groups=[_summary(group, _metrics(runs)) for group in groups],
        runs=runs,
        unfinished=unfinished,
        several=any(len(group) > 1 for group in groups),
        settings=differences(runs, FREE_KEYS),
        charts=[chart for direction in TASKS for chart in _curves(direction, firsts)],
        details=details,
        left_out=len(groups) - len(details),
        marks=list(dict.fromkeys(f"{run.model}: {mark}" for run in runs for mark in run.marks)),
    )


def interval(values: Sequence[float]) -> float | None:
    """Half the width of the 95 % interval of a mean, by Student's t over runs taken as independent; None for one."""
    if len(values) < 2:
        return None
    return float(scipy.stats.t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))


def _groups(runs: Sequence[ReportedRun]) -> list[list[ReportedRun]]:
    """Runs that differ in nothing that a row of the table names but the seed."""
    found: dict[tuple[str, str, int, str], list[ReportedRun]] = {}
    for run in runs:
        key = (run.dataset_name, run.model, run.bits, run.split["fingerprint"])
        found.setdefault(key, []).append(run)
    return list(found.values())


def _metrics(runs: Sequence[ReportedRun]) -> list[str]:
    """Every mAP, or recalls where there is none, in the order of the first run that has it."""
    names = dict.fromkeys(name for run in runs for name in run.numbers)
    maps = [name for name in names if "/mAP" in name]
    return maps or [name for name in names if "recall" in name]


def _summary(group: Sequence[ReportedRun], metrics: Sequence[str]) -> dict[str, Any]:
    """A row of the table: means over seeds with intervals."""
    cells = []
    for name in metrics:
        values = [run.numbers[name] for run in group if name in run.numbers]
        cells.append({"value": mean(values), "half": interval(values)} if values else None)
    first = group[0]
    return {
        "first": first,
        "seeds": sorted(run.seed for run in group),
        "cells": cells,
        "random": first.random["mAP@all"] if "mAP@all" in first.random else None,
    }


def _curves(direction: str, firsts: dict[str, ReportedRun]) -> list[dict[str, Any]]:
    """Precision-recall and top-N precision of the first seed of every group."""
    measured = {name: run for name, run in firsts.items() if run.arrays["q_l"].shape[1]}
    found = {}
    for name, run in measured.items():
        try:
            found[name] = run.curves(direction)
        except UserError:  # no query has a relevant item
            continue
    task = TASKS[direction]
    charts = [
        line_chart(
            f"Precision and recall, {task}",
            "recall",
            "precision",
            {name: (curve.recall_levels, curve.precision_at_recall) for name, curve in found.items()},
        ),
        line_chart(
            f"Precision among the first N, {task}",
            "N",
            "precision",
            {name: (curve.ranks, curve.precision_at) for name, curve in found.items()},
        ),
    ]
    return [chart for chart in charts if chart is not None]


def _details(group: Sequence[ReportedRun]) -> dict[str, Any]:
    """Everything about the first seed of a group."""
    run = group[0]
    labelled = run.arrays["q_l"].shape[1] > 0
    history = epochs(run)
    several = any(len(values) > 1 for values, _ in history.values())
    charts = [line_chart("Every evaluation", "epoch", "value", history) if several else None]
    charts.append(bar_chart("Share of +1 in every bit", "bit", "share", run.balance(), first=1))
    asked = 0
    for direction in TASKS if labelled else ():
        shares, asked = run.histogram(direction)
        charts.append(bar_chart(f"Distances, {TASKS[direction]}", "Hamming distance", "share of pairs", shares))
    return {
        "run": run,
        "charts": [chart for chart in charts if chart is not None],
        "history": several,
        "bits": run.bit_rows(),
        "labels": run.label_rows() if labelled else [],
        "examples": run.examples() if labelled else [],
        "notice": run.dataset if isinstance(run.dataset, str) else "",
        "asked": asked,
    }
