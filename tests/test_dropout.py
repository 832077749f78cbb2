"""Dropout of a process's own rows: the draws of one process on the global batch."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.blocks.dropout import RowDropout
from tests.processes import run_processes
from utils.distributed import rank, world_size

SHAPES = [(5, 16), (5, 4, 16), (5, 2, 3, 4)]  # features, tokens, attention


def silenced() -> list[tuple[Tensor, Tensor]]:
    """This process's share of every shape after dropout, and its gradient, one after the other."""
    torch.manual_seed(3)
    layer, parts = RowDropout(0.3), []
    for shape in SHAPES:
        rows = torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape).tensor_split(world_size())[rank()]
        rows.requires_grad_()
        out = layer(rows)
        out.sum().backward()
        assert rows.grad is not None
        parts.append((out.detach(), rows.grad))
    return parts


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_draws_are_those_of_torch_on_the_global_batch(count: int) -> None:
    """Uneven shares, and processes without rows."""
    torch.manual_seed(3)
    wanted = [F.dropout(torch.ones(shape), 0.3) for shape in SHAPES]
    parts = run_processes(silenced, count) if count > 1 else [silenced()]
    for number, mask in enumerate(wanted):
        rows = torch.linspace(-1, 1, mask.numel()).view(mask.shape)
        assert torch.equal(torch.cat([part[number][0] for part in parts]), rows * mask)
        assert torch.equal(torch.cat([part[number][1] for part in parts]), mask)
        assert 0.4 < float((mask != 0).float().mean()) < 0.95


def test_nothing_is_silenced_or_drawn_in_evaluation_or_with_probability_0() -> None:
    x, state = torch.randn(3, 4), torch.get_rng_state()
    assert RowDropout(0.3).eval()(x) is x and RowDropout(0.0)(x) is x
    assert torch.equal(torch.get_rng_state(), state)


def test_half_precision_stays() -> None:
    x = torch.ones(64, 64, dtype=torch.bfloat16)
    torch.manual_seed(3)
    wanted = F.dropout(x, 0.3)
    torch.manual_seed(3)
    out = RowDropout(0.3)(x)
    assert out.dtype == x.dtype and torch.equal(out, wanted)
