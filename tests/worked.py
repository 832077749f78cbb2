"""Inputs by formula, for values worked out once by hand or by other code: waves, labels, parameters."""

from collections.abc import Mapping

import torch
from torch import Tensor


def wave(start: float, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """`sin(start + 0.7 i + 1.3 j + 0.11 i j)`, [rows, columns] of the given type."""
    i, j = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in (rows, columns)), indexing="ij")
    return torch.sin(start + 0.7 * i + 1.3 * j + 0.11 * i * j).to(dtype)


def multi_hot(rows: int, classes: int) -> Tensor:
    """Labels [rows, classes] float32: 1 where `(3i + 5c + ic) mod 7 < 2` or `c = i mod classes`."""
    i, c = torch.meshgrid(torch.arange(rows), torch.arange(classes), indexing="ij")
    return (((3 * i + 5 * c + i * c) % 7 < 2) | (c == i % classes)).float()


def filled(
    shapes: Mapping[str, tuple[int, ...]],
    norms: tuple[str, ...] = (),
    scale: float = 0.1,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Values for named tensors: `scale sin(0.37 t + 0.5 r)` for element t of the name of rank r.

    Args:
        shapes: Name -> shape.
        norms: Parts of names; a tensor whose name holds one and ends in `weight` is a norm's, and gets 1 + 0.1 sin(..).
        scale: Of the others.
        dtype: Of the values.

    Returns:
        Name -> tensor.
    """
    values = {}
    for rank, name in enumerate(sorted(shapes)):
        size = int(torch.tensor(shapes[name]).prod())
        wave = torch.sin(0.37 * torch.arange(size, dtype=torch.float64) + 0.5 * rank)
        is_norm = name.endswith("weight") and any(part in name for part in norms)
        values[name] = (1 + 0.1 * wave if is_norm else scale * wave).to(dtype).view(shapes[name])
    return values
