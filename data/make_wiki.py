"""Prepares the Wikipedia set: sections of featured articles, a picture each, and one of 10 labels.

Official archive: `wikipedia_dataset.zip` (folder `wikipedia_dataset` with `images/<category>/<id>.jpg`,
`texts/<id>.xml`, `trainset_txt_img_cat.list`, `testset_txt_img_cat.list`).

    python data/make_wiki.py --source /downloads/wiki
"""

import html
import re
import sys
from pathlib import Path

if not __package__:  # run as a script: the packages of the repository stand one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from utils.signals import die_of_interrupts

    die_of_interrupts()

import numpy as np

from common.errors import UserError
from data.preparation import Pairs, Protocol, run
from data.source_files import find, parallel, read_bytes, read_list

ARCHIVE = "wikipedia_dataset.zip"
CLASSES = "art biology geography history literature media music royalty sport warfare".split()
PARTS = ("trainset", "testset")

PROTOCOLS = {
    "cfrh": Protocol(
        rule="the published lists, first trainset (train and database), then testset (query); text: the section",
        papers="CFRH, JDSH and DJSRH",
        known={"pairs": 2_866, "labels": 10, "trainset": 2_173, "testset": 693},
    ),
}


def collect(source: Path, protocol: str) -> Pairs:  # noqa: ARG001 - there is one protocol
    """Reads lists and texts.

    Args:
        source: Folder with the unpacked archive.
        protocol: Key of `PROTOCOLS`.

    Returns:
        The pairs.

    Raises:
        UserError: If the archive is missing or a file of it is damaged.
    """
    text_folder = find(source, "texts", ARCHIVE)
    image_folder = find(source, "images/art", ARCHIVE).parent.relative_to(source).as_posix()
    texts: list[Path] = []
    images: list[str] = []
    categories: list[int] = []
    facts: dict[str, int] = {}
    for part in PARTS:
        path = find(source, f"{part}_txt_img_cat.list", ARCHIVE)
        lines = read_list(path)
        facts[part] = len(lines)
        for row, line in enumerate(lines, 1):
            fields = line.split()
            if len(fields) != 3 or fields[2] not in map(str, range(1, len(CLASSES) + 1)):
                raise UserError(
                    f"{path}: line {row} is not text, picture, category (1 to {len(CLASSES)}); unpack {ARCHIVE} again"
                )
            category = int(fields[2]) - 1
            texts.append(text_folder / f"{fields[0]}.xml")
            images.append(f"{image_folder}/{CLASSES[category]}/{fields[1]}.jpg")
            categories.append(category)
    return Pairs(
        images=images,
        captions=[[text] for _, text in parallel(read_section, texts, "texts", "file")],
        labels=np.eye(len(CLASSES), dtype=np.bool_)[np.array(categories, dtype=np.int64)],
        classes=CLASSES,
        facts=facts,
    )


def read_section(path: Path) -> str:
    """The text of a section.

    Args:
        path: Its XML file. Some of the published ones are not well formed, so what stands between the tags is taken.

    Raises:
        UserError: If the file is missing or ends early.
    """
    content = read_bytes(path).decode("utf-8", "replace")
    found = re.search(r"<text[^>]*>(.*?)</text>", content, re.DOTALL)
    if found is None:
        raise UserError(f"{path}: has no whole <text>; unpack {ARCHIVE} again")
    return html.unescape(found[1])


if __name__ == "__main__":
    sys.exit(run("wiki", "Wikipedia", PROTOCOLS, collect))
