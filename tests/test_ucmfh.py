"""UCMFH: its layers against torch's, codes of the golden case without the batch, the contrast by a loop, marks."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.ucmfh import UCMFH, FusionLayer, pair_contrast
from tests.parity_cases import open_case
from tests.tiny_models import SMALL, build, pick, rows_of
from tests.worked import wave

GOLDEN = Path(__file__).parent / "golden" / "UCMFH-original-b16B8C24s3501.npz"


def ucmfh(cache: Path, **overrides: Any) -> UCMFH:
    model = build("UCMFH", str(cache), **{**SMALL["UCMFH"], **overrides})
    assert isinstance(model, UCMFH)
    return model


@pytest.mark.parametrize("across", [False, True])
def test_a_layer_is_torch_s(across: bool) -> None:
    torch.manual_seed(0)
    ours, theirs = FusionLayer(16, 4, 24, 0.0), torch.nn.TransformerEncoderLayer(16, 4, 24, 0.0)
    ours.load_state_dict(theirs.state_dict())
    tokens = wave(0.2, 5, 16, torch.float32)
    wanted = theirs(tokens) if across else theirs(tokens[None])[0]
    torch.testing.assert_close(ours(tokens, across), wanted)


def test_queries_and_keys_of_lone_tokens_get_no_gradient() -> None:
    layer = FusionLayer(16, 4, 24, 0.1)
    layer(wave(0.2, 5, 16, torch.float32), False).square().sum().backward()
    gradient = layer.self_attn.in_proj_weight.grad
    assert gradient is not None and not gradient[:32].any() and gradient[32:].any()


def test_dropout_of_attention_takes_whole_heads() -> None:
    torch.manual_seed(0)
    layer = FusionLayer(16, 4, 24, 0.5)
    torch.nn.init.eye_(layer.self_attn.out_proj.weight)
    values = layer.eval().alone(tokens := wave(0.2, 50, 16, torch.float32))
    ratio = (layer.train().alone(tokens) / values).view(50, 4, 4)
    torch.testing.assert_close(ratio, ratio[..., :1].expand_as(ratio))
    assert set(ratio[..., 0].detach().round().unique().tolist()) == {0.0, 2.0}


def test_codes_of_the_golden_case_alone() -> None:
    """The reference with sequences of one item, as it trains."""
    with np.load(GOLDEN) as file:
        case = open_case(json.loads(str(file["cfg"])), {name: file[name] for name in file.files})
    model = case.build().eval()
    assert isinstance(model, UCMFH)
    model.config = model.config.model_copy(update={"across_batch": False})
    with torch.no_grad():
        ours = case.outputs(model)
    for name, wanted in case.part("single/").items():
        if not name.startswith("after_"):
            torch.testing.assert_close(ours[f"out/{name}"], wanted, rtol=0, atol=5e-5)


def test_contrast_is_that_of_a_loop() -> None:
    image, text = wave(0.3, 4, 6, torch.float64), wave(0.8, 4, 6, torch.float64)
    rows = [row / row.norm() for row in [*image, *text]]
    total = 0.0
    for mine, row in enumerate(rows):
        scores = [float(row @ other) / 0.5 for other in rows]
        others = sum(math.exp(score) for place, score in enumerate(scores) if place != mine)
        total += math.log(others) - scores[(mine + 4) % 8]
    assert pair_contrast(image, text, 0.5).item() == pytest.approx(total / 8, abs=1e-12)
    assert pair_contrast(image[:1], text[:1], 0.5).item() == pytest.approx(0, abs=1e-12)


def test_what_a_code_sees_and_what_results_say_of_it(tmp_path: Path) -> None:
    rows = rows_of()
    alone = ucmfh(tmp_path).eval()
    assert alone.image_fields == {"image"} and alone.text_fields == {"text"} and not alone.marks
    paired = ucmfh(tmp_path, missing="paired").eval()
    assert paired.image_fields == paired.text_fields == {"image", "text"}
    assert len(paired.marks) == 1 and "do not report" in paired.marks[0]
    stored = alone.config.model_copy(update={"missing": "paired", "input": "features"})
    assert stored.reads(frozenset({"image"})) == {"image_feature", "text_feature"}
    across = ucmfh(tmp_path, missing="paired", across_batch=True).eval()
    assert len(across.marks) == 2
    with torch.no_grad():
        swapped = {**rows, "text": rows["text"].flip(0)}
        half = paired.fuse_batch(rows, "image")
        assert not torch.allclose(half, paired.fuse_batch(type(rows)(swapped), "image"))
        assert torch.equal(alone.fuse_batch(rows, "image"), alone.fuse_batch(type(rows)(swapped), "image"))
        few = pick(rows, slice(3))
        torch.testing.assert_close(paired.fuse_batch(few, "image"), half[:3])
        assert not torch.allclose(across.fuse_batch(few, "image"), across.fuse_batch(rows, "image")[:3], atol=1e-4)


def test_layers_start_equal(tmp_path: Path) -> None:
    first, second = (layer.state_dict() for layer in ucmfh(tmp_path).fusion)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
