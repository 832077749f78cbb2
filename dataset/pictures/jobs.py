"""The border between a loader, which decides what a batch holds, and the sources that make its pictures."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from dataset.pictures.draws import Floats
from dataset.pictures.transforms import View


@dataclass(frozen=True)
class Job:
    """The pictures of one batch.

    Attributes:
        rows: Places in the split, [B] int64.
        view: What each picture is turned into.
        draws: Numbers for `View.RANDOM`, [B, CROP_DRAWS]; None for the other views.
    """

    rows: Tensor
    view: View
    draws: Floats | None


class PictureSource(Protocol):
    """Makes the pictures of batches; serves one pass at a time."""

    def want(self, view: View, rows: Tensor) -> None:
        """Says which rows [m] of the split this process will ask for in `view`; saying it again changes nothing."""
        ...

    def batches(self, jobs: Sequence[Job]) -> Iterator[list[Tensor]]:
        """For every job and every list of picture numbers one normalised tensor on the device, [B, 3, R, R]."""
        ...

    def close(self) -> None:
        """Ends what works for it; no pass is asked for any more."""
        ...
