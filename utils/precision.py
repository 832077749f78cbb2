"""How exactly a GPU computes float32."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Context in which matrix products and convolutions of float32 are computed so; what held before holds after.

    Args:
        precision: `highest`: float32. `high`: TF32 on a GPU that has it, 10 bits of mantissa; elsewhere no change.
    """
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = precision == "high"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
