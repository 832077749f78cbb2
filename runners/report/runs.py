"""What the page says of a run: everything is read from its folder, and the pictures from its data set."""

import base64
import io
import logging
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.code_statistics import bit_correlation, constant_bits
from common.config import load_config
from common.errors import UserError
from common.metrics import average_precision
from dataset.base import PairedDataset, dataset_class
from dataset.columns import CaptionColumn
from runners.comparison import MAKE_AGAIN, RunFolder, named, tell_apart
from runners.evaluation import DIRECTIONS

logger = logging.getLogger(__name__)
ASKED = 1000  # queries of which all distances are counted
ROWS_AT_ONCE = 64  # of them
HITS = 10
THUMBNAIL = 84  # pixels of the longer side
CUT = 160  # characters of a text that are shown
SIDES = {"image": "img", "text": "txt"}


class ReportedRun(RunFolder):
    """A finished run with its codes and its data set.

    Args:
        folder: The run's folder.

    Raises:
        UserError: If a file of it is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        with named(self.place, MAKE_AGAIN):
            self._precision: dict[str, Tensor] = {}
            self.seed: int = self.results["seed"]
            self.epoch: int = self.results["best"]["epoch"]
            self.dataset_name: str = self.results["dataset"]
            self.random: dict[str, float] = self.results["random_codes"][str(self.bits)]
            self.marks = [str(mark) for mark in self.results["marks"]]
            self.split = {key: self.results["split"][key] for key in ("fingerprint", "query", "database")}
            self.chosen = f"{self.results['selection']}"
            self.last_epoch: int = self.results["epochs"]
            fine = all(isinstance(value, int | float) for value in self.numbers.values())
        if not fine:
            raise UserError(f"{self.place} holds something other than numbers; make the run again")

    @cached_property
    def arrays(self) -> dict[str, Tensor]:
        """Codes and labels of queries and database as they were saved, codes cut to the run's length."""
        saved = self.saved(["q_img", "q_txt", "r_img", "r_txt", "q_l", "r_l"])
        found = {name: torch.from_numpy(values) for name, values in saved.items()}
        for side in "qr":
            labels = found[f"{side}_l"]
            for codes in (found[f"{side}_img"], found[f"{side}_txt"]):
                fits = codes.ndim in (2, 3) and codes.shape[-1] >= self.bits and 0 < len(codes) == len(labels)
                if not fits or labels.shape[1:] != found["q_l"].shape[1:] or not bool((codes.abs() == 1).all()):
                    raise UserError(
                        f"{self.folder / 'codes-best.npz'} does not hold codes of {self.bits} bits with labels; make "
                        f"them again with --evaluate {self.folder / 'best.pt'}"
                    )
        return {name: value if name.endswith("_l") else value[..., : self.bits] for name, value in found.items()}

    def forget(self) -> None:
        """Drops the codes, which are read again when asked for: those of all runs of a folder may be large."""
        vars(self).pop("arrays", None)

    @cached_property
    def dataset(self) -> PairedDataset | str:
        """The run's data set, or why it cannot be shown."""
        try:
            config = load_config(self.folder / "config.yaml")
            data = dataset_class(config.dataset.type)(config.dataset)
        except UserError as error:
            return f"The data set cannot be opened, so texts and pictures are not shown: {error}"
        if data.splits.fingerprint != self.split["fingerprint"]:
            return "The data set there has another split than the run, so texts and pictures are not shown."
        return data

    def sides(self, direction: str) -> tuple[Tensor, Tensor]:
        """Codes of the queries [Q, K] (or [Q, n, K]) and of the database of a direction."""
        asks, answers = (SIDES[side] for side in DIRECTIONS[direction])
        return self.arrays[f"q_{asks}"], self.arrays[f"r_{answers}"]

    def precision(self, direction: str) -> Tensor:
        """Average precision of every query over the whole list, [Q]; NaN without a relevant item."""
        if direction not in self._precision:
            labels = self.arrays["q_l"], self.arrays["r_l"]
            self._precision[direction] = average_precision(*self.sides(direction), *labels)
        return self._precision[direction]

    def histogram(self, direction: str) -> tuple[dict[str, list[float]], int]:
        """Share of the relevant and of the other pairs at every Hamming distance, and how many queries were counted."""
        query, database = self.sides(direction)
        rows = torch.linspace(0, len(query) - 1, min(ASKED, len(query))).round().long()
        counts = torch.zeros(2, self.bits + 1, dtype=torch.float64)
        for block in rows.split(ROWS_AT_ONCE):
            relevant = _share_label(self.arrays["q_l"][block], self.arrays["r_l"])
            distances = nearest_distances(query[block], database)
            for number, chosen in enumerate((relevant, ~relevant)):
                counts[number] += torch.bincount(distances[chosen], minlength=self.bits + 1)
        shares = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
        return {"relevant": shares[0].tolist(), "not relevant": shares[1].tolist()}, len(rows)

    def balance(self) -> dict[str, list[float]]:
        """Share of +1 in every bit of the database's codes."""
        return {
            side: (self.arrays[f"r_{short}"].flatten(0, -2) > 0).double().mean(dim=0).tolist()
            for side, short in SIDES.items()
        }

    def bit_rows(self) -> list[tuple[str, float, float, float]]:
        """Of both modalities: share of constant bits, mean |correlation|, mean distance of shares from a half."""
        rows = []
        for side, shares in self.balance().items():
            codes = self.arrays[f"r_{SIDES[side]}"]
            uneven = float(np.mean(np.abs(np.array(shares) - 0.5)))
            rows.append((side, constant_bits(codes), bit_correlation(codes), uneven))
        return rows

    def label_rows(self) -> list[tuple[str, int, float | None, float | None]]:
        """Of every label: its name, the queries that have it, and their mean average precision in both directions."""
        labels = self.arrays["q_l"].bool()
        names = None if isinstance(self.dataset, str) else self.dataset.label_names
        precision = [self.precision(direction) for direction in ("i2t", "t2i")]
        rows: list[tuple[str, int, float | None, float | None]] = []
        for column in range(labels.shape[1]):
            own = labels[:, column]
            means = [values[own & ~values.isnan()] for values in precision]
            found = [float(values.mean()) if len(values) else None for values in means]
            name = names[column] if names is not None else f"label {column + 1}"
            rows.append((name, int(own.sum()), found[0], found[1]))
        return sorted(rows, key=lambda row: -row[1])

    def examples(self) -> list[dict[str, Any]]:
        """The best, the middle and the worst query of both directions with their first hits."""
        return [
            self._example(direction, row, kind)
            for direction in ("t2i", "i2t")
            for kind, row in _extremes(self.precision(direction)).items()
        ]

    def _example(self, direction: str, row: int, kind: str) -> dict[str, Any]:
        asks, answers = DIRECTIONS[direction]
        query, database = self.sides(direction)
        distances = nearest_distances(query[row : row + 1], database)[0]
        order = torch.argsort(distances, stable=True)[:HITS]
        relevant = _share_label(self.arrays["q_l"][row : row + 1], self.arrays["r_l"])[0]
        return {
            "direction": direction,
            "kind": kind,
            "precision": float(self.precision(direction)[row]),
            "query": self._item("query", row, asks),
            "hits": [
                {
                    **self._item("database", place, answers),
                    "distance": int(distances[place]),
                    "right": bool(relevant[place]),
                }
                for place in order.tolist()
            ],
        }

    def _item(self, split: Any, row: int, side: str) -> dict[str, Any]:
        """A picture as a data URI, or a text; only the number where the data set is not there."""
        data = self.dataset
        if isinstance(data, str):
            return {"says": f"{split} item {row + 1}"}
        number = int(data.splits.items(split)[row])
        column = data.columns[split].get("text")
        captions = column.captions.texts[number] if isinstance(column, CaptionColumn) else []
        says = (captions[0] if captions else data.names[number])[:CUT]
        if side == "text":
            return {"says": says}
        try:
            return {"says": says, "picture": thumbnail(data.pictures.read(number))}
        except (UserError, OSError) as error:
            logger.warning("%s: picture %s is not shown: %s", self.folder, data.names[number], error)
            return {"says": f"{says} (the picture cannot be read)"}


def nearest_distances(codes: Tensor, database: Tensor) -> Tensor:
    """Hamming distances of codes [Q, K] to items [D, K], or of the nearest pair of [Q, n, K] and [D, n, K]; [Q, D]."""
    bits, several = codes.shape[-1], codes.shape[1] if codes.ndim == 3 else 1
    products = codes.float().reshape(-1, bits) @ database.float().reshape(-1, bits).T
    nearest = products.view(len(codes), several, len(database), several).amax((1, 3))
    return ((bits - nearest) / 2).round().long()


def thumbnail(picture: Image.Image) -> str:
    """A small JPEG as a data URI."""
    small = picture.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=70)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def find_runs(folder: Path) -> tuple[list[ReportedRun], list[str]]:
    """The finished runs of a folder, itself or those right below it, and the names of the unfinished ones.

    Raises:
        UserError: If there is none, or one is damaged.
    """
    if not folder.is_dir():
        raise UserError(f"--report {folder}: there is no such folder; name that of a run or of a sweep")
    below = sorted(path for path in folder.iterdir() if path.is_dir())
    folders = [folder] if (folder / "results.json").exists() else below
    finished = [path for path in folders if (path / "results.json").exists()]
    unfinished = [path.name for path in folders if path not in finished and (path / "log.jsonl").exists()]
    if not finished:
        what = f" ({', '.join(unfinished)} not finished: run the command again)" if unfinished else ""
        raise UserError(f"--report {folder}: holds no finished run{what}; name the folder of a run or of a sweep")
    runs = [ReportedRun(path) for path in finished]
    tell_apart(runs)
    return runs, unfinished


def differences(runs: list[ReportedRun], free: frozenset[str]) -> dict[str, list[str]]:
    """The settings in which runs differ, but those that change no result: key -> value of every run."""
    keys = dict.fromkeys(key for run in runs for key in run.settings if key not in free)
    values = {key: [str(run.settings[key]) if key in run.settings else "–" for run in runs] for key in keys}
    return {key: own for key, own in values.items() if len(set(own)) > 1}


def epochs(run: ReportedRun) -> Mapping[str, tuple[list[float], list[float]]]:
    """The headlines of every evaluation of a run: name -> (epochs, values)."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for entry in run.results["history"] if "history" in run.results else []:
        for name, value in entry.items():
            if name != "epoch" and isinstance(value, int | float):
                xs, ys = found.setdefault(name, ([], []))
                xs.append(entry["epoch"])
                ys.append(value)
    return found


def _share_label(labels: Tensor, others: Tensor) -> Tensor:
    """Which items [D, C] share a label with each of some [Q, C], [Q, D] bool."""
    return labels.float() @ others.float().T > 0


def _extremes(values: Tensor) -> dict[str, int]:
    """Rows of the largest, the middle and the smallest value; fewer where there are fewer."""
    known = [row for row in torch.argsort(values, descending=True, stable=True).tolist() if not values[row].isnan()]
    if not known:
        return {}
    return {"best": known[0], "middle": known[len(known) // 2], "worst": known[-1]}
