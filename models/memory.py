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
