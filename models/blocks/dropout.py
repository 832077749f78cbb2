"""Dropout for layers that compute each process's own rows, before any gathering."""

import torch
from torch import Tensor, nn

from utils.distributed import place_of_rows


class RowDropout(nn.Module):
    """Dropout that silences the same entries of the global batch for any number of processes.

    Every process draws for all rows from torch's generator, which the runner seeds alike everywhere before a step, and
    uses the draws of its own rows. So the draws are a function of seed, step, layer and global row, and the generators
    of all processes stay alike. One process draws on the CPU what `torch.nn.Dropout` does. Layers whose input is
    gathered already take that one: they see the same rows everywhere.

    Args:
        probability: Of silencing an entry, in [0, 1).
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        """This process's rows [b, ...] -> the same, with entries silenced and the others scaled up in training."""
        if not self.training or self.probability == 0:
            return x
        first, rows = place_of_rows(x)
        keep = torch.empty(rows, *x.shape[1:], dtype=torch.bool, device=x.device).bernoulli_(1 - self.probability)
        return x * keep[first : first + len(x)].to(x.dtype).div_(1 - self.probability)

    def extra_repr(self) -> str:
        """The setting, as `print(model)` shows it."""
        return f"probability={self.probability}"
