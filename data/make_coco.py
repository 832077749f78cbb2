"""Prepares MS COCO 2017: pictures with five and more written captions and 80 labels.

Official archives: `train2017.zip`, `val2017.zip`, `annotations_trainval2017.zip`.

    python data/make_coco.py --source /downloads/coco
"""

import io
import json
import sys
from array import array
from collections.abc import Callable, Mapping
from json import JSONDecodeError
from pathlib import Path
from typing import Any, TextIO

if not __package__:  # run as a script: the packages of the repository stand one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from utils.signals import die_of_interrupts

    die_of_interrupts()

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from common.errors import UserError
from data.preparation import Pairs, Protocol, run
from data.source_files import find, reading
from utils.progress import progress

PARTS = ("train2017", "val2017")
BUFFER = 1 << 22  # characters of a JSON file read at a time
LARGEST = 1 << 26  # characters of the largest entry that is still taken for one

RULE = "pictures with an object, train2017 then val2017, by id; text: all captions"
KNOWN = {"pairs": 122_218, "labels": 80, "train2017": 117_266, "val2017": 4_952}
PROTOCOLS = {
    "dcmht": Protocol(RULE, "DCMHT, DSPH, DNPH, TwDH, DIMCH, UMoED", KNOWN),
    "mith": Protocol(RULE, "MITH, VTPH", KNOWN),  # the same pairs; only the split differs
}


def collect(source: Path, protocol: str) -> Pairs:  # noqa: ARG001 - both protocols take the same pairs
    """Reads objects and captions.

    Args:
        source: Folder with the unpacked archives.
        protocol: Key of `PROTOCOLS`.

    Returns:
        The pairs.

    Raises:
        UserError: If an archive is missing or an annotation file is damaged.
    """
    images: list[str] = []
    captions: list[list[str]] = []
    labels: list[npt.NDArray[np.bool_]] = []
    classes: list[str] = []
    facts: dict[str, int] = {}
    dropped = 0
    for part in PARTS:
        prefix = find(source, part, f"{part}.zip").relative_to(source).as_posix()
        names, objects, of_part = read_objects(_annotations(source, f"instances_{part}.json"))
        texts = read_captions(_annotations(source, f"captions_{part}.json"))
        if classes and of_part != classes:
            raise UserError(f"{source}: instances_{PARTS[0]}.json and instances_{part}.json name different categories")
        classes = of_part
        numbers = sorted(objects)
        images += [f"{prefix}/{names[number]}" for number in numbers]
        captions += [texts.get(number, []) for number in numbers]
        labels += [objects[number] for number in numbers]
        facts[part] = len(numbers)
        dropped += len(names) - len(numbers)
    facts |= {"pictures without an object": dropped, "captions": sum(len(item) for item in captions)}
    return Pairs(images, captions, np.stack(labels), classes, facts)


def read_objects(path: Path) -> tuple[dict[int, str], dict[int, npt.NDArray[np.bool_]], list[str]]:
    """Reads an `instances_*.json`.

    Args:
        path: The file, of any size.

    Returns:
        File names by picture id; labels [C] by picture id, for pictures that have any; names of the C categories in the
        order in which the file lists them.

    Raises:
        UserError: If the file is damaged.
    """
    names: dict[int, str] = {}
    pictures, categories = array("q"), array("q")  # the categories come last, so objects wait as numbers
    known: dict[int, str] = {}

    def image(entry: dict[str, Any]) -> None:
        number = _value(entry, "id", int)
        if number in names:
            raise ValueError(f"picture {number} is listed twice")
        names[number] = _value(entry, "file_name", str)

    def annotation(entry: dict[str, Any]) -> None:
        pictures.append(_value(entry, "image_id", int))
        categories.append(_value(entry, "category_id", int))

    def category(entry: dict[str, Any]) -> None:
        number, name = _value(entry, "id", int), _value(entry, "name", str)
        if number in known or name in known.values():
            raise ValueError(f"category {number} {name!r} is listed twice")
        known[number] = name

    read_json(path, {"images": image, "annotations": annotation, "categories": category})
    columns = {number: column for column, number in enumerate(known)}
    objects: dict[int, npt.NDArray[np.bool_]] = {}
    for number, kind in zip(pictures, categories, strict=True):
        if number not in names or kind not in columns:
            raise UserError(
                f"{path}: an object names picture {number} or category {kind}, which the file does not list"
            )
        if number not in objects:
            objects[number] = np.zeros(len(columns), dtype=np.bool_)
        objects[number][columns[kind]] = True
    if not objects:
        raise UserError(f"{path}: has no object; unpack annotations_trainval2017.zip again")
    return names, objects, list(known.values())


def read_captions(path: Path) -> dict[int, list[str]]:
    """Reads a `captions_*.json`.

    Args:
        path: The file, of any size.

    Returns:
        Captions by picture id, in the order of the file.

    Raises:
        UserError: If the file is damaged.
    """
    captions: dict[int, list[str]] = {}

    def annotation(entry: dict[str, Any]) -> None:
        captions.setdefault(_value(entry, "image_id", int), []).append(_value(entry, "caption", str))

    read_json(path, {"annotations": annotation})
    return captions


def read_json(path: Path, wanted: Mapping[str, Callable[[dict[str, Any]], None]]) -> None:
    """Goes through a JSON object of long lists entry by entry: memory is bounded by the largest entry.

    Args:
        path: The file.
        wanted: Key of a list to what is called with each of its entries; the rest is read and dropped.

    Raises:
        UserError: If the file cannot be read, ends early, is no such JSON, or lacks a wanted list.
    """
    missing = set(wanted)
    try:
        with (
            reading(path) as content,  # nearly all characters of these files have one byte
            progress(total=path.stat().st_size, desc=path.name, unit="B", unit_scale=True) as bar,
        ):
            reader = _Reader(io.TextIOWrapper(content, encoding="utf-8", errors="replace"), bar)
            reader.skip("{")
            while reader.peek() != "}":
                key = reader.value()
                reader.skip(":")
                if reader.peek() == "[":
                    call = wanted.get(key, _drop)
                    reader.skip("[")
                    while reader.peek() != "]":
                        call(reader.value())
                        if reader.peek() != "]":
                            reader.skip(",")
                    reader.skip("]")
                    missing.discard(key)
                else:
                    reader.value()
                if reader.peek() != "}":
                    reader.skip(",")
            reader.skip("}")
            if reader.more():
                raise ValueError("something stands behind its end")
    except EOFError:
        raise UserError(f"{path}: ends in the middle; unpack annotations_trainval2017.zip again") from None
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path}: is damaged ({error}); unpack annotations_trainval2017.zip again") from error
    if missing:
        raise UserError(f"{path}: has no list {', '.join(sorted(missing))}; is it another file under this name?")


class _Reader:
    """A window that moves over JSON text."""

    def __init__(self, stream: TextIO, bar: "tqdm[Any]") -> None:
        self._stream, self._bar = stream, bar
        self._text, self._at, self._ended = "", 0, False
        self._decode = json.JSONDecoder().raw_decode

    def peek(self) -> str:
        """The next character that is not blank; it stays."""
        while True:
            while self._at < len(self._text):
                if (character := self._text[self._at]) not in " \t\r\n":
                    return character
                self._at += 1
            if self._ended:
                raise EOFError
            self._fill()

    def more(self) -> bool:
        """Whether anything but blanks is left."""
        try:
            self.peek()
        except EOFError:
            return False
        return True

    def skip(self, character: str) -> None:
        """Passes the character that must come next."""
        if self.peek() != character:
            raise JSONDecodeError(f"no {character!r} where one is due", self._text, self._at)
        self._at += 1

    def value(self) -> Any:
        """Passes and returns the value that comes next."""
        self.peek()
        while True:
            try:
                value, end = self._decode(self._text, self._at)
                if end < len(self._text) - 2 or self._ended:  # at the window's end a number could go on, as 1 of 1e+5
                    self._at = end
                    return value
            except JSONDecodeError:
                if len(self._text) - self._at > LARGEST:
                    raise
            if self._ended:
                raise EOFError
            self._fill()

    def _fill(self) -> None:
        chunk = self._stream.read(BUFFER)
        self._bar.update(len(chunk))
        self._text, self._at, self._ended = self._text[self._at :] + chunk, 0, not chunk


def _value(entry: dict[str, Any], key: str, kind: type) -> Any:
    """A value of an entry, which must be of a kind: a picture None or a caption True is none."""
    value = entry[key]
    if type(value) is not kind:
        raise TypeError(f"{key} is {value!r}")
    return value


def _drop(entry: object) -> None:
    """Takes the entries of lists that are not wanted."""


def _annotations(source: Path, name: str) -> Path:
    return find(source, f"annotations/{name}", "annotations_trainval2017.zip")


if __name__ == "__main__":
    sys.exit(run("coco", "MS COCO 2017", PROTOCOLS, collect))
