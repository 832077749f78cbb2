"""`--report`: one HTML file about the runs of a folder, without another file or host."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from common.errors import UserError
from common.metrics import RetrievalCurves
from common.schemas import FREE_KEYS
from runners.comparison import MARKS, TASKS, Cell, compare, compared_numbers, marks_of
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
    groups, metrics = _groups(runs), compared_numbers(runs)
    cells = _cells(runs, metrics)
    curves, details = [], []
    for group in progress(groups[:SHOWN], desc="report", unit="method"):
        curves.append(_curves(group))
        details.append(_details(group))
        for run in group:
            run.forget()
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined)
    return environment.get_template("report.html").render(
        title=title,
        style=(TEMPLATES / "report.css").read_text(encoding="utf-8"),
        script=(TEMPLATES / "report.js").read_text(encoding="utf-8"),
        metrics=metrics,
        groups=[_summary(group, metrics, cells) for group in groups],
        marks=marks_of(cells.values()),
        meanings=MARKS,
        runs=runs,
        unfinished=unfinished,
        several=any(len(group) > 1 for group in groups),
        settings=differences(runs, FREE_KEYS),
        charts=_charts(groups[:SHOWN], curves),
        details=details,
        left_out=len(groups) - len(details),
        notes=_notes(groups),
    )


def _groups(runs: Sequence[ReportedRun]) -> list[list[ReportedRun]]:
    """Runs that differ in nothing that a row of the table names but the seeds, by data set and length."""
    found: dict[tuple[str, int, str], list[ReportedRun]] = {}
    for run in runs:
        found.setdefault((run.dataset_name, run.bits, run.model), []).append(run)
    return [found[key] for key in sorted(found, key=lambda key: key[:2])]


def _notes(groups: Sequence[Sequence[ReportedRun]]) -> list[str]:
    """What the runs say of themselves, and what makes several of them less than several."""
    notes = dict.fromkeys(f"{run.model}: {mark}" for group in groups for run in group for mark in run.marks)
    for group in groups:
        if len({(run.seed, run.fingerprint) for run in group}) < len(group):
            first = group[0]
            notes[
                f"{first.model}, {first.bits} bits, {first.dataset_name}: runs of one seed on one split are counted as "
                "if they were of several; the interval is too narrow"
            ] = None
    return list(notes)


Cells = dict[tuple[str, int, str, str], Cell]  # data set, bits, method, number


def _cells(runs: Sequence[ReportedRun], metrics: Sequence[str]) -> Cells:
    """Every number of every row, compared with the best of its data set and length."""
    datasets = dict.fromkeys(run.dataset_name for run in runs)
    pairs = list(itertools.product(datasets, metrics))
    return {
        (dataset, *place, name): cell
        for dataset, name in progress(pairs, desc="tests", unit="number", leave=False)
        for place, cell in compare([run for run in runs if run.dataset_name == dataset], name).items()
    }


def _summary(group: Sequence[ReportedRun], metrics: Sequence[str], cells: Cells) -> dict[str, Any]:
    """A row of the table."""
    first = group[0]
    chance = [run.random["mAP@all"] for run in group if "mAP@all" in run.random]
    return {
        "first": first,
        "seeds": sorted({run.seed for run in group}),
        "splits": len({run.fingerprint for run in group}),
        "cells": {name: cells.get((first.dataset_name, first.bits, first.model, name)) for name in metrics},
        "random": mean(chance) if chance else None,
    }


def _curves(group: Sequence[ReportedRun]) -> dict[str, list[RetrievalCurves]]:
    """The curves of every run of a group in both directions."""
    found: dict[str, list[RetrievalCurves]] = {direction: [] for direction in TASKS}
    for run, direction in itertools.product(group, TASKS):
        if not run.arrays["q_l"].shape[1]:
            continue
        try:
            found[direction].append(run.curves(direction))
        except UserError:  # no query has a relevant item
            continue
    return found


def _charts(
    groups: Sequence[Sequence[ReportedRun]], curves: Sequence[Mapping[str, Sequence[RetrievalCurves]]]
) -> list[dict[str, Any]]:
    """Precision-recall and top-N precision of every data set, length and direction, a line for each method."""
    charts = []
    places = dict.fromkeys((group[0].dataset_name, group[0].bits) for group in groups)
    several = len({dataset for dataset, _ in places}) > 1
    for (dataset, bits), (direction, task) in itertools.product(places, TASKS.items()):
        found = {
            group[0].model: own[direction]
            for group, own in zip(groups, curves, strict=True)
            if (group[0].dataset_name, group[0].bits) == (dataset, bits) and own[direction]
        }
        where = f"{task}, {bits} bits" + (f", {dataset}" if several else "")
        recall = {m: (own[0].recall_levels, [one.precision_at_recall for one in own]) for m, own in found.items()}
        first = {}
        for model, own in found.items():
            ranks = min((one.ranks for one in own), key=len)  # fewer in a smaller database
            first[model] = ranks, [one.precision_at[: len(ranks)] for one in own]
        charts.append(line_chart(f"Precision and recall, {where}", "recall", "precision", recall))
        charts.append(line_chart(f"Precision among the first N, {where}", "N", "precision", first))
    return [chart for chart in charts if chart is not None]


def _details(group: Sequence[ReportedRun]) -> dict[str, Any]:
    """Everything about the first seed of a group."""
    run = group[0]
    labelled = run.arrays["q_l"].shape[1] > 0
    history = {name: (at, [values]) for name, (at, values) in epochs(run).items()}
    several = any(len(at) > 1 for at, _ in history.values())
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
