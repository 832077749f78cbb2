"""Prepares IAPR TC-12: still photographs with a description in sentences each, and 255 or 291 labels.

Official archive: `iaprtc12.tgz` (`images/<folder>/<number>.jpg`, `annotations_complete_eng/<folder>/<number>.eng`). It
has no labels. Those come from one of

* files in DCMH layout that papers pass on: a list of pictures (`imgList.mat`, `index.mat`) and the labels of the same
  rows (`labelList.mat`, `label.mat`);
* LEAR's annotations, `iaprtc12.20091111.tar.bz2`: 291 words, made from the descriptions, for the pictures of two lists.

    python data/make_iaprtc12.py --source /downloads/iaprtc12 --protocol lear
"""

import html
import re
import sys
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath

if not __package__:  # run as a script: the packages of the repository stand one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from utils.signals import die_of_interrupts

    die_of_interrupts()

import numpy as np
import numpy.typing as npt

from common.errors import UserError
from data.mat_files import made_here
from data.preparation import Pairs, Protocol, run
from data.source_files import find, parallel, read_bytes, read_list
from dataset.labels import read_labels
from dataset.mat import INDEX_KEYS, LABEL_KEYS
from dataset.mat_reader import read_variable, text_rows

ARCHIVE = "iaprtc12.tgz"
LEAR_ARCHIVE = "iaprtc12.20091111.tar.bz2"
INDEX_FILES, LABEL_FILES = ("imgList.mat", "index.mat"), ("labelList.mat", "label.mat")
PARTS = ("train", "test")
DESCRIPTION = re.compile(r"<DESCRIPTION>(.*?)</DESCRIPTION>", re.DOTALL | re.IGNORECASE)

PROTOCOLS = {
    "dcmh": Protocol(
        rule="pictures and labels of distributed .mat files, in their order; text: the description",
        papers="DCMH and those after it, UCCH",
        known={"pairs": 20_000, "labels": 255},
    ),
    "dsph": Protocol(
        rule="as dcmh, from files with 291 labels",
        papers="DSPH",
        known={"pairs": 20_000, "labels": 291},
    ),
    "lear": Protocol(
        rule="pictures of LEAR's training list, then of its test list, with its 291 words; text: the description",
        papers="the literature on automatic annotation",
        known={"pairs": 19_627, "labels": 291, "train list": 17_665, "test list": 1_962},
    ),
}


def collect(source: Path, protocol: str) -> Pairs:
    """Reads descriptions, and pictures and labels as the protocol says.

    Args:
        source: Folder with the unpacked archive and the label files.
        protocol: Key of `PROTOCOLS`.

    Returns:
        The pairs, in the order of the label files.

    Raises:
        UserError: If an archive or a file is missing or damaged, or the number of labels is not the protocol's.
    """
    texts = find(source, "annotations_complete_eng", ARCHIVE)
    folder = find(source, "images/00", ARCHIVE).parent
    pictures = _pictures(folder)
    facts: dict[str, int] = {"pictures in the archive": len(pictures)}
    if protocol == "lear":
        names, labels, classes, lengths = _lear(source)
        facts.update({f"{part} list": length for part, length in lengths.items()})
    else:
        names, labels = _distributed(source)
        wanted = PROTOCOLS[protocol].known["labels"]
        if labels.shape[1] != wanted:
            other = "; that is --protocol lear's" if labels.shape[1] == 291 else ""
            raise UserError(
                f"{source}: the label file has {labels.shape[1]} labels, protocol {protocol} {wanted}{other}; choose "
                "the protocol of your files"
            )
        classes = [f"label {number}" for number in range(1, wanted + 1)]  # the files have no names
    places = [_place(name, pictures) for name in names]
    descriptions = dict(parallel(_description, [texts / f"{place}.eng" for place in places], "descriptions", "file"))
    captions = [descriptions[texts / f"{place}.eng"] for place in places]
    facts["without annotation file"] = sum(caption is None for caption in captions)
    base = folder.relative_to(source).as_posix()
    return Pairs(
        images=[f"{base}/{place}.jpg" for place in places],
        captions=[[caption or ""] for caption in captions],
        labels=labels,
        classes=classes,
        facts=facts,
    )


def _pictures(folder: Path) -> dict[str, list[str]]:
    """`<folder>/<number>` of every picture, by number."""
    found: dict[str, list[str]] = {}
    for path in sorted(folder.glob("*/*.jpg")):
        found.setdefault(path.stem, []).append(f"{path.parent.name}/{path.stem}")
    return found


def _place(name: str, pictures: Mapping[str, list[str]]) -> str:
    """`<folder>/<number>` of a picture that a list names with or without its folder, suffix, or a prefix."""
    path = PurePosixPath(PureWindowsPath(name.strip()).as_posix())
    number = path.name.removesuffix(".jpg")
    if re.fullmatch(r"[0-9]{2}", path.parent.name):
        return f"{path.parent.name}/{number}"
    candidates = pictures.get(number, [f"??/{number}"])  # one that is not there is named by the check of the pictures
    if len(candidates) > 1:
        raise UserError(f"picture {name!r} of the list may be {' or '.join(candidates)}; give the folder, too")
    return candidates[0]


def _description(path: Path) -> str | None:
    """The description of a picture; None without an annotation file."""
    if not path.exists():
        return None
    content = read_bytes(path).decode("iso-8859-1")  # as the archive is encoded
    found = DESCRIPTION.search(content)
    if found is None:
        raise UserError(f"{path}: has no whole <DESCRIPTION>; unpack {ARCHIVE} again")
    return " ".join(html.unescape(found[1]).split()).rstrip("; ")


def _distributed(source: Path) -> tuple[list[str], npt.NDArray[np.bool_]]:
    """Names of pictures and labels [N, C] of distributed files."""
    index, label = (_first(source, files) for files in (INDEX_FILES, LABEL_FILES))
    variable = read_variable(index, INDEX_KEYS, text=True)
    rows = text_rows(variable.value, None)
    if rows is None or any(len(row) != 1 or not row[0] for row in rows):
        raise UserError(f"{variable.place} is no list of picture names; fetch the file that belongs to {label.name}")
    variable = read_variable(label, LABEL_KEYS)
    labels = read_labels(variable.value, len(rows), variable.place).numpy()
    if len(labels) != len(rows):
        raise UserError(
            f"{variable.place} has labels of {len(labels):,} items, {index} {len(rows):,} pictures; fetch files that "
            "belong together"
        )
    return [row[0] for row in rows], labels


def _first(source: Path, names: tuple[str, ...]) -> Path:
    """The first of some files that is there, and was not written by a preparation into the same folder."""

    def passed_on(path: Path) -> bool:
        return path.exists() and not made_here(path)

    for name in names[:-1]:
        try:
            return find(source, name, "", passed_on)
        except UserError:
            continue
    archive = f"the label files that papers pass on ({' or '.join(names)}), or use --protocol lear"
    return find(source, names[-1], archive, passed_on)


def _lear(source: Path) -> tuple[list[str], npt.NDArray[np.bool_], list[str], dict[str, int]]:
    """Names of pictures, labels [N, C], words, and the lengths of both lists."""
    words = read_list(find(source, "iaprtc12_dictionary.txt", LEAR_ARCHIVE))
    names: list[str] = []
    labels: list[npt.NDArray[np.bool_]] = []
    lengths: dict[str, int] = {}
    for part in PARTS:
        listed = read_list(find(source, f"iaprtc12_{part}_list.txt", LEAR_ARCHIVE))
        path = find(source, f"iaprtc12_{part}_annot.hvecs", LEAR_ARCHIVE)
        content = read_bytes(path)
        need = 2 * len(listed) * (len(words) + 1)  # every row: its length, then its values, 16 bits each
        if len(content) != need:
            raise UserError(
                f"{path}: has {len(content):,} bytes, not {need:,} for {len(words)} words and the {len(listed):,} "
                f"pictures listed; unpack {LEAR_ARCHIVE} again"
            )
        table = np.frombuffer(content, dtype="<i2").reshape(len(listed), len(words) + 1)
        if (table[:, 0] != len(words)).any() or not np.isin(table[:, 1:], (0, 1)).all():
            raise UserError(f"{path}: is no matrix of 0 and 1 with {len(words)} columns; unpack {LEAR_ARCHIVE} again")
        names += listed
        labels.append(table[:, 1:] == 1)
        lengths[part] = len(listed)
    return names, np.concatenate(labels), words, lengths


if __name__ == "__main__":
    sys.exit(run("iaprtc12", "IAPR TC-12", PROTOCOLS, collect))
