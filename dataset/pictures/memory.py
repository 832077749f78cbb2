"""`loader: memory`: pictures decoded once and held on the device as uint8; batches are made there."""

import os
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from common.errors import UserError
from dataset.pictures.jobs import Job
from dataset.pictures.reading import Pictures
from dataset.pictures.transforms import View, crop_boxes, flips, normalise, resample, squashed, to_pixels, view_pixels
from utils.progress import progress
from utils.transfer import sent

_CHUNK = 256  # pictures handed to the threads at a time: bounds what waits to be copied to the device
_ROOM = 0.9  # share of the free memory that pictures may take


class Holding:
    """Pictures of one view that a memory holds.

    Args:
        numbers: Numbers of the pictures, [n] int64.
        view: What they are turned into; `View.RANDOM` holds whole pictures, to be cut when a batch is made.
        side: Side S in pixels at which they are held.
        device: Where.

    Attributes:
        pixels: [n, 3, S, S] uint8, for `View.RANDOM` [n, S, S, 3]; filled by `PictureMemory.fill`.
        sizes: Width and height of the pictures before the view, [n, 2] int64.
        full: Whether `pixels` is filled.
    """

    def __init__(self, numbers: Tensor, view: View, side: int, device: torch.device) -> None:
        self.numbers = numbers
        self.view = view
        self.side = side
        shape = (side, side, 3) if view is View.RANDOM else (3, side, side)
        self.pixels = torch.empty(len(numbers), *shape, dtype=torch.uint8, device=device)
        self.sizes = torch.zeros(len(numbers), 2, dtype=torch.int64)
        self.full = False


class PictureMemory:
    """The pictures of a data set on one device. What several splits ask for is decoded in one pass, each picture once.

    Args:
        pictures: Reads them.
        device: Where they are held.
        name: The data set's name, for messages.
    """

    def __init__(self, pictures: Pictures, device: torch.device, name: str) -> None:
        self.pictures = pictures
        self.device = device
        self.name = name
        self._wanted: weakref.WeakSet[Holding] = weakref.WeakSet()

    def want(self, numbers: Tensor, view: View, side: int) -> Holding:
        """Asks for pictures; they are there after the next `fill`.

        Args:
            numbers: Numbers of the pictures, [n] int64.
            view: What they are turned into.
            side: Side in pixels at which they are held.

        Raises:
            UserError: If they would not fit into the device's free memory.
        """
        need, free = len(numbers) * 3 * side * side, free_memory(self.device)
        unfilled = sum(holding.pixels.numel() for holding in self._wanted) if self.device.type == "cpu" else 0
        if need + unfilled > _ROOM * free:
            raise UserError(
                f"run.loader=memory: the pictures of {self.name} take {(need + unfilled) / 2**30:.1f} GiB, and "
                f"{self.device} has {free / 2**30:.1f} GiB free; set run.loader=workers"
            )
        holding = Holding(numbers, view, side, self.device)
        self._wanted.add(holding)
        return holding

    def fill(self) -> None:
        """Decodes everything that was asked for since the last time, in parallel threads.

        Raises:
            UserError: If a picture cannot be read.
        """
        holdings = list(self._wanted)
        places: dict[int, list[tuple[Holding, int]]] = {}
        for holding in holdings:
            for place, number in enumerate(holding.numbers.tolist()):
                places.setdefault(number, []).append((holding, place))

        def decode(number: int) -> list[Tensor]:
            picture = self.pictures.read(number)
            size = self.pictures.source_size(number, picture)
            views: list[Tensor] = []
            for holding, place in places[number]:
                holding.sizes[place] = torch.tensor(size)
                if holding.view is View.RANDOM:
                    views.append(to_pixels(squashed(picture, holding.side)))
                else:
                    views.append(view_pixels(picture, holding.view, holding.side, None))
            return views

        numbers = sorted(places)
        threads = len(os.sched_getaffinity(0))
        with (
            ThreadPoolExecutor(threads) as pool,
            progress(total=len(numbers), desc=f"pictures of {self.name}", unit="picture", leave=False) as bar,
        ):
            for start in range(0, len(numbers), _CHUNK):
                part = numbers[start : start + _CHUNK]
                for number, views in zip(part, pool.map(decode, part), strict=True):
                    for (holding, place), pixels in zip(places[number], views, strict=True):
                        holding.pixels[place] = pixels
                    bar.update()
        for holding in holdings:
            holding.full = True
            self._wanted.discard(holding)


class MemorySource:
    """Pictures cut, resized and normalised on the device, a batch at once.

    Pixels equal those of worker processes (with a picture cache: to within rounding), except for `View.RANDOM`. There
    they differ by at most one grey level of 255 where pictures are held at their own size, and otherwise by cutting
    from a resized picture: by at most 3 grey levels for smooth pictures of 500 x 375 pixels held at 256 for a model
    that takes 224; by more at sharp edges.

    Args:
        memory: Holds the pictures.
        numbers: Lists of picture numbers, one number per row of the split, [n] int64 each.
        size: Side R in pixels.
        stored_size: Side in pixels at which pictures for random crops are held.
    """

    def __init__(self, memory: PictureMemory, numbers: list[Tensor], *, size: int, stored_size: int) -> None:
        self.memory = memory
        self.numbers = numbers
        self.size = size
        self.stored_size = stored_size
        self._held: dict[View, tuple[Tensor, list[Holding]]] = {}

    def want(self, view: View, rows: Tensor) -> None:
        """Asks for the rows [m] of the split that this process will need in `view`.

        Raises:
            UserError: If they would not fit into memory.
        """
        if view not in self._held:
            side = self.stored_size if view is View.RANDOM else self.size
            place = torch.full((int(rows.max()) + 1 if len(rows) else 0,), -1)
            place[rows] = torch.arange(len(rows))
            self._held[view] = place, [self.memory.want(numbers[rows], view, side) for numbers in self.numbers]

    def batches(self, jobs: Sequence[Job]) -> Iterator[list[Tensor]]:
        """For every job, one normalised tensor [B, 3, R, R] on the device per list of picture numbers.

        Raises:
            UserError: If a picture cannot be read.
        """
        for job in jobs:
            place, holdings = self._held[job.view]
            if not all(holding.full for holding in holdings):
                self.memory.fill()
            yield [self._batch(job, holding, place[job.rows]) for holding in holdings]

    def close(self) -> None:
        """Nothing to do: the pictures stay, since other splits of the data set share them."""

    def _batch(self, job: Job, holding: Holding, places: Tensor) -> Tensor:
        device = holding.pixels.device
        pixels = holding.pixels[sent(places, device)]
        if job.draws is None:
            return normalise(pixels)
        sizes = holding.sizes[places]
        scale = (self.stored_size / sizes).repeat(1, 2)  # [B, 4]
        boxes = torch.from_numpy(crop_boxes(sizes.numpy(), job.draws)) * scale
        mirrored = torch.from_numpy(flips(job.draws))
        return normalise(resample(pixels, sent(boxes.float(), device), sent(mirrored, device), self.size))


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = _numbers(Path("/proc/meminfo"))["MemAvailable:"] * 1024
    group = Path("/sys/fs/cgroup")  # a container may have less than the machine
    limit = (group / "memory.max").read_text().strip() if (group / "memory.max").exists() else "max"
    if limit != "max":
        used = int((group / "memory.current").read_text()) - _numbers(group / "memory.stat")["inactive_file"]
        free = min(free, int(limit) - used)
    return free


def _numbers(path: Path) -> dict[str, int]:
    """First number of every line, by the line's first word."""
    return {line.split()[0]: int(line.split()[1]) for line in path.read_text().splitlines()}
