"""Memory banks: what a method remembers of every training item from one step to the next."""

import torch
from torch import Tensor, nn


class MemoryBank(nn.Module):
    """One row per item of the training split, as a persistent buffer.

    `.to(device)` moves it and the checkpoint holds it. Every process writes the rows of the global batch, so banks
    stay alike everywhere without any broadcast.

    Args:
        num_rows: Items N of the training split.
        width: Values of a row, K for codes.
    """

    rows: Tensor

    def __init__(self, num_rows: int, width: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(num_rows, width))

    def fill_normal(self, generator: torch.Generator) -> None:
        """Fills all rows with standard normal draws of a CPU generator."""
        self.rows.copy_(torch.randn(self.rows.shape, generator=generator))

    @torch.no_grad()
    def write(self, index: Tensor, rows: Tensor) -> None:
        """Overwrites rows; no gradient flows into the bank.

        Args:
            index: Places in the training split, [B] int64, each at most once.
            rows: New values, [B, K].
        """
        self.rows[index] = rows.detach().to(self.rows.dtype)


class FeatureCache(nn.Module):
    """Features of training items that stay the same all through a run, such as those of a frozen backbone.

    Buffers like any other to `.to(device)`, but no part of a checkpoint: they follow from the data and are made again
    when a run goes on.

    Args:
        num_rows: Items N of the training split.
    """

    def __init__(self, num_rows: int) -> None:
        super().__init__()
        self.num_rows = num_rows

    def __contains__(self, name: str) -> bool:
        return name in self._buffers

    @torch.no_grad()
    def write(self, name: str, index: Tensor, rows: Tensor) -> None:
        """Keeps rows under a name; room for all items is taken at its first row.

        Args:
            name: Which feature.
            index: Places in the training split, [B] int64.
            rows: Values, [B, ...].
        """
        if name not in self:
            self.register_buffer(name, rows.new_zeros(self.num_rows, *rows.shape[1:]), persistent=False)
        self.get_buffer(name)[index] = rows

    def read(self, name: str, index: Tensor) -> Tensor:
        """The rows that were written under a name, at places `index` [B]: [B, ...]."""
        return self.get_buffer(name)[index]
