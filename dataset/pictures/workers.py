"""`loader: workers`: processes that read and transform pictures while the model computes."""

import os
import signal
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from common.errors import UserError
from dataset.pictures.jobs import Job
from dataset.pictures.reading import Pictures
from dataset.pictures.transforms import View, normalise
from utils.signals import end_with_parent
from utils.transfer import sent


class WorkerSource:
    """Pictures read by worker processes, a whole batch by each.

    Args:
        pictures: Reads them.
        numbers: Lists of picture numbers, one number per row of the split, [n] int64 each.
        size: Side R in pixels.
        device: Where batches go.
        workers: Number of processes; 0 reads in this one.
        persistent: Whether they wait for the next pass when one is over, or end.
    """

    def __init__(
        self,
        pictures: Pictures,
        numbers: list[Tensor],
        size: int,
        device: torch.device,
        workers: int,
        persistent: bool,
    ) -> None:
        self.device = device
        self._jobs = _JobList()
        self._results: Iterator[list[Tensor] | str] | None = None  # of the present pass
        self._loader: DataLoader[Any] | None = DataLoader(
            _JobPictures(pictures, numbers, size),
            batch_size=None,
            sampler=self._jobs,
            num_workers=workers,
            collate_fn=_as_it_is,
            pin_memory=device.type == "cuda",
            persistent_workers=persistent and workers > 0,
            worker_init_fn=_leave_signals_to_parent,
        )

    def want(self, view: View, rows: Tensor) -> None:
        """As `PictureSource.want`, rows [m]; nothing to do, since pictures are read when their batch comes."""

    def batches(self, jobs: Sequence[Job]) -> Iterator[list[Tensor]]:
        """For every job, one normalised tensor [B, 3, R, R] on the device per list of picture numbers.

        Raises:
            UserError: If a picture cannot be read, or a worker was killed.
        """
        self._jobs.jobs = jobs
        if self._loader is None:
            raise RuntimeError("the loader is closed")
        self._results = iter(self._loader)
        while self._results is not None:
            try:
                result = next(self._results)
            except StopIteration:
                return
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                raise UserError(
                    f"a loader worker was killed ({' '.join(str(error).split())}), often for want of memory or of room "
                    "in /dev/shm; lower run.workers or run.batch_size"
                ) from None
            if isinstance(result, str):
                raise UserError(result)
            yield [normalise(sent(pixels, self.device)) for pixels in result]

    def close(self) -> None:
        """Ends the workers; a pass that is not over gives no more.

        They end when nothing holds torch's iterator. The garbage collector closes their pipes first, and then each is
        waited for, five seconds long.
        """
        self._results = self._loader = None


class _JobList(Sampler[Job]):
    """The jobs of the current pass; a sampler, since persistent workers outlive the pass."""

    def __init__(self) -> None:
        self.jobs: Sequence[Job] = ()

    def __iter__(self) -> Iterator[Job]:
        return iter(self.jobs)

    def __len__(self) -> int:
        return len(self.jobs)


class _JobPictures(Dataset[list[Tensor] | str]):
    """Makes the pictures of a job: uint8 [B, 3, R, R] per list of numbers, or the text of the user's mistake.

    An exception would reach the parent wrapped in this process's traceback; a text stays one line.
    """

    def __init__(self, pictures: Pictures, numbers: list[Tensor], size: int) -> None:
        self.pictures = pictures
        self.numbers = numbers
        self.size = size

    def __getitem__(self, job: Job) -> list[Tensor] | str:
        try:
            return [self._batch(job, numbers[job.rows]) for numbers in self.numbers]
        except UserError as error:
            return str(error)

    def _batch(self, job: Job, numbers: Tensor) -> Tensor:
        batch = torch.empty(len(numbers), 3, self.size, self.size, dtype=torch.uint8)
        for row, number in enumerate(numbers.tolist()):
            draws = None if job.draws is None else job.draws[row]
            batch[row] = self.pictures.view(number, job.view, self.size, draws)
        return batch


def _as_it_is(result: list[Tensor] | str) -> list[Tensor] | str:
    return result


def _leave_signals_to_parent(_: int) -> None:
    """Ctrl-C and torchrun reach whole process groups; the parent decides what they mean, and ends its workers.

    A worker ends with a killed parent, too: it would keep the parent's connections open, and its peers waiting.
    """
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_parent()
