"""Prepares NUS-WIDE: pictures with Flickr tags as text and the 21 or 10 most frequent of its 81 labels.

Official archives: `Groundtruth.zip` (`AllLabels/Labels_<label>.txt`), `NUS_WID_Tags.zip` (`All_Tags.txt`,
`AllTags1k.txt`, `TagList1k.txt`), `ImageList.zip` (`Imagelist.txt`), and the pictures (`Flickr/<folder>/<name>.jpg`).
Line n of all lists belongs to the same picture.

    python data/make_nuswide.py --source /downloads/nuswide
"""

import sys
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath

if not __package__:  # run as a script: the packages of the repository stand one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from utils.signals import die_of_interrupts

    die_of_interrupts()

import numpy as np
import numpy.typing as npt

from common.errors import UserError
from data.preparation import Pairs, Protocol, run
from data.source_files import find, parallel, read_bytes, read_lines, read_list, reading
from utils.progress import progress

LABELS, TAGS = "Groundtruth.zip", "NUS_WID_Tags.zip"
ROWS_AT_A_TIME = 1 << 23  # bytes of AllTags1k.txt held at once; the whole file has 540 MB

TC21 = (
    "animal beach buildings clouds flowers grass lake mountain ocean person plants "
    "reflection road rocks sky snow sunset tree vehicle water window"
).split()
TC10 = "animal buildings clouds grass lake person plants sky water window".split()

NO_TAGS = "123456"  # DCMHT's text for a picture without tags

PROTOCOLS = {
    "dcmht": Protocol(
        rule="pictures with one of the 21 labels; text: all tags, 123456 where there are none",
        papers="DCMHT, DSPH, DNPH, TwDH, DIMCH, UMoED",
        known={"pairs": 195_834, "labels": 21, "pictures listed": 269_648},
    ),
    "mith": Protocol(
        rule="pictures with one of the 21 labels and one of the 1,000 frequent tags; text: those tags",
        papers="MITH, VTPH",
        known={"pairs": 190_421, "labels": 21, "pictures listed": 269_648, "frequent tags": 1_000},
    ),
    "tc10": Protocol(
        rule="pictures with one of the 10 labels; text: their tags among the 1,000 frequent ones",
        papers="CFRH, JDSH and DJSRH",
        known={"pairs": 186_577, "labels": 10, "pictures listed": 269_648, "frequent tags": 1_000},
    ),
}


def collect(source: Path, protocol: str) -> Pairs:
    """Reads picture list, labels and tags.

    Args:
        source: Folder with the unpacked archives.
        protocol: Key of `PROTOCOLS`.

    Returns:
        The protocol's pairs, in the order of the picture list.

    Raises:
        UserError: If an archive is missing or an annotation file is damaged.
    """
    list_file = find(source, "Imagelist.txt", "ImageList.zip")
    label_folder = find(source, "AllLabels", LABELS)
    prefix = find(source, "Flickr", "the pictures (folder Flickr)").relative_to(source).as_posix()
    images = [PureWindowsPath(line).as_posix() for line in read_list(list_file)]

    classes = TC10 if protocol == "tc10" else TC21
    files = [label_folder / f"Labels_{name}.txt" for name in classes]
    columns = [column for _, column in parallel(lambda path: _label(path, len(images)), files, "labels", "file")]
    labels = np.stack(columns, axis=1)
    kept = labels.any(axis=1)
    facts = {"pictures listed": len(images)}

    if protocol == "dcmht":
        texts = _all_tags(find(source, "All_Tags.txt", TAGS), images)
        facts["pictures without tags"] = sum(texts[row] == NO_TAGS for row in np.flatnonzero(kept))
    else:
        names = read_list(find(source, "TagList1k.txt", TAGS))
        texts = _frequent_tags(find(source, "AllTags1k.txt", TAGS), names, len(images))
        facts["frequent tags"] = len(names)
        if protocol == "mith":
            kept &= np.array([bool(text) for text in texts])
    rows = np.flatnonzero(kept)
    return Pairs(
        images=[f"{prefix}/{images[row]}" for row in rows],
        captions=[[texts[row]] for row in rows],
        labels=labels[rows],
        classes=classes,
        facts=facts,
    )


def _require_lines(path: Path, found: int, listed: int, archive: str) -> None:
    if found != listed:
        raise UserError(f"{path}: has {found:,} lines, Imagelist.txt {listed:,}; unpack {archive} again")


def _label(path: Path, count: int) -> npt.NDArray[np.bool_]:
    """One label of all pictures, [count]."""
    if not path.exists():
        raise UserError(f"{path}: is not there; unpack {LABELS} again")
    values = read_bytes(path).split()
    _require_lines(path, len(values), count, LABELS)
    if wrong := set(values) - {b"0", b"1"}:
        row = values.index(min(wrong)) + 1
        raise UserError(f"{path}: line {row} is neither 0 nor 1; unpack {LABELS} again")
    return np.array(values) == b"1"


def _all_tags(path: Path, images: list[str]) -> list[str]:
    """All tags of every picture, with blanks between."""
    lines = [line.split(maxsplit=1) for line in read_lines(path) if line]
    _require_lines(path, len(lines), len(images), TAGS)
    for row, (line, image) in enumerate(zip(lines, images, strict=True), 1):
        if line[0] != Path(image).stem.rpartition("_")[2]:
            raise UserError(
                f"{path}: line {row} is of picture {line[0]}, but Imagelist.txt has {image} there; unpack both again"
            )
    return [line[1] if len(line) > 1 else NO_TAGS for line in lines]


def _frequent_tags(path: Path, names: list[str], count: int) -> list[str]:
    """The frequent tags of every picture, joined by blanks, in the order of the tag list."""
    texts: list[str] = []
    for matrix in _indicators(path, len(names)):
        rows, columns = np.nonzero(matrix)
        starts = np.searchsorted(rows, np.arange(len(matrix) + 1))
        texts += [
            " ".join(names[column] for column in columns[a:b]) for a, b in zip(starts[:-1], starts[1:], strict=True)
        ]
    _require_lines(path, len(texts), count, TAGS)
    return texts


def _indicators(path: Path, width: int) -> Iterator[npt.NDArray[np.bool_]]:
    """Rows of a text matrix of 0 and 1, [n, width] at a time."""
    rest, before = b"", 0
    with (
        reading(path) as stream,
        progress(total=path.stat().st_size, desc=path.name, unit="B", unit_scale=True) as bar,
    ):
        while chunk := stream.read(ROWS_AT_A_TIME):
            bar.update(len(chunk))
            whole, _, rest = (rest + chunk).rpartition(b"\n")
            if whole:
                yield _matrix(path, whole, width, before)
                before += whole.count(b"\n") + 1
    if rest.strip():
        yield _matrix(path, rest, width, before)


def _matrix(path: Path, text: bytes, width: int, before: int) -> npt.NDArray[np.bool_]:
    values = np.frombuffer(text.translate(None, b" \t\r") + b"\n", dtype=np.uint8)
    ends = np.flatnonzero(values == ord("\n"))
    wrong = np.flatnonzero(np.diff(ends, prepend=-1) != width + 1)
    if wrong.size:
        raise UserError(
            f"{path}: line {before + int(wrong[0]) + 1} has not {width:,} values, as TagList1k.txt has tags; "
            f"unpack {TAGS} again"
        )
    matrix = values.reshape(-1, width + 1)[:, :-1] - ord("0")
    if matrix.max(initial=0) > 1:
        row = before + int(np.flatnonzero((matrix > 1).any(axis=1))[0]) + 1
        raise UserError(f"{path}: line {row} has values other than 0 and 1; unpack {TAGS} again")
    return matrix.astype(np.bool_)


if __name__ == "__main__":
    sys.exit(run("nuswide", "NUS-WIDE", PROTOCOLS, collect))
