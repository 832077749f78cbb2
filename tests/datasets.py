"""Small data sets in .mat files, for the tests of reading and loading."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
from PIL import Image
from torch import Tensor

from common.errors import UserError
from dataset.mat import MatConfig, MatDataset
from dataset.splits import SplitConfig

ITEMS = 24
SETTINGS: dict[str, Any] = {
    "name": "small",
    "type": "mat",
    "image_root": None,
    "index": ["index.mat"],
    "captions": ["caption.mat", "caption.txt"],
    "labels": ["label.mat"],
    "image_captions": ["image_caption.mat", "image_caption.txt", "image_caption.jsonl"],
    "split": {"protocol": "permutation", "seed": 3, "query": 6, "train": 10, "validation": 0, "per_label": None},
    "image_size": 16,
    "augment": False,
    "stored_size": 24,
    "cache": None,
    "text_length": 12,
    "tokens": 49408,
    "vocabulary": 5,
    "image_features": ["image_feature.npy", "image_feature.mat", "image_feature.h5"],
    "text_features": ["text_feature.npy", "text_feature.mat", "text_feature.h5"],
    "query_counterpart": "text_only",
    "database_counterpart": "paired",
    "counterpart_images": None,
    "counterpart_captions": None,
}


def smooth_picture(number: int, width: int, height: int) -> Image.Image:
    """A picture without sharp edges, like a photograph scaled down; every number another one."""
    draw = np.random.default_rng(number)
    coarse = Image.fromarray(draw.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def captions_of(number: int) -> list[str]:
    """One to three captions."""
    return [f"picture number {number} shows a cat", "a dog and a cat", f"{number} birds"][: 1 + number % 3]


TEXTS = [captions_of(number) for number in range(ITEMS)]


def cells(rows: Sequence[Any]) -> Any:
    """A cell array, as SciPy writes it."""
    array = np.empty(len(rows), dtype=object)
    for number, row in enumerate(rows):
        array[number] = row
    return array


def labels_of(items: int = ITEMS) -> Any:
    """Multi-hot labels [items, 4] int8; every row has one or more."""
    rows, columns = np.ogrid[:items, :4]
    return (((rows + columns) % 3 == 0) | (rows % 4 == columns)).astype(np.int8)


def write(root: Path, items: int = ITEMS, width: int = 24, height: int = 24) -> Path:
    """Writes pictures, index, captions and labels."""
    (root / "images").mkdir(parents=True)
    names = [f"images/{number}.png" for number in range(items)]
    for number, name in enumerate(names):
        smooth_picture(number, width, height).save(root / name)
    scipy.io.savemat(root / "index.mat", {"index": names})
    scipy.io.savemat(root / "caption.mat", {"caption": cells([captions_of(number) for number in range(items)])})
    scipy.io.savemat(root / "label.mat", {"category": labels_of(items)})
    return root


def permutation(seed: int, query: int, train: int, validation: int = 0) -> SplitConfig:
    """The split that most papers use."""
    return SplitConfig(
        protocol="permutation", seed=seed, query=query, train=train, validation=validation, per_label=None
    )


def config(root: Path, **values: Any) -> MatConfig:
    """The settings of the small data set, some replaced."""
    return MatConfig.model_validate({**SETTINGS, "root": str(root), **values})


def opened(root: Path, **values: Any) -> MatDataset:
    """The small data set, open."""
    return MatDataset(config(root, **values))


def refused(match: str, root: Path, **values: Any) -> None:
    """Opens the data set and checks that the mistake is reported in one line."""
    with pytest.raises(UserError, match=match) as error:
        opened(root, **values)
    assert "\n" not in str(error.value)


def captions_read(data: MatDataset) -> Tensor:
    """All captions of all items, as token rows [captions, L] int64."""
    return data.columns["train"]["text"].captions.tokens.long()


def pixels_of(data: MatDataset, number: int) -> Any:
    """The picture of an item, [H, W, 3] uint8."""
    return np.array(data.pictures.read(number))
