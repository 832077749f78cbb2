"""Files about several runs: a table laid out like the papers' Table 1, every number, and curves."""

import csv
import io
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean

from runners.comparison import TASKS, Cell, RunFolder, compare, compared_numbers, marks_of, runs_of, tell_apart
from utils.files import write_text
from utils.output import table
from utils.plots import plot_precision_at, plot_precision_recall, plot_training_loss, read_training_log

Cells = dict[tuple[str, int, str], Cell]  # direction, bits, model


def write_summary(folder: Path, runs: Sequence[RunFolder]) -> str:
    """Writes `table.md`, `table.csv`, `summary.csv`, `table.tex` and the curves of finished runs on one data set.

    Args:
        folder: Where the files go.
        runs: At least one.

    Returns:
        The table and the names of the files, for the terminal.
    """
    tell_apart(runs)
    metrics = list(dict.fromkeys(name.partition("/")[2] for name in compared_numbers(runs)))
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


def _cells(runs: Sequence[RunFolder], metric: str) -> Cells:
    """The cells of the table of a metric."""
    return {
        (direction, *place): cell
        for direction in TASKS
        for place, cell in compare(runs, f"{direction}/{metric}").items()
    }


def _rows(runs: Sequence[RunFolder], metric: str, cells: Cells, shown: Callable[[Cell], str]) -> list[list[str]]:
    """Tasks and methods down, code lengths across, random codes last where known; the first row is the heading."""
    lengths = sorted({run.bits for run in runs})
    rows = [["task", "method", *(f"{bits} bits" for bits in lengths)]]
    for direction, task in TASKS.items():
        for model in dict.fromkeys(run.model for run in runs):
            found = [cells.get((direction, bits, model)) for bits in lengths]
            rows.append([task, model, *("" if cell is None else shown(cell) for cell in found)])
    known = "mAP@all" if metric.startswith("mAP@all") else metric
    if all(known in run.results["random_codes"][str(run.bits)] for run in runs):
        chance = [
            f"{mean(run.results['random_codes'][str(bits)][known] for run in runs if run.bits == bits):.4f}"
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
    marks = ", ".join(f"{mark} {meaning}" for mark, meaning in marks_of(cells.values()).items())
    return (
        f"{metric} ({_meaning(metric)}) on {first['dataset']}: "
        f"{split['query']} queries, {split['database']} database items, split {splits}; "
        f"{spread} seed {', '.join(map(str, seeds))}; epoch by {first['selection']}{'; ' if marks else ''}{marks}"
    )


def _meaning(metric: str) -> str:
    if metric.startswith("recall"):
        return "share of queries whose own partner is among the first k of the query split, expectation over ties"
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
    """Precision-recall and precision@N, with bands where there are several runs, and the first run's loss.

    Without labels nothing is relevant, so that there is the loss alone.
    """
    dataset, labelled = runs[0].results["dataset"], any("/mAP" in name for name in compared_numbers(runs))
    models = list(dict.fromkeys(run.model for run in runs))
    for bits in sorted({run.bits for run in runs}):
        chosen = {model: own for model in models if (own := runs_of(runs, model, bits))}
        for direction, task in TASKS.items() if labelled else ():
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
