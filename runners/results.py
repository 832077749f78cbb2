"""What a run found, as numbers that say how they were made: `results.json` and the table on the terminal."""

from typing import Any

from common.config import Config
from common.metrics import random_map
from dataset.base import PairedDataset
from models.base import HashingModel
from utils.output import table

Reports = dict[str, dict[str, float]]
SELECTION = "largest i2t + t2i on the query split (the field's habit: there is no validation split)"


def headline(reports: Reports) -> dict[str, float]:
    """The first metric of both cross-modal directions, for the first code length: `{"i2t/mAP@all": ..., ...}`."""
    numbers = next(iter(reports.values()))
    found = {}
    for direction in ("i2t", "t2i"):
        name = next(name for name in numbers if name.startswith(f"{direction}/"))
        found[name] = numbers[name]
    return found


def best_of(history: list[dict[str, Any]]) -> dict[str, Any]:
    """The evaluation with the largest headline sum; the first of equals."""
    return max(history, key=lambda entry: sum(headline(entry["reports"]).values()))


def summarise(
    config: Config, model: HashingModel, dataset: PairedDataset, history: list[dict[str, Any]]
) -> dict[str, Any]:
    """Everything that `results.json` holds.

    Args:
        config: The configuration.
        model: The method; its marks are carried along.
        dataset: The data set, for the numbers of random codes on the same labels.
        history: All evaluations of the run.

    Returns:
        A dict of JSON values.
    """
    best, splits = best_of(history), dataset.splits
    query_labels, database_labels = dataset.labels[splits.query], dataset.labels[splits.database]
    separate = {}
    for name in headline(best["reports"]):
        top = max(history, key=lambda entry: headline(entry["reports"])[name])  # noqa: B023 - used at once
        separate[name] = {"epoch": top["epoch"], "value": headline(top["reports"])[name]}
    return {
        "model": config.model.name,
        "dataset": config.dataset.name,
        "bits": config.model.bits,
        "seed": config.run.seed,
        "epochs": config.run.epochs,
        "split": {
            "fingerprint": splits.fingerprint,
            "query": len(splits.query),
            "train": len(splits.train),
            "database": len(splits.database),
        },
        "selection": SELECTION if len(history) > 1 else "the only evaluation",
        "best": best,
        "last": history[-1],
        "separate_best": separate,
        "random_codes": {
            bits: {"mAP@all": random_map(query_labels, database_labels, int(bits), config.run.seed)}
            for bits in best["reports"]
        },
        "marks": [*model.marks, *dataset.marks(model.image_fields | model.text_fields)],
    }


def results_table(results: dict[str, Any]) -> str:
    """The best epoch's mAPs of four directions and every code length, with random codes beside them."""
    best = results["best"]
    rows: list[list[str]] = []
    for bits, numbers in best["reports"].items():
        metrics = list(dict.fromkeys(name.partition("/")[2] for name in numbers if "mAP" in name))
        if not rows:
            rows.append(["bits", "direction", *metrics, "random codes' mAP@all"])
        for direction in dict.fromkeys(name.partition("/")[0] for name in numbers):
            values = [f"{numbers[f'{direction}/{metric}']:.4f}" for metric in metrics]
            rows.append([bits, direction, *values, f"{results['random_codes'][bits]['mAP@all']:.4f}"])
    epoch = f", epoch {best['epoch']} of {results['epochs']}" if best["epoch"] else ""
    lines = [f"{results['model']} on {results['dataset']}{epoch}", table(rows), f"best epoch: {results['selection']}"]
    lines += [f"note: {mark}" for mark in results["marks"]]
    return "\n".join(lines)
