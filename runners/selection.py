"""Which epoch of a run is reported, and when a run has waited long enough for a better one.

A history has one entry an evaluation: `{"epoch": 3, "reports": {...}, "validation": {...}, "codes": {...}}`, with the
numbers of the query split and of the validation split by code length, as far as they were encoded, and with what the
database's codes are like.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from common.config import Config
from common.errors import UserError
from dataset.base import PairedDataset
from dataset.splits import Split

Reports = dict[str, dict[str, float]]
Entry = dict[str, Any]
KEYS: dict[Split, str] = {"query": "reports", "validation": "validation"}  # of an entry, by split
BITS = "codes"  # of an entry: what the database's codes are like, by code length
HOW = {
    "query": "largest i2t + t2i on the query split (the field's habit, which flatters: it saw the answers)",
    "validation": "largest i2t + t2i on {validation} validation pairs, which are neither trained on nor queries",
    "last": "the last epoch, whatever its numbers",
}


def watched_splits(config: Config, dataset: PairedDataset) -> tuple[Split, ...]:
    """The splits that ask at every evaluation: the queries only where the epoch is chosen on them, or nothing else can.

    Raises:
        UserError: If the epoch is to be chosen on a validation split that is empty.
    """
    require_measurable(config, dataset)
    select, validation = config.evaluate.select, len(dataset.splits.validation)
    if select == "validation" and not validation:
        raise UserError(
            "evaluate.select is validation, but dataset.split.validation is 0; set it to a number of pairs, or "
            "evaluate.select=query"
        )
    if not validation:
        return ("query",)
    return ("query", "validation") if select == "query" else ("validation",)


def require_measurable(config: Config, dataset: PairedDataset) -> None:
    """Refuses to evaluate where nothing is asked for that the data set can answer.

    Raises:
        UserError: As said.
    """
    if not dataset.labels.shape[1] and not config.evaluate.pairs:
        raise UserError(
            f"data set {config.dataset.name} has no labels, so there is no mAP to measure; set evaluate.pairs=true to "
            "measure how well pictures and their texts find each other, or give it labels"
        )


def scores(reports: Mapping[Split, Reports]) -> dict[str, float]:
    """The headlines of an evaluation; those of the validation split are named `validation i2t/mAP@all`."""
    return {
        ("" if split == "query" else f"{split} ") + name: value
        for split, numbers in reports.items()
        for name, value in headline(numbers).items()
    }


def headline(reports: Reports) -> dict[str, float]:
    """The first mAP of both cross-modal directions, for the first code length: `{"i2t/mAP@all": ..., ...}`.

    Without labels there is none, and recall@1 of pairs is what there is.
    """
    numbers = next(iter(reports.values()))
    found = {}
    for direction in ("i2t", "t2i"):
        own = [name for name in numbers if name.startswith(f"{direction}/")]
        name = next((name for name in own if "/mAP" in name), own[0])
        found[name] = numbers[name]
    return found


def choose(history: Sequence[Entry], select: str) -> Entry | None:
    """The entry that a way of choosing reports, the first of equals; None where the split it looks at was not encoded.

    Args:
        history: At least one entry.
        select: As `evaluate.select`.
    """
    if select == "last":
        return history[-1]
    key = KEYS["validation" if select == "validation" else "query"]
    if any(key not in entry for entry in history):
        return None
    return max(history, key=lambda entry: sum(headline(entry[key]).values()))


def reported(history: Sequence[Entry], config: Config) -> Entry:
    """The entry that the run reports."""
    entry = choose(history, config.evaluate.select)
    if entry is None:  # watched_splits has the split encoded
        raise ValueError(f"no evaluation of the split that evaluate.select={config.evaluate.select} looks at")
    return entry


def choices(history: Sequence[Entry]) -> dict[str, Entry]:
    """Way of choosing -> the entry that it reports, of those whose numbers on the query split are known."""
    chosen = {select: choose(history, select) for select in HOW}
    return {select: entry for select, entry in chosen.items() if entry is not None and KEYS["query"] in entry}


def out_of_patience(history: Sequence[Entry], config: Config) -> bool:
    """Whether the last `run.patience` evaluations brought no gain on the split that the epoch is chosen on.

    With `evaluate.select: last` that is the validation split, or the queries without one.
    """
    patience = config.run.patience
    if patience is None or not history:
        return False
    select = config.evaluate.select
    if select == "last":
        select = "validation" if KEYS["validation"] in history[0] else "query"
    best = choose(history, select)
    place = next(number for number, entry in enumerate(history) if entry is best)
    return len(history) - 1 - place >= patience
