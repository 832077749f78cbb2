"""What several runs found, side by side: which methods cannot be told from the best."""

import itertools
import json
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from common.errors import UserError
from common.metrics import RetrievalCurves, retrieval_curves
from common.schemas import FREE_KEYS
from common.significance import Array, Summary, holm, paired_test, summary
from common.yaml_layers import flatten, read_yaml
from runners.evaluation import DIRECTIONS

TASKS = {"i2t": "I→T", "t2i": "T→I"}
RANKS = (1, 5, 10, 20, 50, 100, 200, 500, 1000)  # N of precision@N
RECALL_LEVELS = 21
LEVEL = 0.05  # above this p-value a method counts as not distinguishable from the best
MARKS = {
    "*": "the best of its column",
    "~": "not distinguishable from it (paired permutation test over the queries of these runs, Holm over the column, "
    f"{LEVEL:.0%}; another training may differ by more)",
    "?": "not compared: no query in common of which both kept the average precision",
}
MAKE_AGAIN = "make the run again, or remove its folder"
# What tells runs apart besides their variant: columns and rows of the tables, and what a row is the mean over.
# Where the data lie is no setting of a method: what they are, the split's fingerprint tells.
_COUNTED = {"model.name", "model.bits", "dataset.name", "dataset.root", "dataset.cache", "run.seed",
            "dataset.split.seed", *FREE_KEYS}  # fmt: skip


class RunFolder:
    """A finished run, read from its folder.

    Args:
        folder: The run's folder.

    Attributes:
        variant: What tells it from other runs of its method, beside bits and seeds, see `tell_apart`.

    Raises:
        UserError: If its results.json cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.variant = ""
        with named(self.place, MAKE_AGAIN):
            self.results: dict[str, Any] = json.loads(self.place.read_text(encoding="utf-8"))
            self.bits: int = self.results["bits"]

    @property
    def place(self) -> Path:
        """The file of the results."""
        return self.folder / "results.json"

    @property
    def model(self) -> str:
        """Name of the method, with the variant."""
        return self.results["model"] + (f" ({self.variant})" if self.variant else "")

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Every value of the run's configuration by dotted key.

        Raises:
            UserError: If the file is missing or damaged.
        """
        path = self.folder / "config.yaml"
        try:
            tree = read_yaml(path.read_text(encoding="utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read ({error}); {MAKE_AGAIN}") from None
        if not isinstance(tree, dict):
            raise UserError(f"{path} is no mapping of keys to values; {MAKE_AGAIN}")
        return flatten(tree)

    @property
    def numbers(self) -> dict[str, float]:
        """The best epoch's numbers at the run's code length, `{"i2t/mAP@all": ...}`."""
        numbers: dict[str, float] = self.results["best"]["reports"][str(self.bits)]
        return numbers

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the split that it was trained and evaluated on."""
        return str(self.results["split"]["fingerprint"])

    @cached_property
    def _precisions(self) -> dict[str, Array]:
        """Average precisions of every query, [Q] each, by `<bits>/<direction>/<metric>`; empty of a run without."""
        path = self.folder / "ap-best.npz"
        if not path.exists():
            return {}
        remedy = f"make it again with --evaluate {self.folder / 'best.pt'}, or remove it"
        found = load_arrays(path, remedy)
        shape = (self.results["split"]["query"],)
        if any(values.shape != shape or values.dtype.kind != "f" for values in found.values()):
            raise UserError(f"{path} does not hold one number of every query of the run; {remedy}")
        return found

    def precisions(self, name: str) -> Array | None:
        """Average precisions of every query, [Q], by `<bits>/<direction>/<metric>`; None of a run that kept none.

        Raises:
            UserError: If the file is damaged, or that of other queries.
        """
        return self._precisions[name] if name in self._precisions else None

    def saved(self, names: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
        """Codes [N, bits] (or [N, n, bits]) and labels [N, C] of `codes-best.npz`, as `q_img`, `r_txt`, `q_l`, ...

        Raises:
            UserError: If the file is missing or damaged.
        """
        remedy = f"make the codes again with --evaluate {self.folder / 'best.pt'}"
        return load_arrays(self.folder / "codes-best.npz", remedy, names)

    def curves(self, direction: str) -> RetrievalCurves:
        """Precision-recall and precision@N of the saved codes of one direction."""
        asks, answers = ({"image": "img", "text": "txt"}[side] for side in DIRECTIONS[direction])
        saved = self.saved([f"q_{asks}", f"r_{answers}", "q_l", "r_l"]).values()
        query, database, query_labels, labels = (torch.from_numpy(values) for values in saved)
        query, database = query[..., : self.bits], database[..., : self.bits]
        return retrieval_curves(query, database, query_labels, labels, RANKS, RECALL_LEVELS)


def load_arrays(path: Path, remedy: str, names: Sequence[str] | None = None) -> dict[str, npt.NDArray[Any]]:
    """Arrays of an `.npz` file, all of them or those named; nothing in the file is run.

    Args:
        path: The file.
        remedy: What to do about a damaged one, for the message.
        names: In the order of the result.

    Raises:
        UserError: If the file is missing or damaged.
    """
    with named(path, remedy), np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in (file.files if names is None else names)}


@contextmanager
def named(path: Path, remedy: str) -> Iterator[None]:
    """Raises what reading a damaged file, or using what it holds, raises as a UserError that names the file."""
    try:
        yield
    except (
        OSError,
        ValueError,
        KeyError,
        EOFError,
        TypeError,
        AttributeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise UserError(f"{path} is missing or damaged ({type(error).__name__}: {error}); {remedy}") from None


def tell_apart(runs: Sequence[RunFolder]) -> None:
    """Names the variant of every run: the settings in which it differs from runs of its method and length.

    Seeds, those of the split too, make no variant, nor does what changes no result.

    Args:
        runs: Of any methods, lengths and data sets.
    """
    kinds: dict[tuple[str, str], dict[int, list[RunFolder]]] = {}
    for run in runs:
        kind = (run.results["dataset"], run.results["model"])
        kinds.setdefault(kind, {}).setdefault(run.bits, []).append(run)
    for lengths in kinds.values():
        differ = dict.fromkeys(
            key
            for alike in lengths.values()
            for key in dict.fromkeys(key for run in alike for key in run.settings if key not in _COUNTED)
            if any(_value(run, key) != _value(alike[0], key) for run in alike)
        )
        for run in itertools.chain(*lengths.values()):
            run.variant = ", ".join(f"{key}={_value(run, key)}" for key in differ)


def _value(run: RunFolder, key: str) -> str:
    """A setting as the tables show it."""
    value = run.settings[key] if key in run.settings else "–"
    return value if isinstance(value, str) else json.dumps(value)


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

    @property
    def mark(self) -> str:
        """One of `MARKS`; empty where it differs from the best, or nothing is there to compare with."""
        return "*" if self.best else "~" if self.tied else "?" if self.p is None and not self.alone else ""

    def __str__(self) -> str:
        spread = f" ± {self.found.deviation:.4f}" if self.found.count > 1 else ""
        return f"{self.found.mean:.4f}{spread} {self.mark}".rstrip()


def compare(runs: Sequence[RunFolder], name: str) -> dict[tuple[int, str], Cell]:
    """What every method reached at every length, and how that compares with the best of the length.

    Args:
        runs: On one data set, told apart.
        name: Of a number of their results, such as `i2t/mAP@all`; runs without it are left out.

    Returns:
        By bits and method.
    """
    cells: dict[tuple[int, str], Cell] = {}
    known = [run for run in runs if name in run.numbers]
    for bits in sorted({run.bits for run in known}):
        models = dict.fromkeys(run.model for run in known if run.bits == bits)
        chosen = {model: runs_of(known, model, bits) for model in models}
        found = {model: summary([run.numbers[name] for run in own]) for model, own in chosen.items()}
        best = max(found, key=lambda model: found[model].mean)  # noqa: B023 - used at once
        others = [model for model in found if model != best]
        tested = {m: p for m in others if (p := _compared(chosen[best], chosen[m], f"{bits}/{name}")) is not None}
        adjusted = dict(zip(tested, holm(list(tested.values())), strict=True))
        for model, numbers in found.items():
            p = 1.0 if model == best and others else adjusted.get(model)
            cells[bits, model] = Cell(numbers, p, best=model == best and bool(others), alone=not others)
    return cells


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
    return None if np.isnan(first - second).all() else paired_test(first, second)


def compared_numbers(runs: Sequence[RunFolder]) -> list[str]:
    """Names of the numbers that tables show: every mAP, or the recalls without labels, in the runs' order."""
    names = dict.fromkeys(name for run in runs for name in run.numbers)
    maps = [name for name in names if "/mAP" in name]
    return maps or [name for name in names if "/recall" in name]


def runs_of(runs: Sequence[RunFolder], model: str, bits: int) -> list[RunFolder]:
    """Those of one method at one length."""
    return [run for run in runs if (run.model, run.bits) == (model, bits)]


def marks_of(cells: Iterable[Cell]) -> dict[str, str]:
    """The marks that a reader of the cells needs, with their meaning.

    `~` is explained wherever there was a test, so that its absence says something.
    """
    listed = list(cells)
    needed = {cell.mark for cell in listed}
    if any(cell.p is not None and not cell.best for cell in listed):
        needed.add("~")
    return {mark: meaning for mark, meaning in MARKS.items() if mark in needed}
