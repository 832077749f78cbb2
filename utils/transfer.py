"""Tensors on their way to a device."""

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the processor's memory on a device, without waiting for what the device computes.

    To a GPU it goes from pinned memory: a copy from elsewhere may wait for all that was asked of the GPU before.

    Args:
        tensor: Of any dtype, [...].
        device: Where it goes.

    Returns:
        The same on the device, [...]; the tensor itself if that is the processor.
    """
    if device.type == "cuda" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
