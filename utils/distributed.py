"""The border between one process and many. On one process everything here is the identity."""

import functools
import inspect
import os
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """Number of this process on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    """Whether this process writes files and talks to the terminal; known before the processes have joined."""
    return rank() == 0 if dist.is_initialized() else os.environ.get("RANK", "0") == "0"


def from_main(number: int) -> int:
    """The first process's number, on every process."""
    if world_size() == 1:
        return number
    shared = torch.tensor([number], device=_device_of_messages())
    dist.broadcast(shared, src=0)
    return int(shared.item())


def barrier() -> None:
    """Waits for all processes."""
    if dist.is_initialized():
        dist.barrier()


def gather_rows(rows: Tensor) -> Tensor:
    """Rows of all processes, in rank order; gradients flow back to the process that gave the row.

    Backward sums the gradients that all processes have for a row. With DistributedDataParallel's mean over processes
    this gives exactly the gradients of one process on the global batch.

    Args:
        rows: This process's rows, [b, ...]; b may differ between processes and may be 0.

    Returns:
        All rows, [B, ...] with B the sum of all b.
    """
    if world_size() == 1:
        return rows
    gathered: Tensor = _GatherRows.apply(rows)
    return gathered


def place_of_rows(rows: Tensor) -> tuple[int, int]:
    """Where this process's rows stand among those of all processes, in rank order.

    Args:
        rows: This process's rows, [b, ...]; b may differ between processes and may be 0.

    Returns:
        Number of the first of them, from 0, and B, the sum of all b.
    """
    sizes = _row_counts(rows)
    return sum(sizes[: rank()]), sum(sizes)


def _row_counts(rows: Tensor) -> list[int]:
    """Numbers of rows of all processes."""
    if world_size() == 1:
        return [rows.shape[0]]
    count = torch.tensor([rows.shape[0]])
    counts = [torch.zeros_like(count) for _ in range(world_size())]
    dist.all_gather(counts, count, group=_group_of_messages(dist.group.WORLD))
    return torch.cat(counts).tolist()


class _GatherRows(torch.autograd.Function):
    """All-gather of rows of uneven number; backward sums over processes and takes the own slice."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, rows: Tensor) -> Tensor:
        sizes = _row_counts(rows)
        padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
        padded[: rows.shape[0]] = rows
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        ctx.start, ctx.stop = sum(sizes[: rank()]), sum(sizes[: rank() + 1])  # type: ignore[attr-defined]
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # autograd may share it
        dist.all_reduce(gradient)
        return gradient[ctx.start : ctx.stop]  # type: ignore[attr-defined]


def data_parallel(module: nn.Module, reaches_all: bool) -> nn.Module:
    """The module with gradients averaged over all processes.

    Buffers are not sent around in every step: banks are written alike on every process.

    Args:
        module: The module.
        reaches_all: Whether every step's loss has a gradient for every trainable parameter.
    """
    if world_size() == 1:
        return module
    option = "forward_sync_buffers"  # its name from PyTorch 2.13 on
    if option not in inspect.signature(DistributedDataParallel).parameters:
        option = "broadcast_buffers"
    # Gradients lie in the buckets that are sent, so they are held once and not copied. No static graph:
    # where the loss reaches all, buckets follow the order of gradients without it, and it gave other gradients.
    options: dict[str, Any] = {option: False, "find_unused_parameters": not reaches_all}
    return DistributedDataParallel(module, gradient_as_bucket_view=True, **options)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Means of gradients over all processes, in place, for a backward pass that `data_parallel` does not see.

    Every process must have gradients for the same parameters. Where all computed the same ones this only keeps rounding
    from driving them apart.
    """
    if world_size() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return
    together = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(together)
    together /= world_size()
    for gradient, mean in zip(gradients, together.split([one.numel() for one in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


class Votes:
    """Questions to all processes whose answers come one question later, so that nobody waits for them.

    Every process must make one, and ask as often as the others. On one process every answer is there at once.
    """

    def __init__(self) -> None:
        self._group: Any = dist.new_group(backend="gloo") if world_size() > 1 else None  # the CPU's, past all computing
        self._asked: tuple[Tensor, Any] | None = None

    def ask(self, *flags: bool) -> tuple[bool, ...]:
        """Asks whether each flag is true on any process.

        Returns:
            The answers to the previous question, all false before the second one; the same on all processes.
        """
        if self._group is None:
            return flags
        answers = (False,) * len(flags)
        if self._asked is not None:
            counts, work = self._asked
            work.wait()
            answers = tuple(bool(count) for count in counts.tolist())
        counts = torch.tensor(flags, dtype=torch.int32)
        self._asked = counts, dist.all_reduce(counts, group=self._group, async_op=True)
        return answers


@functools.lru_cache(maxsize=1)
def _group_of_messages(world: Any) -> Any:
    """All processes, for numbers on the CPU: reading one back from a GPU would wait for all that it is computing."""
    return dist.new_group(backend="gloo")


def _device_of_messages() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
