"""Rows of all processes: values, gradients, uneven shares, votes."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from tests.processes import run_processes
from utils.distributed import _GatherRows, any_process, from_main, gather_rows, rank, world_size

ROWS = 5


def table() -> Tensor:
    return torch.arange(ROWS * 3, dtype=torch.float32).reshape(ROWS, 3) / 7


def pairwise_loss(rows: Tensor) -> Tensor:
    """Looks across rows, as the losses of this library do."""
    return (rows @ rows.T).exp().mean() + rows.std()


def share_of_step() -> tuple[Tensor, Tensor, Tensor]:
    """This process's part of a step: loss of the gathered rows, gradient of its own rows, gathered indices."""
    index = torch.arange(ROWS).tensor_split(world_size())[rank()]
    own = table()[index].requires_grad_()
    loss = pairwise_loss(gather_rows(own.sin()))
    loss.backward()
    assert own.grad is not None
    return loss.detach(), own.grad / world_size(), gather_rows(index)  # DistributedDataParallel's mean


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_processes_see_the_loss_and_gradients_of_one(count: int) -> None:
    rows = table().requires_grad_()
    loss = pairwise_loss(rows.sin())
    loss.backward()
    parts = run_processes(share_of_step, count) if count > 1 else [share_of_step()]
    for part in parts:
        torch.testing.assert_close(part[0], loss.detach(), rtol=1e-6, atol=0)
        assert torch.equal(part[2], torch.arange(ROWS))
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), rows.grad, rtol=1e-5, atol=1e-7)


def votes() -> tuple[bool, bool, bool | int]:
    return any_process(rank() == 1), any_process(False), from_main(rank() == 0)


def test_votes_are_the_same_everywhere() -> None:
    assert run_processes(votes, 2) == [(True, False, True)] * 2
    assert votes() == (False, False, True)


@pytest.mark.gpu
def test_gathering_over_nccl(tmp_path: Path) -> None:
    """One process on one GPU: the collectives run, values and gradients stay."""
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        rows, copy = table().cuda().requires_grad_(), table().cuda().requires_grad_()
        pairwise_loss(copy.sin()).backward()
        wrapped = DistributedDataParallel(torch.nn.Linear(3, 3).cuda())
        assert wrapped(_GatherRows.apply(rows)).shape == (ROWS, 3)
        pairwise_loss(_GatherRows.apply(rows.sin())).backward()
        torch.testing.assert_close(rows.grad, copy.grad)
    finally:
        dist.destroy_process_group()
