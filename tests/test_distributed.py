"""Rows of all processes: values, gradients, uneven shares, votes."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from tests.processes import run_processes
from utils.distributed import Votes, _GatherRows, average_gradients, from_main, gather_rows, rank, world_size

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


def agree() -> tuple[list[tuple[bool, ...]], int, float]:
    votes = Votes()
    answers = [votes.ask(*flags) for flags in ((rank() == 1, False), (False, rank() == 0), (False, False))]
    weight, without = torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(1))
    weight.grad = torch.full((2, 3), float(rank()))
    average_gradients([weight, without])
    assert without.grad is None
    return answers, from_main(10 + rank()), float(weight.grad.mean())


def test_processes_agree() -> None:
    """Each answer is to the question before, where there are several processes."""
    assert run_processes(agree, 2) == [([(False, False), (True, False), (False, True)], 10, 0.5)] * 2
    assert agree() == ([(False, False), (False, True), (False, False)], 10, 0.0)


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
