"""`openmoji`: the embedded data set. Makes itself where it is not there."""

import logging
import os
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from common.registry import DATASETS
from data.make_openmoji import make
from dataset.base import PairedConfig
from dataset.mat import MatConfig, MatDataset

log = logging.getLogger(__name__)


class OpenmojiConfig(MatConfig):
    """`dataset:` section of `openmoji`."""

    picture_size: int = Field(ge=16)  # side of the drawings in pixels, when they are made


@DATASETS.register("openmoji")
class OpenmojiDataset(MatDataset):
    """Colour drawings of emoji with their names and keywords; the files are made from installed packages."""

    Config: ClassVar[type[PairedConfig]] = OpenmojiConfig

    @classmethod
    def ensure(cls, config: OpenmojiConfig) -> None:  # type: ignore[override]  # every class gets its own Config
        """Makes the data set unless its index is there."""
        root = Path(config.root)
        if not any((root / name).is_file() for name in config.index):
            log.info("data set %s is not in %s: making it (data/make_openmoji.py)", config.name, root)
            make(root, config.picture_size, os.cpu_count() or 1)
