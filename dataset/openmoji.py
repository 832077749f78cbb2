"""`openmoji`: the embedded data set. Makes itself where it is not there."""

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import Field

from common.errors import UserError
from common.registry import DATASETS
from dataset.base import Contents, PairedConfig
from dataset.mat import MatConfig, MatDataset
from dataset.mat_reader import number_matrix, read_variable

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
            from data.make_openmoji import make  # no configuration waits for what draws

            log.info("data set %s is not in %s: making it (data/make_openmoji.py)", config.name, root)
            make(root, config.picture_size, os.cpu_count() or 1)

    def open(self) -> Contents:
        """As `PairedDataset.open`, with the families that variants of a drawing (man, woman, person) belong to."""
        contents = super().open()
        variable = read_variable(Path(self.config.root) / "family.mat", ("family",))
        families = number_matrix(variable.value, len(contents.names))
        if families is None or families.shape != (len(contents.names), 1) or families.min() < 0:
            raise UserError(f"{variable.place} is not one number per picture; remove {self.config.root} and run again")
        return replace(contents, families=torch.from_numpy(families[:, 0]).long())
