"""Retrieval numbers of anybody's codes: `--score` reads the files that this field exchanges.

Codes of queries and of the database stand in one `.mat` or `.npz` file, with labels, under the names of one of the
tables below. What makes numbers of such a file incomparable with others is said.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor

from common.config import load_section
from common.errors import UserError
from common.metrics import mean_over_queries, random_map, retrieval_values
from common.places import ROOT
from common.schemas import Section
from dataset.labels import read_labels
from dataset.mat_reader import Variable, read_variable, variable_names
from dataset.pictures.reading import Pictures
from runners.evaluation import DIRECTIONS
from runners.results import map_rows
from utils.files import make_folder, sha256, write_json
from utils.launch import pick_device
from utils.output import say, table
from utils.progress import progress

logger = logging.getLogger(__name__)
SETTINGS = ROOT / "configs/score.yaml"
# What a variable holds -> the names that libraries of this field give it, ours and MITH's first; DCMHT, DSPH and DNPH
# write the same; qB and rB are of one kind of code each.
NAMES = {
    "query image": ("q_img", "qBX", "qu_BI", "query_image", "q_image"),
    "query text": ("q_txt", "qBY", "qu_BT", "query_text", "q_text"),
    "database image": ("r_img", "rBX", "re_BI", "retrieval_image", "r_image", "db_img"),
    "database text": ("r_txt", "rBY", "re_BT", "retrieval_text", "r_text", "db_txt"),
    "query": ("qB", "query_code", "query_codes"),
    "database": ("rB", "dB", "retrieval_code", "database_codes"),
    "query labels": ("q_l", "qu_L", "query_L", "query_label", "query_labels", "q_label", "L_te", "qL"),
    "database labels": ("r_l", "re_L", "retrieval_L", "retrieval_label", "database_labels", "r_label", "L_db", "rL"),
}
ONE_WAY = "query to database"  # the direction of codes whose modality the file does not say


class ScoreConfig(Section):
    """`score:` section; `configs/score.yaml` is the commented page of its values."""

    bits: list[int] | None  # lengths of the codes that stand side by side
    cutoffs: list[Literal["all"] | int] = Field(min_length=1)
    definitions: list[Literal["relevant", "top", "expected"]] = Field(min_length=1)
    seed: int = Field(ge=0, lt=2**32)


@dataclass(frozen=True)
class CodeFile:
    """Codes and labels of a file.

    Attributes:
        query: Modality, or "" where the file names none -> codes in {-1, +1}, [Q, K] or [Q, n, K] int8.
        database: The same of the database, [D, K] or [D, n, K].
        query_labels: Multi-hot, [Q, C] bool.
        database_labels: Multi-hot, [D, C] bool.
        lengths: Lengths of the codes that stand side by side in the last axis, as the file says; empty: it does not.
        remarks: How it was read, and what makes its numbers incomparable.
    """

    query: dict[str, Tensor]
    database: dict[str, Tensor]
    query_labels: Tensor
    database_labels: Tensor
    lengths: tuple[int, ...]
    remarks: list[str]

    def directions(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Name, query codes and database codes of every direction that the file has both sides of."""
        for name, (asks, answers) in {**DIRECTIONS, ONE_WAY: ("", "")}.items():
            if asks in self.query and answers in self.database:
                yield name, self.query[asks], self.database[answers]


def score_file(path: Path, overrides: list[str], device_name: str, save_dir: str | None) -> None:
    """Prints the retrieval numbers of a file of codes, and writes them to `score-<name>.json`.

    Args:
        path: A .mat file of MATLAB v4 to v7.3, or a .npz file.
        overrides: Entries `score.key=value`.
        device_name: Where to rank, as `run.device`.
        save_dir: Folder of the results; None: that of the file.

    Raises:
        UserError: If the file or a setting cannot be used.
    """
    config = load_section(SETTINGS, "score", ScoreConfig, overrides)
    device = pick_device(device_name, distribute=False)
    file = read_code_file(path)
    lengths = _lengths(file, config, path)
    labels = file.query_labels.to(device), file.database_labels.to(device)
    reports: dict[str, dict[str, float]] = {}
    random_codes: dict[str, dict[str, float]] = {}
    start = 0
    for bits in lengths:
        numbers: dict[str, float] = {}
        ways = list(file.directions())
        for direction, query, database in progress(ways, total=len(ways), desc=f"{bits} bits", unit="direction"):
            asked, searched = (side[..., start : start + bits].to(device) for side in (query, database))
            report = mean_over_queries(retrieval_values(asked, searched, *labels, config.cutoffs, config.definitions))
            numbers.update({f"{direction}/{name}": value for name, value in report.items()})
        reports[str(bits)] = numbers
        shape = (*ways[0][1].shape[1:-1], bits)
        random_codes[str(bits)] = {"mAP@all": random_map(*labels, shape, config.seed)}
        start += bits
    first = next(iter(reports.values()))
    empty = int(next(value for name, value in first.items() if name.endswith("queries without relevant items")))
    remarks = [*file.remarks, *_warnings(file)]
    if empty:
        remarks.append(f"{empty} of {len(file.query_labels)} queries share no label with the database and are left out")
    folder = path.parent if save_dir is None else Path(save_dir)
    make_folder(folder, "--save-dir")
    results = {
        "file": str(path),
        "sha256": sha256(path),
        "query": len(file.query_labels),
        "database": len(file.database_labels),
        "classes": file.query_labels.shape[1],
        "codes_per_item": int(np.prod(ways[0][1].shape[1:-1], dtype=int)),
        "reports": reports,
        "random_codes": random_codes,
        "remarks": remarks,
    }
    written = folder / f"score-{path.stem}.json"
    write_json(written, results)
    say(f"{path}: {results['query']} queries, {results['database']} database items, {results['classes']} labels")
    say(table(map_rows(reports, random_codes)))
    for remark in remarks:
        say(f"note: {remark}")
    say(f"written to {written}")


def read_code_file(path: Path) -> CodeFile:
    """Reads codes and labels of queries and database.

    Args:
        path: A .mat file of MATLAB v4 to v7.3, or a .npz file.

    Raises:
        UserError: If it cannot be read, or lacks a side, or what it holds does not fit together.
    """
    there = variable_names(path)
    variables = {
        what: read_variable(path, names) for what, names in NAMES.items() if any(name in there for name in names)
    }
    codes = {what: variable for what, variable in variables.items() if not what.endswith("labels")}
    complete = [
        (asks, answers)
        for asks, answers in (
            (f"query {a}".strip(), f"database {b}".strip()) for a, b in [*DIRECTIONS.values(), ("", "")]
        )
        if asks in codes and answers in codes
    ]
    missing = [what for what in ("query labels", "database labels") if what not in variables]
    if not complete or missing:
        lacks = missing or ["codes of queries and of the database"]
        known = "; ".join(f"{what}: {', '.join(names)}" for what, names in NAMES.items())
        raise UserError(f"{path} lacks {' and '.join(lacks)}, it has {', '.join(there)}; names that are read: {known}")
    remarks: list[str] = []
    arrays = _signs({what: _numbers(variable) for what, variable in codes.items()}, path, remarks)
    width = arrays[complete[0][0]].shape[-1]
    for what, array in arrays.items():
        if array.shape[-1] != width:
            raise UserError(
                f"{codes[what].place} has codes of {array.shape[-1]} bits, but {codes[complete[0][0]].place} of "
                f"{width}; give every item a row"
            )
    sides = {side: {w.partition(" ")[2]: a for w, a in arrays.items() if w.split(" ")[0] == side}
             for side in ("query", "database")}  # fmt: skip
    counts: dict[str, int] = {}
    for side, members in sides.items():
        sizes = {len(array) for array in members.values()}
        if len(sizes) > 1:
            raise UserError(
                f"{path}: {side} codes of pictures and of texts have {sorted(sizes)} rows; give every item both"
            )
        counts[side] = sizes.pop()
    labels = _labels(variables["query labels"], variables["database labels"], counts["query"], counts["database"])
    lengths: tuple[int, ...] = ()
    if "lengths" in there:
        lengths = tuple(int(length) for length in _numbers(read_variable(path, ["lengths"])).reshape(-1))
    tensors = {side: {name: torch.from_numpy(a) for name, a in members.items()} for side, members in sides.items()}
    return CodeFile(tensors["query"], tensors["database"], *labels, lengths, remarks)


def _numbers(variable: Variable) -> npt.NDArray[Any]:
    value = variable.value
    if isinstance(value, Pictures) or value.dtype.kind not in "biuf" or value.size == 0:
        raise UserError(f"{variable.place} holds no numbers; write an item's code as a row of -1 and +1")
    if not np.isfinite(value).all():
        raise UserError(f"{variable.place} holds values that are not finite; make it again")
    return value


def _signs(arrays: Mapping[str, npt.NDArray[Any]], path: Path, remarks: list[str]) -> dict[str, npt.NDArray[np.int8]]:
    """Codes in {-1, +1} of all arrays: each of -1 and +1 or of 0 and 1, or else all real values."""
    for what, array in arrays.items():
        if array.ndim not in (2, 3):
            raise UserError(
                f"{path}: {what} codes have the shape {list(array.shape)}; write [items, bits], or [items, codes, bits]"
            )
        if array.dtype.kind in "iu" and array.max() > 1:
            raise UserError(
                f"{path}: {what} codes are whole numbers up to {array.max()}, such as bits packed into bytes are; "
                "unpack them (numpy.unpackbits) to one value a bit"
            )
    low = {what: next((sign for sign in (-1, 0) if ((array == 1) | (array == sign)).all()), None)
           for what, array in arrays.items()}  # fmt: skip
    if None not in low.values():
        zeros_in = [what for what, sign in low.items() if sign == 0]
        if zeros_in:
            which = "" if len(zeros_in) == len(low) else f"{' and '.join(zeros_in)} "
            remarks.append(f"{which}codes are 0 and 1; 0 is read as -1")
        return {what: np.where(array == 1, 1, -1).astype(np.int8) for what, array in arrays.items()}
    zeros = sum(int((array == 0).sum()) for array in arrays.values()) / sum(array.size for array in arrays.values())
    share = f", and {zeros:.2%} of them are 0, which is read as +1" if zeros else ""
    remarks.append(
        f"codes are real values: their signs are scored{share}; whoever ranked the values themselves had others"
    )
    return {what: np.where(array >= 0, 1, -1).astype(np.int8) for what, array in arrays.items()}


def _labels(query: Variable, database: Variable, queries: int, items: int) -> tuple[Tensor, Tensor]:
    """Labels of both sides, read together so that class numbers mean the same."""
    sides = []
    for variable, count in ((query, queries), (database, items)):
        value = _numbers(variable)
        value = value[:, None] if value.ndim == 1 else value
        value = value.T if value.ndim == 2 and value.shape[0] != count and value.shape[1] == count else value
        if value.ndim != 2 or len(value) != count:
            raise UserError(f"{variable.place} has the shape {list(value.shape)}, but there are codes of {count} items")
        sides.append(value)
    if sides[0].shape[1] != sides[1].shape[1]:
        raise UserError(
            f"{query.place} has {sides[0].shape[1]} labels an item, but {database.place} {sides[1].shape[1]}; "
            "both must be of the same classes"
        )
    together = read_labels(np.concatenate(sides), queries + items, f"{query.place} with {database.key}")
    return together[:queries], together[queries:]


def _lengths(file: CodeFile, config: ScoreConfig, path: Path) -> tuple[int, ...]:
    width = next(file.directions())[1].shape[-1]
    lengths = tuple(config.bits or file.lengths or (width,))
    if sum(lengths) != width or min(lengths) < 1:
        raise UserError(
            f"score.bits: lengths {list(lengths)} of codes side by side do not add up to the {width} columns of {path}"
        )
    return lengths


def _warnings(file: CodeFile) -> Iterator[str]:
    """What makes numbers incomparable, in words."""
    for side, members in (("query", file.query), ("database", file.database)):
        for modality, codes in members.items():
            constant = int((codes == codes[:1]).all(dim=0).sum())
            if constant and len(codes) > 1:
                bits = f"{constant} of {codes[0].numel()} bits of the {f'{side} {modality}'.strip()} codes"
                yield f"{bits} have one sign for all {len(codes)} items, so they tell nothing apart"
    database = _rows(file.database, file.database_labels)
    known = set(database)
    found = sum(row in known for row in _rows(file.query, file.query_labels))
    if found and file.query.keys() == file.database.keys():
        yield (
            f"{found} of {len(file.query_labels)} queries equal a database item in all codes and labels: they may lie "
            "in the database, where a query finds itself first"
        )
    twice = len(database) - len(known)
    if twice:
        yield f"{twice} of {len(database)} database items equal an earlier one in all codes and labels"


def _rows(codes: Mapping[str, Tensor], labels: Tensor) -> list[bytes]:
    """All that a file says of every item, as bytes."""
    parts = [np.packbits(side.numpy().reshape(len(labels), -1) > 0, axis=1) for _, side in sorted(codes.items())]
    together = np.concatenate([*parts, np.packbits(labels.numpy(), axis=1)], axis=1)
    return [row.tobytes() for row in together]
