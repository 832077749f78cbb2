"""What several runs found, side by side: a table laid out like the papers' Table 1, and curves."""

import csv
import io
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch

from common.metrics import RetrievalCurves, retrieval_curves
from common.significance import Array, Summary, holm, paired_test, summary
from runners.evaluation import DIRECTIONS
from utils.files import write_text
from utils.output import table
from utils.plots import plot_precision_at, plot_precision_recall, plot_training_loss, read_training_log

TASKS = {"i2t": "I→T", "t2i": "T→I"}
RANKS = (1, 5, 10, 20, 50, 100, 200, 500, 1000)  # N of precision@N
RECALL_LEVELS = 21
LEVEL = 0.05  # above this p-value a method counts as not distinguishable from the best


class RunFolder:
    """A finished run, read from its folder.

    Args:
        folder: The run's folder.
        variant: What tells it from other runs of its method, beside bits and seeds; empty if nothing does.
    """

    def __init__(self, folder: Path, variant: str = "") -> None:
        self.folder = folder
        self.results: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        self.model: str = self.results["model"] + (f" ({variant})" if variant else "")
        self.bits: int = self.results["bits"]

    @property
    def numbers(self) -> dict[str, float]:
        """The best epoch's numbers at the run's code length, `{"i2t/mAP@all": ...}`."""
        numbers: dict[str, float] = self.results["best"]["reports"][str(self.bits)]
        return numbers

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the split that it was trained and evaluated on."""
        return str(self.results["split"]["fingerprint"])

    def precisions(self, name: str) -> Array | None:
        """Average precisions of every query, [Q], by `<bits>/<direction>/<metric>`; None of a run that kept none."""
        path = self.folder / "ap-best.npz"
        if not path.exists():
            return None
        with np.load(path, allow_pickle=False) as arrays:
            return np.asarray(arrays[name]) if name in arrays.files else None

    def curves(self, direction: str) -> RetrievalCurves:
        """Precision-recall and precision@N of the saved codes of one direction."""
        with np.load(self.folder / "codes-best.npz", allow_pickle=False) as arrays:
            codes = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        asks, answers = ({"image": "img", "text": "txt"}[side] for side in DIRECTIONS[direction])
        query, database = codes[f"q_{asks}"][..., : self.bits], codes[f"r_{answers}"][..., : self.bits]
        return retrieval_curves(query, database, codes["q_l"], codes["r_l"], RANKS, RECALL_LEVELS)


def write_summary(folder: Path, runs: Sequence[RunFolder]) -> str:
    """Writes `table.md`, `table.csv`, `summary.csv`, `table.tex` and the curves of finished runs on one data set.

    Args:
        folder: Where the files go.
        runs: At least one.

    Returns:
        The table and the names of the files, for the terminal.
    """
    metrics = [name.partition("/")[2] for name in runs[0].numbers if name.startswith("i2t/mAP")]
    cells = {metric: _cells(runs, metric) for metric in metrics}
    write_text(folder / "table.csv", _csv(runs))
    write_text(folder / "summary.csv", _summary_csv(cells))
    notes = "".join(f"- {note}\n" for note in _notes(runs))
    write_text(folder / "table.md", "\n".join([*(_markdown(runs, m, cells[m]) for m in metrics), notes]))
    write_text(folder / "table.tex", "\n".join(_latex(runs, m, cells[m]) for m in metrics))
    pictures = list(_draw(folder, runs))
    heading, *rows = _rows(runs, metrics[0], cells[metrics[0]], str)
    files = ["table.md", "table.csv", "summary.csv", "table.tex", *pictures]
    caption = _caption(runs, metrics[0], cells[metrics[0]])
    return f"{caption}\n{table([heading, *rows])}\nwritten to {folder}: {', '.join(files)}"


@dataclass(frozen=True)
class Cell:
    """A method's value of one number at one code length.

    Attributes:
        found: Over the runs.
        p: Of the paired test against the best of the column, after Holm; 1 for the best itself, None where no queries'
            precisions are there.
        best: Whether it is the best of its column, which has others.
        alone: Whether the column has no other method.
    """

    found: Summary
    p: float | None
    best: bool
    alone: bool

    @property
    def tied(self) -> bool:
        """Whether it cannot be told from the best."""
        return not self.best and self.p is not None and self.p > LEVEL

    def __str__(self) -> str:
        spread = f" ± {self.found.deviation:.4f}" if self.found.count > 1 else ""
        mark = " *" if self.best else " ~" if self.tied else " ?" if self.p is None and not self.alone else ""
        return f"{self.found.mean:.4f}{spread}{mark}"


Cells = dict[tuple[str, int, str], Cell]  # direction, bits, model


def _cells(runs: Sequence[RunFolder], metric: str) -> Cells:
    """Every method's cell of every column, compared with the column's best."""
    cells: Cells = {}
    models = list(dict.fromkeys(run.model for run in runs))
    for direction, bits in itertools.product(TASKS, sorted({run.bits for run in runs})):
        chosen = {model: own for model in models if (own := _select(runs, model, bits))}
        found = {m: summary([run.numbers[f"{direction}/{metric}"] for run in own]) for m, own in chosen.items()}
        best = max(found, key=lambda model: found[model].mean)  # noqa: B023 - used at once
        others = [model for model in found if model != best]
        compared = {m: _compared(chosen[best], chosen[m], f"{bits}/{direction}/{metric}") for m in others}
        known = {model: p for model, p in compared.items() if p is not None}
        adjusted = dict(zip(known, holm(list(known.values())), strict=True))
        for model, numbers in found.items():
            p = 1.0 if model == best and others else adjusted.get(model)
            cells[direction, bits, model] = Cell(numbers, p, best=model == best and bool(others), alone=not others)
    return cells


def _select(runs: Sequence[RunFolder], model: str, bits: int) -> list[RunFolder]:
    return [run for run in runs if (run.model, run.bits) == (model, bits)]


def _compared(ours: Sequence[RunFolder], theirs: Sequence[RunFolder], name: str) -> float | None:
    """p-value of the paired test over the queries of all splits that both have runs on; None without such queries.

    Of several seeds on a split, a query's value is the mean over them.
    """
    pairs = []
    for split in dict.fromkeys(run.fingerprint for run in ours):
        sides = [[run.precisions(name) for run in side if run.fingerprint == split] for side in (ours, theirs)]
        known = [[value for value in side if value is not None] for side in sides]
        if all(known):
            pairs.append([np.mean(side, axis=0) for side in known])
    if not pairs:
        return None
    first, second = (np.concatenate(side) for side in zip(*pairs, strict=True))
    return paired_test(first, second)


def _rows(runs: Sequence[RunFolder], metric: str, cells: Cells, shown: Callable[[Cell], str]) -> list[list[str]]:
    """Tasks and methods down, code lengths across, random codes last where known; the first row is the heading."""
    lengths = sorted({run.bits for run in runs})
    rows = [["task", "method", *(f"{bits} bits" for bits in lengths)]]
    for direction, task in TASKS.items():
        for model in dict.fromkeys(run.model for run in runs):
            found = [cells.get((direction, bits, model)) for bits in lengths]
            rows.append([task, model, *("" if cell is None else shown(cell) for cell in found)])
    if metric.startswith("mAP@all"):
        chance = [
            f"{mean(run.results['random_codes'][str(bits)]['mAP@all'] for run in runs if run.bits == bits):.4f}"
            for bits in lengths
        ]
        rows.append(["both", "random codes", *chance])
    return rows


def _caption(runs: Sequence[RunFolder], metric: str, cells: Cells) -> str:
    """What the numbers are: nobody should have to guess."""
    first = runs[0].results
    split, seeds = first["split"], sorted({run.results["seed"] for run in runs})
    splits = ", ".join(dict.fromkeys(run.fingerprint for run in runs))
    several = any(cell.found.count > 1 for cell in cells.values())
    spread = "mean ± standard deviation over" if several else "one run with"
    marks = ""
    if any(cell.best for cell in cells.values()):
        marks = "; * the best of its column"
    if any(cell.p is not None for cell in cells.values()):
        marks += (
            f", ~ not distinguishable from it (paired permutation test over the queries of these runs, Holm over the "
            f"column, {LEVEL:.0%}; another training may differ by more)"
        )
    if any(cell.p is None and not cell.alone for cell in cells.values()):
        marks += ", ? not compared: no query in common"
    return (
        f"{metric} ({_meaning(metric)}) on {first['dataset']}: "
        f"{split['query']} queries, {split['database']} database items, split {splits}; "
        f"{spread} seed {', '.join(map(str, seeds))}; epoch by {first['selection']}{marks}"
    )


def _meaning(metric: str) -> str:
    if "(expected)" in metric:
        return "list cut at rank k, expectation over all orders of ties"
    if "(top)" in metric:
        return "list cut at rank k, ties by database order"
    return "first min(k, relevant) relevant items, ties by database order"


def _notes(runs: Sequence[RunFolder]) -> list[str]:
    return [f"{model}: {mark}" for model, mark in dict.fromkeys((r.model, m) for r in runs for m in r.results["marks"])]


def _markdown(runs: Sequence[RunFolder], metric: str, cells: Cells) -> str:
    def shown(cell: Cell) -> str:
        text = str(cell).removesuffix(" *")
        return f"**{text}**" if cell.best else text

    heading, *rows = _rows(runs, metric, cells, shown)
    caption = _caption(runs, metric, cells).replace("; * the best", "; bold: the best")
    lines = [f"**{caption}**", "", _bar(heading), _bar(["---"] * len(heading)), *map(_bar, rows)]
    return "\n".join(lines) + "\n"


def _bar(texts: Sequence[str]) -> str:
    return f"| {' | '.join(texts)} |"


def _latex(runs: Sequence[RunFolder], metric: str, cells: Cells) -> str:
    """A table with booktabs' rules: the best in bold, what cannot be told from it underlined."""

    def escaped(text: str) -> str:
        return text.replace("→", r"$\to$").replace("±", r"$\pm$").replace("_", r"\_").replace("%", r"\%")

    def shown(cell: Cell) -> str:
        text = str(cell).removesuffix(" *").removesuffix(" ~")
        return rf"\textbf{{{text}}}" if cell.best else rf"\underline{{{text}}}" if cell.tied else text

    def row(texts: Sequence[str]) -> str:
        return f"{' & '.join(map(escaped, texts))} " + r"\\"

    heading, *rows = _rows(runs, metric, cells, shown)
    caption = _caption(runs, metric, cells).replace("; * the", "; bold: the").replace("~ not", "underlined: not")
    body: list[str] = []
    for _, group in itertools.groupby(rows, key=lambda texts: texts[0]):
        body += [r"\midrule", *map(row, group)]
    return "\n".join(
        [
            r"\begin{table}  % needs \usepackage{booktabs}",
            rf"\caption{{{escaped(caption)}}}",
            rf"\begin{{tabular}}{{ll{'c' * (len(heading) - 2)}}}",
            r"\toprule",
            row(heading),
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def _summary_csv(cells: Mapping[str, Cells]) -> str:
    """Every cell of every table, one a line, with its interval and p-value."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["metric", "direction", "bits", "model", "runs", "mean", "std", "low95", "high95", "p_against_best"]
    )
    for metric, found in cells.items():
        for (direction, bits, model), cell in found.items():
            s = cell.found
            several = [repr(value) if s.count > 1 else "" for value in (s.deviation, s.low, s.high)]
            p = "" if cell.p is None else f"{cell.p:.5f}"
            writer.writerow([metric, direction, bits, model, s.count, repr(s.mean), *several, p])
    return text.getvalue()


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
    """Precision-recall and precision@N, with bands where there are several runs, and the first run's loss."""
    dataset = runs[0].results["dataset"]
    models = list(dict.fromkeys(run.model for run in runs))
    for bits in sorted({run.bits for run in runs}):
        chosen = {model: own for model in models if (own := _select(runs, model, bits))}
        for direction, task in TASKS.items():
            found = {model: [run.curves(direction) for run in own] for model, own in chosen.items()}
            title = f"{dataset}, {bits} bits, {task}"
            name = f"precision-recall-{direction}-{bits}bits.png"
            recall = {m: (c[0].recall_levels, [one.precision_at_recall for one in c]) for m, c in found.items()}
            plot_precision_recall(recall, title, folder / name)
            yield name
            name = f"precision-at-n-{direction}-{bits}bits.png"
            precision = {m: (c[0].ranks, [one.precision_at for one in c]) for m, c in found.items()}
            plot_precision_at(precision, title, folder / name)
            yield name
        losses = {model: read_training_log(own[0].folder / "log.jsonl")["loss"] for model, own in chosen.items()}
        name = f"training-loss-{bits}bits.png"
        plot_training_loss(losses, f"{dataset}, {bits} bits", folder / name)
        yield name
