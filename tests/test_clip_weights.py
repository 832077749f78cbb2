"""Weight files of CLIP: every form, of OpenAI and of other libraries, is read equal."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import safetensors
import safetensors.torch
import torch
import transformers
from torch import Tensor, nn

from common.tensor_files import checksum
from models.clip.towers import CLIP
from models.clip.weights import read_clip, write_clip
from tests.clip_files import SHAPE, Archive, State, openai_state, read_equal, refuse, write_archive


@pytest.fixture(scope="module")
def state() -> State:
    return openai_state()


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(1, 98, (3, 20))
    ids[:, 0] = 98
    for row, end in enumerate((5, 19, 1)):
        ids[row, end] = 99
        ids[row, end + 1 :] = 0
    return torch.randn(3, 3, 24, 24), ids


def features(path: Path, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    backbone = read_clip(path)
    model = CLIP(backbone.shape)
    assert backbone.weights is not None
    model.load_state_dict(dict(backbone.weights))
    with torch.no_grad():
        return model.image_features(batch[0]), model.text_features(batch[1])


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("traced", [True, False], ids=["traced", "scripted"])
@pytest.mark.parametrize("half", [True, False], ids=["half", "float"])
def test_torchscript_archive(tmp_path: Path, state: State, traced: bool, half: bool) -> None:
    module = Archive(state)
    write_archive(tmp_path / "clip.pt", module.half() if half else module, traced)
    read_equal(tmp_path / "clip.pt", state, "TorchScript archive, OpenAI names")


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"epoch": 3, "state_dict": s}], ids=["plain", "wrapped"])
@pytest.mark.parametrize("prefix", ["", "module.", "clip.", "module.backbone."])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_state_dict(tmp_path: Path, state: State, wrap: Callable[[State], Any], prefix: str, legacy: bool) -> None:
    content = {prefix + name: value.half() for name, value in state.items()}
    if prefix:
        content["head.weight"] = torch.ones(3)  # of the model around the CLIP
    content |= {f"{prefix}input_resolution": torch.tensor(24), f"{prefix}transformer.attn_mask": torch.ones(2, 2)}
    torch.save(wrap(content), tmp_path / "clip.pt", _use_new_zipfile_serialization=not legacy)
    read_equal(tmp_path / "clip.pt", state, "state dict, OpenAI names")


def test_float32_is_not_rounded(tmp_path: Path) -> None:
    torch.manual_seed(2)
    state = CLIP(SHAPE).state_dict()
    torch.save(state, tmp_path / "clip.pt")
    read_equal(tmp_path / "clip.pt", state, "state dict")


def test_own_safetensors_round_trip_with_metadata(tmp_path: Path, state: State) -> None:
    path = tmp_path / "clip.safetensors"
    write_clip(path, state, {"trained_on": "openmoji"})
    read_equal(path, state, "safetensors, OpenAI names")
    with safetensors.safe_open(path, framework="pt") as opened:
        metadata = opened.metadata()
    assert metadata == {"activation": "quick_gelu", "trained_on": "openmoji", "checksum": checksum(state)}
    assert [entry.name for entry in tmp_path.iterdir()] == ["clip.safetensors"]
    content = bytearray(path.read_bytes())
    content[-5] ^= 1  # a bit of the last tensor
    path.write_bytes(content)
    refuse(path, "the checksum differs")


def test_says_what_it_read(tmp_path: Path, state: State, caplog: pytest.LogCaptureFixture) -> None:
    torch.save({name: value.half() for name, value in state.items()}, tmp_path / "clip.pt")
    with caplog.at_level(logging.INFO):
        read_clip(tmp_path / "clip.pt")
    (message,) = (record.getMessage() for record in caplog.records)
    for part in (
        "clip.pt: state dict, OpenAI names",
        f"{len(state)} tensors, float16",
        "24 px in patches of 8",
        "128 x 2",
    ):
        assert part in message


@pytest.mark.parametrize("quick_gelu", [True, False])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_open_clip_model(tmp_path: Path, batch: tuple[Tensor, Tensor], quick_gelu: bool, suffix: str) -> None:
    torch.manual_seed(3)
    vision = open_clip.model.CLIPVisionCfg(layers=2, width=128, head_width=64, patch_size=8, image_size=24)
    text = open_clip.model.CLIPTextCfg(context_length=20, vocab_size=100, width=64, heads=1, layers=3)
    model = open_clip.model.CLIP(32, vision, text, quick_gelu=quick_gelu)
    disturb(model)
    path = tmp_path / f"open_clip_model.{suffix}"
    if suffix == "pt":
        torch.save({"epoch": 1, "state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, path)
    else:
        safetensors.torch.save_file(model.state_dict(), path)
    if not quick_gelu:
        (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"embed_dim": 32}}))
    image, words = features(path, batch)
    with torch.no_grad():
        torch.testing.assert_close(image, model.encode_image(batch[0]), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(words, model.encode_text(batch[1]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("form", ["safetensors", "bin", "bin without its config"])
def test_hugging_face_model(tmp_path: Path, batch: tuple[Tensor, Tensor], activation: str, form: str) -> None:
    torch.manual_seed(4)
    towers: dict[str, Any] = {}
    for name, width, layers in (("text", 64, 3), ("vision", 128, 2)):
        towers[f"{name}_config"] = {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": width // 64,
            "hidden_act": activation,
        }
    towers["text_config"] |= {
        "vocab_size": 100,
        "max_position_embeddings": 20,
        "bos_token_id": 98,
        "eos_token_id": 99,
    }
    towers["vision_config"] |= {"image_size": 24, "patch_size": 8}
    model = transformers.CLIPModel(transformers.CLIPConfig(projection_dim=32, **towers))
    disturb(model)
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    if form != "safetensors":
        path = tmp_path / "pytorch_model.bin"
        torch.save(model.state_dict(), path)
    if form == "bin without its config":
        (tmp_path / "config.json").unlink()
    image, words = features(path, batch)
    with torch.no_grad():
        expected_image = model.visual_projection(model.vision_model(batch[0]).pooler_output)
        expected_words = model.text_projection(model.text_model(batch[1]).pooler_output)
    if form == "bin without its config" and activation == "gelu":  # nothing tells; the log says what was assumed
        assert (image - expected_image).abs().max() > 1e-4
        return
    torch.testing.assert_close(image, expected_image, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(words, expected_words, atol=1e-5, rtol=1e-5)


def disturb(model: nn.Module) -> None:
    """Moves every parameter a little, so that a forgotten bias or a swapped LayerNorm shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
