"""The CLIP that is trained from scratch: its loss, its sizes, and its weights as a backbone for others."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import ValidationError
from torch import Tensor, nn

from common.errors import UserError
from common.registry import MODELS
from common.types import Batch, DataInfo, Progress
from models.base import HashingModel
from models.clip.towers import CLIP
from models.clip.weights import read_clip, write_clip
from models.clip_pretraining import ContrastivePretraining, export_clip

YAML = Path(__file__).parent.parent / "configs" / "CLIP" / "config.yaml"
TINY = {
    "bits": 32,
    "embed_dim": 32,
    "image_size": 16,
    "patch_size": 8,
    "vision_width": 64,
    "vision_layers": 1,
    "text_width": 64,
    "text_layers": 1,
    "context_length": 12,
    "vocabulary": 50,
}
START = Progress(epoch=0, epochs=1, step=0, steps_per_epoch=1)


def settings(**changes: Any) -> ContrastivePretraining.Config:
    values = yaml.safe_load(YAML.read_text())["model"]
    return ContrastivePretraining.Config.model_validate({**values, **TINY, **changes})


def build(**changes: Any) -> ContrastivePretraining:
    torch.manual_seed(0)
    data = DataInfo(num_train=6, field_shapes={}, train_labels=None, backbone=None, seed=0, cache_dir="")
    return ContrastivePretraining(settings(**changes), data)


def pairs(rows: int) -> Batch:
    generator = torch.Generator().manual_seed(1)
    text = torch.zeros(rows, 8, dtype=torch.int64)
    text[:, 0], text[:, 4] = 48, 49
    text[:, 1:4] = torch.randint(1, 48, (rows, 3), generator=generator)
    return Batch(
        {"index": torch.arange(rows), "image": torch.randn(rows, 3, 16, 16, generator=generator), "text": text}
    )


def test_is_registered_and_its_config_holds_every_size() -> None:
    assert MODELS.get("CLIP") is ContrastivePretraining
    values = yaml.safe_load(YAML.read_text())["model"]
    shape = ContrastivePretraining.Config.model_validate(values).shape
    for name in ("embed_dim", "image_size", "patch_size", "vision_width", "text_layers", "vocabulary"):
        assert getattr(shape, name) == values[name]
    assert shape.activation == "quick_gelu"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 16}, "bits must equal embed_dim 32"),
        ({"patch_size": 5}, "patch_size must divide image_size 16"),
        ({"vision_width": 96}, "multiple of 64"),
        ({"text_layers": 0}, "greater than 0"),
        ({"temperature": 0.0}, "greater than 0"),
    ],
)
def test_sizes_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        settings(**changes)


def test_loss_is_the_mean_of_both_cross_entropies() -> None:
    model = build()
    batch = pairs(5)
    out = model(batch, START)
    image = nn.functional.normalize(model.backbone.image_features(batch["image"]))
    text = nn.functional.normalize(model.backbone.text_features(batch["text"]))
    logits = image @ text.T / 0.07
    answer = torch.arange(5)
    expected = (nn.functional.cross_entropy(logits, answer) + nn.functional.cross_entropy(logits.T, answer)) / 2
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(out.terms["contrast"], expected)
    assert out.terms["logit_scale"].item() == pytest.approx(1 / 0.07)


def test_logit_scale_is_bounded() -> None:
    model = build()
    nn.init.constant_(model.backbone.logit_scale, 9.0)
    assert model(pairs(3), START).terms["logit_scale"].item() == pytest.approx(100)


@pytest.mark.parametrize("rows", [1, 4])
def test_every_parameter_gets_a_gradient_and_stands_in_a_group(rows: int) -> None:
    model = build()
    torch.autograd.backward(model(pairs(rows), START).loss)
    parameters = dict(model.named_parameters())
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in parameters.values())
    (group,) = model.param_groups()["main"].values()
    assert {id(p) for p in group} == {id(p) for p in parameters.values()}


def test_learns_the_pairs_it_sees() -> None:
    model = build()
    batch = pairs(6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    first = model(batch, START).loss.item()
    for _ in range(100):
        optimizer.zero_grad()
        torch.autograd.backward(model(batch, START).loss)
        optimizer.step()
    assert first > 1.5
    assert model(batch, START).loss.item() < 0.1


def test_bf16_moves_the_loss_little() -> None:
    model, batch = build(), pairs(6)
    exact = model(batch, START).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(batch, START).loss
    assert rough.dtype == torch.float32
    assert rough.item() == pytest.approx(exact.item(), rel=0.03)


def test_codes_are_signs_of_the_embedding() -> None:
    model, batch = build(), pairs(4)
    for codes, features in (
        (model.encode_image(batch), model.backbone.image_features(batch["image"])),
        (model.encode_text(batch), model.backbone.text_features(batch["text"])),
    ):
        assert codes.shape == (4, 32)
        assert codes.dtype == torch.float32
        assert torch.equal(codes, torch.where(features >= 0, 1.0, -1.0))


def test_exported_weights_are_a_backbone_under_openais_names(tmp_path: Path) -> None:
    model, batch = build(), pairs(3)
    weights = export_clip(model)
    write_clip(tmp_path / "weights.safetensors", weights, {"source": "test"})
    backbone = read_clip(tmp_path / "weights.safetensors")
    assert backbone.shape == model.backbone.shape
    assert backbone.weights is not None
    other = CLIP(backbone.shape)
    other.load_state_dict(dict(backbone.weights))
    assert torch.equal(other.text_features(batch["text"]), model.backbone.text_features(batch["text"]))
    nn.init.zeros_(model.backbone.text_projection)
    assert weights["text_projection"].any()  # a copy


def test_export_of_a_model_without_clip() -> None:
    class Other(HashingModel):
        fields = frozenset({"image"})

        def training_step(self, batch: Batch, progress: Progress) -> Any:
            raise NotImplementedError

        def encode_image(self, batch: Batch) -> Tensor:
            raise NotImplementedError

        def encode_text(self, batch: Batch) -> Tensor:
            raise NotImplementedError

        def param_groups(self) -> Any:
            raise NotImplementedError

    data = DataInfo(num_train=1, field_shapes={}, train_labels=None, backbone=None, seed=0, cache_dir="")
    with pytest.raises(UserError, match="Other trains no CLIP"):
        export_clip(Other(settings(), data))


def test_shape_of_the_config_is_the_models() -> None:
    assert build(text_layers=2).backbone.shape == replace(settings().shape, text_layers=2)
