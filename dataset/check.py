"""`main.py --check-data`: reads a prepared data set to the last picture, and shows what is in it.

What is told in numbers goes to the terminal; a contact sheet shows some pairs as they are, so that a wrong order of
captions or labels is seen at a glance.
"""

import logging
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont, ImageOps

from common.config import dataset_file, load_dataset
from common.errors import UserError
from dataset.base import PairedDataset, dataset_class
from dataset.columns import CaptionColumn
from dataset.mat import MatConfig
from dataset.splits import SPLITS
from dataset.texts.captions import Captions
from dataset.texts.files import read_lines
from utils.files import atomic, make_folder
from utils.output import say, table
from utils.progress import progress
from utils.threads import in_threads

log = logging.getLogger(__name__)

SHEET = "contact_sheet.png"
SHOWN = 10  # faulty pictures named
_BAR = 40  # longest bar of the histogram
_COLUMNS, _ROWS = 6, 4  # of the contact sheet
_TILE = 200  # pixels of a picture's side there
_LINES, _LINE = 9, 15  # lines of text below a picture, and the height of one in pixels


@dataclass(frozen=True)
class Found:
    """What reading one picture told.

    Attributes:
        width: Pixels; 0 if it cannot be read.
        height: Pixels; 0 if it cannot be read.
        fault: Why it cannot be read; empty if it can.
    """

    width: int
    height: int
    fault: str


def check_data(name: str, overrides: list[str], folder: Path | None) -> None:
    """Checks a data set and says what it holds.

    Args:
        name: Name of a file in configs/datasets, or the path of any YAML file with a `dataset:` section.
        overrides: Entries `dataset.key=value`.
        folder: Where the contact sheet goes; None for result/check/<name of the data set>.

    Raises:
        UserError: If a file is missing, broken or does not fit the others, or pictures are missing or broken. What can
            be told in spite of broken pictures has been told by then.
    """
    config = load_dataset(dataset_file(name, "--check-data "), overrides)
    folder = Path("result") / "check" / config.name if folder is None else folder
    make_folder(folder, "--save-dir")
    cls = dataset_class(config.type)
    cls.ensure(config)
    data = cls(config)
    found = read_pictures(data)
    classes = class_names(data)
    say(summary(data, found, classes))
    broken = [number for number, picture in enumerate(found) if picture.fault]
    whole = np.array([not found[item].fault for item in range(len(data))])
    contact_sheet(data, np.flatnonzero(whole), classes, folder / SHEET)
    say(f"\ncontact sheet: {folder / SHEET}")
    if broken:
        for number in broken[:SHOWN]:
            log.info("%s", found[number].fault)
        raise UserError(
            f"{len(broken)} of {len(found)} pictures of {config.name} are missing or broken, the first: "
            f"{found[broken[0]].fault}"
        )


def read_pictures(data: PairedDataset) -> list[Found]:
    """Decodes every picture, those beside the items included, in parallel."""

    def read(number: int) -> Found:
        try:
            return Found(*data.pictures.read(number).size, "")
        except UserError as error:
            return Found(0, 0, str(error))

    results = in_threads(read, range(len(data.pictures)))
    return list(progress(results, total=len(data.pictures), desc="pictures", unit="picture"))


def class_names(data: PairedDataset) -> list[str]:
    """Names of the labels: from labels.txt beside the label file where it is there, else their numbers.

    Raises:
        UserError: If the file names another number of labels.
    """
    count = data.labels.shape[1]
    if data.label_names is not None:
        return list(data.label_names)
    if isinstance(data.config, MatConfig):
        path = Path(data.config.root) / "labels.txt"
        if path.is_file():
            names = read_lines(path)
            if len(names) != count:
                raise UserError(f"{path} names {len(names)} labels, but the label file has {count}; make them together")
            return names
    return [str(label) for label in range(count)]


def summary(data: PairedDataset, found: Sequence[Found], classes: Sequence[str]) -> str:
    """All numbers, as text: a table, and the items of every label.

    Args:
        data: The data set.
        found: What reading its pictures told.
        classes: Names of the labels.
    """
    labels, splits = data.labels, data.splits
    items, per_item = labels.sum(dim=0).numpy(), labels.sum(dim=1).numpy()
    rows = [["", data.config.name], ["pairs", f"{len(data):,}"]]
    rows += [[f"pairs: {split}", f"{len(splits.items(split)):,}"] for split in SPLITS if len(splits.items(split))]
    rows += [
        ["split fingerprint", splits.fingerprint],
        ["labels", f"{labels.shape[1]:,}"],
        ["labels a pair", _spread(per_item)],
        ["pairs without label", f"{int((per_item == 0).sum()):,}"],
        ["labels without pair", f"{int((items == 0).sum()):,}"],
    ]
    captions = _captions(data)
    if captions is not None:
        counts = np.array([sum(map(bool, texts)) for texts in captions.texts])
        tokens = (captions.tokens != 0).sum(dim=1).numpy()
        full = f"{int((tokens == captions.length).sum()):,} of {captions.length} or more"
        rows += [
            ["captions a pair", _spread(counts)],
            ["pairs without caption", f"{int((counts == 0).sum()):,}"],
            ["tokens a caption", f"{_spread(tokens)}; {full}"],
        ]
    whole = [picture for picture in found if not picture.fault]
    rows += [
        ["pictures", f"{len(found):,}"],
        ["pictures missing or broken", f"{len(found) - len(whole):,}"],
        ["picture widths", _spread(np.array([picture.width for picture in whole]))],
        ["picture heights", _spread(np.array([picture.height for picture in whole]))],
        ["fields", ", ".join(data.offers("train"))],
    ]
    histogram = [["label", "pairs", "share", ""]]
    for name, count in zip(classes, items.tolist(), strict=True):
        bar = "#" * round(_BAR * count / max(items.max(), 1))
        histogram.append([name, f"{count:,}", f"{count / len(data):.1%}", bar])
    return f"{table(rows)}\n\n{table(histogram)}"


def contact_sheet(data: PairedDataset, items: npt.NDArray[np.int64], classes: Sequence[str], path: Path) -> None:
    """Draws some pairs, the same ones every time: picture, split, captions, labels.

    Args:
        data: The data set.
        items: Items that may be shown, [n].
        classes: Names of the labels.
        path: PNG file to write.

    Raises:
        UserError: If the file cannot be written.
    """
    chosen = np.sort(np.random.RandomState(0).permutation(items)[: _COLUMNS * _ROWS])
    split_of = {item: split for split in ("query", "train", "validation") for item in data.splits.items(split).tolist()}
    captions = _captions(data)
    height = _TILE + _LINES * _LINE + 12
    rows = max(-(-len(chosen) // _COLUMNS), 1)
    sheet = Image.new("RGB", (_COLUMNS * (_TILE + 12) + 12, rows * height + 12), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), 11)
    for place, item in enumerate(chosen.tolist()):
        left, top = 12 + place % _COLUMNS * (_TILE + 12), 12 + place // _COLUMNS * height
        picture = ImageOps.contain(data.pictures.read(item), (_TILE, _TILE))
        sheet.paste(picture, (left + (_TILE - picture.width) // 2, top + (_TILE - picture.height) // 2))
        names = [classes[label] for label in data.labels[item].nonzero()[:, 0].tolist()]
        texts = [] if captions is None else captions.texts[item]
        lines = [(f"{item}, {split_of.get(item, 'database')}", "#777777")]
        lines += [(line, "#0072B2") for line in _wrapped(", ".join(names) or "no label")]
        lines += [(line, "black") for text in texts for line in _wrapped(f"\u201c{text}\u201d")]
        for number, (line, colour) in enumerate(lines[:_LINES]):
            draw.text((left, top + _TILE + 2 + number * _LINE), line, fill=colour, font=font)
    with atomic(path) as temporary:
        sheet.save(temporary, "PNG")


def _wrapped(text: str) -> list[str]:
    """A text cut into lines as wide as a tile, three at most."""
    return textwrap.wrap(text, 33, max_lines=3, placeholder=" \u2026")


def _captions(data: PairedDataset) -> Captions | None:
    column = data.columns["train"].get("text")
    return column.captions if isinstance(column, CaptionColumn) else None


def _spread(numbers: npt.NDArray[np.int64]) -> str:
    """Least, mean and largest of some numbers."""
    if not len(numbers):
        return "none"
    return f"{numbers.min():,} to {numbers.max():,}, mean {numbers.mean():,.2f}"
