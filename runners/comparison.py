"""What several runs found, side by side: a table laid out like the papers' Table 1, and curves."""

import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch

from common.metrics import RetrievalCurves, retrieval_curves
from runners.evaluation import DIRECTIONS
from utils.files import write_text
from utils.output import table
from utils.plots import plot_precision_at, plot_precision_recall, plot_training_loss, read_training_log

TASKS = {"i2t": "I→T", "t2i": "T→I"}
RANKS = (1, 5, 10, 20, 50, 100, 200, 500, 1000)  # N of precision@N
RECALL_LEVELS = 21


class RunFolder:
    """A finished run, read from its folder.

    Args:
        folder: The run's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.results: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        self.model: str = self.results["model"]
        self.bits: int = self.results["bits"]

    @property
    def numbers(self) -> dict[str, float]:
        """The best epoch's numbers at the run's code length, `{"i2t/mAP@all": ...}`."""
        numbers: dict[str, float] = self.results["best"]["reports"][str(self.bits)]
        return numbers

    def curves(self, direction: str) -> RetrievalCurves:
        """Precision-recall and precision@N of the saved codes of one direction."""
        with np.load(self.folder / "codes-best.npz", allow_pickle=False) as arrays:
            codes = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        asks, answers = ({"image": "img", "text": "txt"}[side] for side in DIRECTIONS[direction])
        query, database = codes[f"q_{asks}"][..., : self.bits], codes[f"r_{answers}"][..., : self.bits]
        return retrieval_curves(query, database, codes["q_l"], codes["r_l"], RANKS, RECALL_LEVELS)


def write_summary(folder: Path, runs: Sequence[RunFolder]) -> str:
    """Writes `table.md`, `table.csv`, `table.tex` and the curves of finished runs on one data set.

    Args:
        folder: Where the files go.
        runs: At least one.

    Returns:
        The table and the names of the files, for the terminal.
    """
    metrics = [name.partition("/")[2] for name in runs[0].numbers if name.startswith("i2t/mAP")]
    write_text(folder / "table.csv", _csv(runs))
    notes = "".join(f"- {note}\n" for note in _notes(runs))
    write_text(folder / "table.md", "\n".join([*(_markdown(runs, metric) for metric in metrics), notes]))
    write_text(folder / "table.tex", "\n".join(_latex(runs, metric) for metric in metrics))
    pictures = list(_draw(folder, runs))
    heading, *rows = _rows(runs, metrics[0])
    files = ["table.md", "table.csv", "table.tex", *pictures]
    return f"{_caption(runs, metrics[0])}\n{table([heading, *rows])}\nwritten to {folder}: {', '.join(files)}"


def _cell(runs: Iterable[RunFolder], name: str) -> str:
    """Mean over seeds, with the standard deviation where there are several; empty without a run."""
    values = [run.numbers[name] for run in runs if name in run.numbers]
    if not values:
        return ""
    return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def _select(runs: Sequence[RunFolder], model: str, bits: int) -> list[RunFolder]:
    return [run for run in runs if (run.model, run.bits) == (model, bits)]


def _rows(runs: Sequence[RunFolder], metric: str) -> list[list[str]]:
    """Tasks and methods down, code lengths across, random codes last where known; the first row is the heading."""
    lengths = sorted({run.bits for run in runs})
    rows = [["task", "method", *(f"{bits} bits" for bits in lengths)]]
    for direction, task in TASKS.items():
        for model in dict.fromkeys(run.model for run in runs):
            cells = [_cell(_select(runs, model, bits), f"{direction}/{metric}") for bits in lengths]
            rows.append([task, model, *cells])
    if metric.startswith("mAP@all"):
        chance = [
            f"{mean(run.results['random_codes'][str(bits)]['mAP@all'] for run in runs if run.bits == bits):.4f}"
            for bits in lengths
        ]
        rows.append(["both", "random codes", *chance])
    return rows


def _caption(runs: Sequence[RunFolder], metric: str) -> str:
    """What the numbers are: nobody should have to guess."""
    first = runs[0].results
    split, seeds = first["split"], sorted({run.results["seed"] for run in runs})
    spread = "mean ± standard deviation over" if len(seeds) > 1 else "one run with"
    return (
        f"{metric} ({_meaning(metric)}) on {first['dataset']}: "
        f"{split['query']} queries, {split['database']} database items, split {split['fingerprint']}; "
        f"{spread} seed {', '.join(map(str, seeds))}; epoch by {first['selection']}"
    )


def _meaning(metric: str) -> str:
    if "(expected)" in metric:
        return "list cut at rank k, expectation over all orders of ties"
    if "(top)" in metric:
        return "list cut at rank k, ties by database order"
    return "first min(k, relevant) relevant items, ties by database order"


def _notes(runs: Sequence[RunFolder]) -> list[str]:
    return [f"{model}: {mark}" for model, mark in dict.fromkeys((r.model, m) for r in runs for m in r.results["marks"])]


def _markdown(runs: Sequence[RunFolder], metric: str) -> str:
    heading, *rows = _rows(runs, metric)
    lines = [f"**{_caption(runs, metric)}**", "", _bar(heading), _bar(["---"] * len(heading)), *map(_bar, rows)]
    return "\n".join(lines) + "\n"


def _bar(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _latex(runs: Sequence[RunFolder], metric: str) -> str:
    def row(cells: Sequence[str]) -> str:
        text = " & ".join(cells).replace("→", r"$\to$").replace("±", r"$\pm$").replace("_", r"\_")
        return text + r" \\"

    heading, *rows = _rows(runs, metric)
    caption = _caption(runs, metric).replace("±", r"$\pm$").replace("_", r"\_").replace("%", r"\%")
    return "\n".join(
        [
            r"\begin{table}",
            rf"\caption{{{caption}}}",
            rf"\begin{{tabular}}{{ll{'c' * (len(heading) - 2)}}}",
            r"\hline",
            row(heading),
            r"\hline",
            *map(row, rows),
            r"\hline",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def _csv(runs: Sequence[RunFolder]) -> str:
    """Every number of every run, one a line."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["dataset", "split", "model", "bits", "seed", "best_epoch", "direction", "metric", "value"])
    for run in runs:
        results = run.results
        head = [results["dataset"], results["split"]["fingerprint"], run.model, run.bits, results["seed"]]
        for name, value in run.numbers.items():
            direction, _, metric = name.partition("/")
            writer.writerow([*head, results["best"]["epoch"], direction, metric, repr(value)])
    return text.getvalue()


def _draw(folder: Path, runs: Sequence[RunFolder]) -> Iterable[str]:
    """Precision-recall, precision@N and loss curves of the first seed of every method, by code length."""
    dataset = runs[0].results["dataset"]
    for bits in sorted({run.bits for run in runs}):
        firsts = {run.model: run for run in reversed(runs) if run.bits == bits}
        ordered = {model: firsts[model] for model in dict.fromkeys(run.model for run in runs) if model in firsts}
        for direction, task in TASKS.items():
            found = {model: run.curves(direction) for model, run in ordered.items()}
            title = f"{dataset}, {bits} bits, {task}"
            name = f"precision-recall-{direction}-{bits}bits.png"
            recall = {model: (c.recall_levels, c.precision_at_recall) for model, c in found.items()}
            plot_precision_recall(recall, title, folder / name)
            yield name
            name = f"precision-at-n-{direction}-{bits}bits.png"
            plot_precision_at({model: (c.ranks, c.precision_at) for model, c in found.items()}, title, folder / name)
            yield name
        losses = {model: read_training_log(run.folder / "log.jsonl")["loss"] for model, run in ordered.items()}
        name = f"training-loss-{bits}bits.png"
        plot_training_loss(losses, f"{dataset}, {bits} bits", folder / name)
        yield name
