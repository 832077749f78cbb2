"""Prepares MIRFlickr-25K: pictures with Flickr tags as text and 24 labels.

Official archives: `mirflickr25k.zip` (folder `mirflickr` with `im<id>.jpg` and `meta/tags/tags<id>.txt`) and
`mirflickr25k_annotations_v080.zip` (one file a label with the numbers of its pictures).

    python data/make_mirflickr25k.py --source /downloads/mirflickr25k
"""

import re
import sys
from collections import Counter
from pathlib import Path

if not __package__:  # run as a script: the packages of the repository stand one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from utils.signals import die_of_interrupts

    die_of_interrupts()

import numpy as np

from common.errors import UserError
from data.preparation import Pairs, Protocol, run
from data.source_files import find, parallel, read_lines, read_list

ANNOTATIONS = "mirflickr25k_annotations_v080.zip"
PICTURES = 25_000
FREQUENT = 20  # pictures that a tag must have in protocol mith

# The potential annotations; the stricter ones beside them, `<label>_r1.txt`, are not used by these papers.
CLASSES = (
    "animals baby bird car clouds dog female flower food indoor lake male "
    "night people plant_life portrait river sea sky structures sunset transport tree water"
).split()

PROTOCOLS = {
    "dcmht": Protocol(
        rule="pictures with a label, by number as a text (1, 10, 100, ...); text: all tags",
        papers="DCMHT, DSPH, DNPH, TwDH, DIMCH, UMoED",
        known={"pairs": 24_581, "labels": 24},
    ),
    "mith": Protocol(
        rule="pictures with a label and a tag that 20 pictures have, by number; text: those tags",
        papers="MITH, VTPH, CFRH, and the DCMH line before them",
        known={"pairs": 20_015, "labels": 24, "tags that 20 pictures have": 1_386},
    ),
}


def collect(source: Path, protocol: str) -> Pairs:
    """Reads labels and tags.

    Args:
        source: Folder with the unpacked archives.
        protocol: Key of `PROTOCOLS`.

    Returns:
        The protocol's pairs.

    Raises:
        UserError: If an archive is missing or an annotation file is damaged.
    """
    folder = find(source, "mirflickr/meta/tags", "mirflickr25k.zip")
    annotations = find(source, "plant_life.txt", ANNOTATIONS).parent
    labels = np.zeros((PICTURES + 1, len(CLASSES)), dtype=np.bool_)  # row 0 stays empty: numbers start from 1
    for column, name in enumerate(CLASSES):
        labels[_numbers(annotations / f"{name}.txt"), column] = True

    pictures = folder.parent.parent
    files = numbered(folder, "tags", ".txt")
    tags = dict(zip(files, (lines for _, lines in parallel(_tags, list(files.values()), "tags", "file")), strict=True))
    numbers = [int(number) for number in np.flatnonzero(labels.any(axis=1))]
    there = numbered(pictures, "im", ".jpg")
    facts = {
        "pictures without a tag file": sum(number not in files for number in numbers),
        "tags without a picture": sum(bool(item) and number not in there for number, item in tags.items()),
    }
    if protocol == "mith":
        uses = Counter(tag for item in tags.values() for tag in set(item))
        frequent = {tag for tag, count in uses.items() if count >= FREQUENT}
        tags = {number: [tag for tag in item if tag in frequent] for number, item in tags.items()}
        numbers = [number for number in numbers if tags.get(number)]
        facts["tags that 20 pictures have"] = len(frequent)
    else:
        numbers.sort(key=str)
    prefix = pictures.relative_to(source).as_posix()
    return Pairs(
        images=[f"{prefix}/im{number}.jpg" for number in numbers],
        captions=[[" ".join(tags.get(number, []))] for number in numbers],
        labels=labels[numbers],
        classes=CLASSES,
        facts=facts,
        padded=True,
    )


def numbered(folder: Path, prefix: str, suffix: str) -> dict[int, Path]:
    """Files of a folder that are named by a number.

    Args:
        folder: The folder; those below it are not looked at.
        prefix: What stands before the number.
        suffix: What stands after it.

    Returns:
        File by number, in ascending order.
    """
    pattern = re.compile(re.escape(prefix) + "([1-9][0-9]*)" + re.escape(suffix))  # of 1 and 01, not both
    found = {int(match[1]): path for path in folder.iterdir() if (match := pattern.fullmatch(path.name))}
    return dict(sorted(found.items()))


def _numbers(path: Path) -> list[int]:
    """Picture numbers of a label."""
    if not path.exists():
        raise UserError(f"{path}: is not there; unpack {ANNOTATIONS} again")
    lines = read_list(path)
    for row, line in enumerate(lines, 1):
        if not (re.fullmatch("[0-9]{1,9}", line) and 1 <= int(line) <= PICTURES):
            raise UserError(f"{path}: line {row} is no picture number from 1 to {PICTURES}; unpack the archive again")
    return [int(line) for line in lines]


def _tags(path: Path) -> list[str]:
    """Tags of a picture."""
    return [tag for line in read_lines(path) for tag in line.split()]


if __name__ == "__main__":
    sys.exit(run("mirflickr25k", "MIRFlickr-25K", PROTOCOLS, collect))
