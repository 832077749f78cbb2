"""What a run found, as numbers that say how they were made: `results.json` and the table on the terminal."""

from collections.abc import Mapping
from typing import Any

from common.config import Config
from common.metrics import random_map
from common.pair_metrics import random_pairs
from dataset.base import PairedDataset
from models.base import HashingModel
from runners.selection import BITS, HOW, KEYS, Entry, Reports, choices, headline, scores
from utils.output import table


def summarise(
    config: Config,
    model: HashingModel,
    dataset: PairedDataset,
    history: list[Entry],
    best: Entry,
    untrained: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Everything that `results.json` holds.

    Args:
        config: The configuration.
        model: The method; its marks are carried along.
        dataset: The data set, for the numbers of random codes on the same labels.
        history: All evaluations of the run.
        best: The one that is reported, with numbers of the query split.
        untrained: What was measured before the first step, see `diagnostics.report_untrained`.

    Returns:
        A dict of JSON values.
    """
    splits, asked = dataset.splits, [entry for entry in history if KEYS["query"] in entry]
    query_labels, database_labels = dataset.labels[splits.query], dataset.labels[splits.database]
    labelled = dataset.labels.shape[1] > 0
    separate = {}
    for name in headline(best["reports"]):
        top = max(asked, key=lambda entry: headline(entry["reports"])[name])  # noqa: B023 - used at once
        separate[name] = {"epoch": top["epoch"], "value": headline(top["reports"])[name]}
    return {
        "model": config.model.name,
        "dataset": config.dataset.name,
        "bits": config.model.bits,
        "codes_per_item": model.codes_per_item,
        "seed": config.run.seed,
        "epochs": config.run.epochs,
        "split": {
            "fingerprint": splits.fingerprint,
            "query": len(splits.query),
            "train": len(splits.train),
            "database": len(splits.database),
            "validation": len(splits.validation),
        },
        "select": config.evaluate.select,
        "selection": _selection(config, dataset) if len(history) > 1 else "the only evaluation",
        "best": best,
        "last": history[-1],
        "untrained": dict(untrained or {}),
        "history": [_epoch(entry) for entry in history],
        "choices": {
            select: {"epoch": entry["epoch"], **headline(entry[KEYS["query"]])}
            for select, entry in choices(history).items()
        },
        "separate_best": separate,
        "random_codes": {
            bits: {
                **(
                    {"mAP@all": random_map(query_labels, database_labels, _shape(model, bits), config.run.seed)}
                    if labelled
                    else {}
                ),
                **(random_pairs(len(splits.query)) if config.evaluate.pairs else {}),
            }
            for bits in best["reports"]
        },
        "marks": [*_several_codes(model), *model.marks, *dataset.marks(model.image_fields | model.text_fields)],
    }


def _epoch(entry: Entry) -> dict[str, Any]:
    """The headlines of an evaluation, and what the codes of the first length were like."""
    reports = {split: entry[key] for split, key in KEYS.items() if key in entry}
    return {"epoch": entry["epoch"], **scores(reports), BITS: next(iter(entry[BITS].values())) if BITS in entry else {}}


def _shape(model: HashingModel, bits: str) -> tuple[int, ...]:
    """Shape of an item's code of one of the model's code lengths."""
    return (*model.code_shape[:-1], int(bits))


def _several_codes(model: HashingModel) -> list[str]:
    """What a reader of a table needs to know where an item takes more than the K bits in its heading."""
    if model.codes_per_item == 1:
        return []
    bits = ", ".join(str(length * model.codes_per_item) for length in model.code_lengths)
    return [
        f"an item has {model.codes_per_item} codes, {bits} bits in all; "
        "the distance of two items is that of their nearest pair of codes"
    ]


def _selection(config: Config, dataset: PairedDataset) -> str:
    return HOW[config.evaluate.select].format(validation=len(dataset.splits.validation))


def results_table(results: dict[str, Any]) -> str:
    """The reported epoch's numbers of every direction and code length, with random codes beside them."""
    best = results["best"]
    found = (map_rows(best["reports"], results["random_codes"]), _pair_rows(results))
    tables = [table(rows) for rows in found if len(rows) > 1]
    epoch = f", epoch {best['epoch']} of {results['epochs']}" if best["epoch"] else ""
    lines = [f"{results['model']} on {results['dataset']}{epoch}", *tables]
    lines.append(f"reported epoch: {results['selection']}")
    if len(results["choices"]) > 1:
        heading = [
            "epoch chosen by",
            "epoch",
            *(name for name in next(iter(results["choices"].values())) if name != "epoch"),
        ]
        chosen = [
            [select, *(f"{value:.4f}" if isinstance(value, float) else str(value) for value in found.values())]
            for select, found in results["choices"].items()
        ]
        lines.append(table([heading, *chosen]))
    lines += [f"note: {mark}" for mark in results["marks"]]
    return "\n".join(lines)


def map_rows(reports: Reports, random_codes: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    """Rows of a table of every mAP; only the heading where there are none.

    Args:
        reports: Code length -> `direction/name` -> number.
        random_codes: Code length -> `mAP@all` of random codes.
    """
    rows: list[list[str]] = [["bits", "direction"]]
    for bits, numbers in reports.items():
        metrics = list(dict.fromkeys(name.partition("/")[2] for name in numbers if "mAP" in name))
        rows[0] = ["bits", "direction", *metrics, "random codes' mAP@all"]
        for direction in dict.fromkeys(name.partition("/")[0] for name in numbers if "mAP" in name):
            values = [f"{numbers[f'{direction}/{metric}']:.4f}" for metric in metrics]
            rows.append([bits, direction, *values, f"{random_codes[bits]['mAP@all']:.4f}"])
    return rows


def _pair_rows(results: dict[str, Any]) -> list[list[str]]:
    """Recalls and median rank of the own partner among all queries; only the heading where they were not asked for."""
    metrics = list(random_pairs(1))
    rows = [["bits", "own partner", *metrics]]
    for bits, numbers in results["best"]["reports"].items():
        for direction in ("i2t", "t2i"):
            if f"{direction}/{metrics[0]}" in numbers:
                rows.append([bits, direction, *(f"{numbers[f'{direction}/{metric}']:.4f}" for metric in metrics)])
        if len(rows) > 1:
            rows.append([bits, "random codes", *(f"{results['random_codes'][bits][metric]:.4f}" for metric in metrics)])
    return rows
