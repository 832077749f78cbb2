"""Methods on sets of vectors made from tokens: sizes and rows that are easily read wrongly."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from common.types import Batch, Progress
from models.base import HashingModel
from tests.tiny_models import LENGTH, SHAPE, build, pick, rows_of

START = Progress(epoch=0, epochs=1, step=0, steps_per_epoch=1)
TRIPLET_TERM = {"DIMCH": "set_triplet_i2t", "UMoED": "triplet_i2t"}


def head_parameters(model: HashingModel) -> Iterator[nn.Parameter]:
    """What makes sets of tokens."""
    return (value for name, value in model.named_parameters() if not name.startswith("backbone."))


@pytest.mark.parametrize("method", TRIPLET_TERM)
def test_batches_as_large_as_the_token_counts_are_read_as_any_other(method: str, tmp_path: Path) -> None:
    model = build(method, str(tmp_path)).eval()
    for rows in (1 + SHAPE.patches, LENGTH):
        many = pick(rows_of(), [row % 11 for row in range(rows)])
        with torch.no_grad():
            codes = model.encode_image(many), model.encode_text(many)
            single = model.encode_image(pick(many, [0])), model.encode_text(pick(many, [0]))
        for all_rows, one in zip(codes, single, strict=True):
            assert all_rows.shape == (rows, 16) and torch.equal(all_rows[:1], one)


@pytest.mark.parametrize("method", TRIPLET_TERM)
@pytest.mark.parametrize("overrides", [{}, {"set_size": 1}], ids=["sets", "one member"])
def test_one_row_trains(method: str, overrides: dict[str, int], tmp_path: Path) -> None:
    model = build(method, str(tmp_path), **overrides)
    out = model(pick(rows_of(), [4]), START)
    out.loss.backward()
    assert out.loss.isfinite() and out.terms[TRIPLET_TERM[method]] == 0
    assert all(p.grad is not None for p in head_parameters(model))


@pytest.mark.parametrize("method", TRIPLET_TERM)
def test_rows_without_labels_leave_the_loss_finite(method: str, tmp_path: Path) -> None:
    batch = rows_of()
    labels = batch["labels"].clone()
    labels[[2, 7]] = 0
    for given in (labels, torch.zeros_like(labels)):
        model = build(method, str(tmp_path))
        out = model(Batch({**batch, "labels": given}), START)
        out.loss.backward()
        assert out.loss.isfinite()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in head_parameters(model))
