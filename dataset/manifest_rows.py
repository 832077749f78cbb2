"""Rows of a manifest: a JSONL or CSV file that says which pictures and texts belong together.

    {"image": "cats/1.jpg", "texts": ["a cat", "a cat asleep"], "labels": ["cat", "sofa"], "year": 2019}

Columns: `image`, a path from the manifest's folder, with `/` or a backslash; `text` or `texts`; `labels`, names or
class numbers. All others are metadata. In a CSV file several texts or labels stand in one cell, with `|` between them.
Rows are read one at a time.
"""

import csv
import json
import os
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from common.errors import UserError
from utils.files import is_utf8

JSON_LINES, TABLES = (".jsonl", ".ndjson"), (".csv",)
BETWEEN = "|"  # in a CSV cell with several texts or labels
_MISNOMERS = {  # what other programs name the columns
    "image": ("img", "image_path", "img_path", "path", "file", "file_name", "filename", "picture", "images"),
    "text": ("caption", "captions", "sentence", "sentences", "description", "txt", "raw"),
    "labels": ("label", "category", "categories", "class", "classes", "target", "targets"),
}
_LIST = re.compile(r"\[\s*(['\"])?.*\]", re.DOTALL)  # as Python and pandas write a list into a cell
_LONGEST = 1 << 20  # bytes of a line, so that a file without line ends does not fill memory


@dataclass(frozen=True, slots=True)
class ManifestRow:
    """One row.

    Attributes:
        line: Its line in the file, from 1; that of its end, where a CSV cell goes over several.
        image: Path of the picture, with the root before it; None without one.
        texts: Its texts, none of them blank.
        labels: Its labels by name; the name of a class number is its digits. None without the column.
        metadata: All other columns: JSON values from JSONL, strings from CSV.
    """

    line: int
    image: str | None = None
    texts: tuple[str, ...] = ()
    labels: tuple[str, ...] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


def is_manifest(path: Path) -> bool:
    """Whether a file's name is that of a manifest."""
    return path.suffix.lower() in (*JSON_LINES, *TABLES)


def read_manifest(path: Path, *, root: Path | None = None, needs: Collection[str] = ()) -> Iterator[ManifestRow]:
    """Rows of a manifest, in order. Whether the pictures are there is not looked at.

    Args:
        path: The file: `.jsonl` or `.ndjson` with one JSON object a line, or `.csv` with names in its first line.
        root: Folder that relative paths start from, and that no path may leave (links in it are its owner's matter);
            None for the manifest's own.
        needs: What every row must have, of `image`, `text` (`texts` will do) and `labels`.

    Yields:
        Rows, each with a picture or a text at least.

    Raises:
        UserError: If the file cannot be read, or a row is not as said; the message names the line.
    """
    if not is_manifest(path):
        raise UserError(f"{path} is no manifest: its name must end in {', '.join((*JSON_LINES, *TABLES))}")
    reader = _Reader(path, os.path.abspath(path.parent if root is None else root), needs)
    entries = _table_entries(path) if path.suffix.lower() in TABLES else _json_entries(path)
    for line, entry in entries:
        yield reader.row(line, entry)


class _Reader:
    """Turns what stands in a line into a row.

    Args:
        path: The manifest, for messages.
        root: Folder of relative paths, absolute.
        needs: As `read_manifest`.
    """

    def __init__(self, path: Path, root: str, needs: Collection[str]) -> None:
        self.path = path
        self.root = root
        self.inside = os.path.join(root, "")
        self.needs = needs

    def row(self, line: int, entry: dict[str, Any]) -> ManifestRow:
        image = self._image(line, entry.pop("image", None))
        texts = self._names(line, entry, "text") + self._names(line, entry, "texts")
        labelled = entry.get("labels") is not None
        labels = self._names(line, entry, "labels")
        if len(set(labels)) < len(labels):
            _refuse(self.path, line, "names a label twice; labels are names or class numbers, not a row of 0 and 1")
        row = ManifestRow(line, image, texts, labels if labelled else None, entry)
        present = {"image": image, "text": texts, "labels": row.labels}
        lacking = next((name for name in self.needs if not present[name]), None)
        if lacking is not None:
            _refuse(self.path, line, f"has no {lacking}{misnamed(lacking, entry)}")
        if image is None and not texts:
            _refuse(self.path, line, "has neither image nor text")
        return row

    def _image(self, line: int, value: Any) -> str | None:
        if value is None or value == "":
            return None
        if not isinstance(value, str) or "\0" in value:
            _refuse(self.path, line, f"image is {_short(value)}, not a path")
        place = os.path.normpath(os.path.join(self.root, value.replace("\\", "/")))
        if not place.startswith(self.inside):
            _refuse(self.path, line, f"image {_short(value)} leads out of {self.root}, so it is not read")
        return place

    def _names(self, line: int, entry: dict[str, Any], column: str) -> tuple[str, ...]:
        """Strings of a column, blank ones left out; labels in one normal form, class numbers as their digits."""
        value = entry.pop(column, None)
        values = [] if value is None else value if isinstance(value, list) else [value]
        numbers = column == "labels"
        for part in values:
            if not isinstance(part, str) and not (numbers and isinstance(part, int) and not isinstance(part, bool)):
                kind = "a label: a name or a class number" if numbers else "a text"
                _refuse(self.path, line, f"{column} holds {_short(part)}, which is not {kind}")
        names = (str(part).strip() for part in values)
        return tuple(unicodedata.normalize("NFC", name) if numbers else name for name in names if name)


def misnamed(column: str, others: Collection[str]) -> str:
    """Half a sentence on a column that seems to hold what `column` lacks; empty without one."""
    found = next((name for name in others if name.strip().lower() in _MISNOMERS.get(column, ())), None)
    return "" if found is None else f", but {found!r}: name that column {column}"


def _json_entries(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The object of every line that is not blank."""
    for line, text in enumerate(_lines(path), start=1):
        if text.isspace():
            continue
        try:
            entry = json.loads(text, parse_constant=_no_number)
        except (ValueError, RecursionError) as error:
            _refuse(path, line, f"is not JSON ({error})")
        if not isinstance(entry, dict):
            _refuse(path, line, 'is no JSON object such as {"image": "1.jpg", "text": "a cat"}')
        if "\\u" in text and not is_utf8(json.dumps(entry, ensure_ascii=False)):  # only an escape can be such
            _refuse(path, line, "holds half of a character (\\ud800 to \\udfff alone), which is no text")
        yield line, entry


def _table_entries(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every row below the heading by the heading's names; empty cells are left out."""
    rows = csv.reader(_lines(path), strict=True)
    names: list[str] = []
    try:
        for cells in rows:
            if not names:
                names = [cell.strip() for cell in cells]
                _check_heading(path, names)
                continue
            if not cells:
                continue
            if len(cells) != len(names):
                _refuse(path, rows.line_num, f"has {len(cells)} cells, the heading {len(names)}")
            entry: dict[str, Any] = {name: cell for name, cell in zip(names, cells, strict=True) if cell}
            for several in ("texts", "labels"):
                cell = entry.get(several, "").strip()
                listed = _LIST.fullmatch(cell)
                if listed and (several == "labels" or listed[1]):
                    _refuse(path, rows.line_num, f"{several} is {_short(cell)}; write a list as {BETWEEN.join('abc')}")
                if cell:
                    entry[several] = cell.split(BETWEEN)
            yield rows.line_num, entry
    except csv.Error as error:
        _refuse(path, rows.line_num, f"is not CSV ({error})")


def _check_heading(path: Path, names: list[str]) -> None:
    if len(set(names)) < len(names) or "" in names:
        _refuse(path, 1, "must name every column, each once")
    if not {"image", "text", "texts"} & set(names):
        _refuse(path, 1, f"names neither image nor text, but {_short(', '.join(names))}; the first line is the heading")


def _lines(path: Path) -> Iterator[str]:
    """Lines of a UTF-8 file with their ends; a byte order mark is left out."""
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise UserError(f"{path} is no regular file; name a manifest")
    try:
        with path.open("rb") as file:
            for line, raw in enumerate(_raw_lines(file), start=1):
                if len(raw) > _LONGEST:
                    _refuse(path, line, f"is longer than {_LONGEST >> 20} MB")
                try:
                    yield raw.decode("utf-8-sig" if line == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    _refuse(path, line, f"is not UTF-8 text (byte {error.start} of the line)")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); name an existing manifest") from None


def _raw_lines(file: Any) -> Iterable[bytes]:
    return iter(lambda: file.readline(_LONGEST + 1), b"")


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _refuse(path: Path, line: int, what: str) -> NoReturn:
    raise UserError(f"{path}, line {line}: {what}; mend or remove the line")
