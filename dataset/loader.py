"""Loaders: the batches of a split, in training order or row by row, on a device.

Order, augmentation and the choice among captions are functions of (seed, epoch, row), so a loader has no state that a
checkpoint would have to hold, and the number of processes and workers changes nothing but the speed.
"""

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.types import Batch
from dataset.base import PairedDataset
from dataset.columns import PictureColumn, RowColumn
from dataset.pictures.cache import cached_pictures
from dataset.pictures.draws import Purpose, permutation, uniform
from dataset.pictures.jobs import Job, PictureSource
from dataset.pictures.memory import MemorySource, PictureMemory
from dataset.pictures.reading import Pictures
from dataset.pictures.transforms import CROP_DRAWS, View
from dataset.pictures.workers import WorkerSource
from dataset.splits import Split
from utils.distributed import rank, world_size
from utils.transfer import sent

_memories: weakref.WeakKeyDictionary[PairedDataset, dict[torch.device, PictureMemory]] = weakref.WeakKeyDictionary()
_caches: weakref.WeakKeyDictionary[PairedDataset, Pictures] = weakref.WeakKeyDictionary()


def build_loader(
    dataset: PairedDataset,
    split: Split,
    fields: frozenset[str],
    *,
    batch_size: int,
    seed: int,
    device: torch.device,
    kind: Literal["memory", "workers"],
    workers: int,
    caption: Literal["random", "first"],
) -> "Loader":
    """Builds the loader of a split.

    Args:
        dataset: The data set.
        split: Which split.
        fields: Fields of the batches; `index` always comes along. Nothing else is read or decoded.
        batch_size: Rows of a global batch, over all processes.
        seed: Seed of order, augmentation and captions.
        device: Where batches go.
        kind: `memory` holds the pictures on the device; `workers` has processes read them.
        workers: Processes of `workers`; 0 reads in this one.
        caption: Which of several captions `once` gives: a random one, always the same, or the first. `epoch` draws a
            new one every epoch.

    Returns:
        The loader.

    Raises:
        UserError: If the split does not offer a field, has fewer rows than a training batch, or does not fit into
            memory; if the picture cache of `dataset.cache` cannot be built.
    """
    dataset.require(split, fields)
    rows = len(dataset.splits.items(split))
    if split == "train" and batch_size > rows:
        raise UserError(
            f"run.batch_size is {batch_size}, but the training split of {dataset.config.name} has {rows} pairs; "
            "lower run.batch_size or raise dataset.split.train"
        )
    numbers: list[Tensor] = []
    groups: list[list[str]] = []  # fields that show the same pictures are read once
    for field in sorted(fields - {"index"}):
        column = dataset.columns[split][field]
        if isinstance(column, PictureColumn):
            known = next((n for n, other in enumerate(numbers) if torch.equal(other, column.numbers)), None)
            if known is None:
                numbers.append(column.numbers)
                groups.append([field])
            else:
                groups[known].append(field)
    config = dataset.config
    pictures = dataset.pictures
    if config.cache is not None and numbers:
        if dataset not in _caches:
            _caches[dataset] = cached_pictures(pictures, Path(config.cache), config.name, config.stored_size)
        pictures = _caches[dataset]
    source: PictureSource
    if kind == "workers":
        source = WorkerSource(pictures, numbers, config.image_size, device, workers, persistent=split == "train")
    else:
        memories = _memories.setdefault(dataset, {})
        memory = memories.setdefault(device, PictureMemory(pictures, device, config.name))
        source = MemorySource(memory, numbers, size=config.image_size, stored_size=config.stored_size)
    loader = Loader(
        dataset, split, fields, groups, source, batch_size=batch_size, seed=seed, device=device, caption=caption
    )
    # Known ahead of the first pass, so that all splits are decoded together: training reads epochs, the others once.
    source.want(*((loader.train_view, torch.arange(rows)) if split == "train" else (View.SQUASHED, loader.own_rows)))
    return loader


def caption_draws(
    seed: int, rows: Tensor, *, random: bool, epoch: int = 0, purpose: Purpose = Purpose.EVALUATE_CAPTION
) -> Tensor:
    """Which of several captions rows of a split get.

    Args:
        seed: The run's.
        rows: Places in the split, [B] int64.
        random: Whether one is drawn; else the first is taken.
        epoch: For which they are drawn; evaluation's is 0.
        purpose: For what.

    Returns:
        A number in [0, 1) for each, [B]; 0 is the first caption.
    """
    return torch.from_numpy(uniform(seed, epoch, purpose, rows.numpy(), 1)[:, 0]) if random else torch.zeros(len(rows))


class Loader:
    """Batches of one split; built by `build_loader`.

    Args:
        dataset: The data set.
        split: The split.
        fields: Fields of the batches.
        groups: The picture fields among them, those that show the same pictures together.
        source: Makes the pictures of each group.
        batch_size: Rows of a global batch.
        seed: Seed of order, augmentation and captions.
        device: Where batches go.
        caption: Which of several captions `once` gives.
    """

    def __init__(
        self,
        dataset: PairedDataset,
        split: Split,
        fields: frozenset[str],
        groups: list[list[str]],
        source: PictureSource,
        *,
        batch_size: int,
        seed: int,
        device: torch.device,
        caption: Literal["random", "first"],
    ) -> None:
        self.columns = {field: dataset.columns[split][field] for field in sorted(fields - {"index"})}
        self.groups = groups
        self.source = source
        self.rows = len(dataset.splits.items(split))
        self.batch_size = batch_size
        self.seed = seed
        self.device = device
        self.caption = caption
        self.train_view = View.RANDOM if dataset.config.augment else View.CROPPED

    def __len__(self) -> int:
        """Global batches of an epoch, the last partial one counted."""
        return -(-self.rows // self.batch_size)

    @property
    def own_rows(self) -> Tensor:
        """Rows that `once` gives to this process, [m] int64."""
        return torch.arange(rank(), self.rows, world_size())

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Batches in training order, augmented: this process's contiguous share of every global batch.

        Shares differ by at most one row, the earlier processes having the larger ones; a share may be empty.

        Args:
            epoch: Number of the epoch, from 0.
            start: Global batches to skip; nothing of them is read.

        Yields:
            Batches on the device.
        """
        self.source.want(self.train_view, torch.arange(self.rows))
        order = permutation(self.seed, epoch, self.rows)
        jobs: list[Job] = []
        for first in range(start * self.batch_size, self.rows, self.batch_size):
            rows = np.array_split(order[first : first + self.batch_size], world_size())[rank()]
            random = self.train_view is View.RANDOM
            draws = uniform(self.seed, epoch, Purpose.AUGMENT, rows, CROP_DRAWS) if random else None
            jobs.append(Job(torch.from_numpy(rows), self.train_view, draws))
        yield from self._batches(jobs, epoch, Purpose.TRAIN_CAPTION)

    def once(self) -> Iterator[Batch]:
        """Every row of the split once over all processes, transformed for evaluation, in order.

        This process takes the rows `range(rank, rows, world size)`; without any it yields one empty batch.

        Yields:
            Batches on the device.
        """
        self.source.want(View.SQUASHED, self.own_rows)
        jobs = [Job(rows, View.SQUASHED, None) for rows in torch.split(self.own_rows, self.batch_size)]
        yield from self._batches(jobs, 0, Purpose.EVALUATE_CAPTION)

    def close(self) -> None:
        """Ends what reads pictures for it; no pass is asked for any more."""
        self.source.close()

    def _batches(self, jobs: list[Job], epoch: int, purpose: Purpose) -> Iterator[Batch]:
        pictures: Iterator[list[Tensor]] = self.source.batches(jobs) if self.groups else iter([[] for _ in jobs])
        for job, tensors in zip(jobs, pictures, strict=True):
            random = purpose is Purpose.TRAIN_CAPTION or self.caption == "random"
            draws = caption_draws(self.seed, job.rows, random=random, epoch=epoch, purpose=purpose)
            fields = {"index": sent(job.rows, self.device)}
            for field, column in self.columns.items():
                if isinstance(column, RowColumn):
                    fields[field] = sent(column.rows(job.rows, draws), self.device)
            for names, pixels in zip(self.groups, tensors, strict=True):
                fields.update(dict.fromkeys(names, pixels))
            yield Batch(fields)
