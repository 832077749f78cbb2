"""Weight files that are none, or not of a CLIP: each is refused in a line, and nothing in them runs."""

import os
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.errors import UserError
from models.clip.formats import shape_of
from models.clip.towers import CLIP
from models.clip.weights import read_clip, write_clip
from tests.clip_files import SHAPE, Archive, State, openai_state, refuse, write_archive


@pytest.fixture(scope="module")
def state() -> State:
    return openai_state()


def test_missing_tensor_is_named_with_its_likeness(tmp_path: Path, state: State) -> None:
    content = dict(state)
    content["ln_finale.weight"] = content.pop("ln_final.weight")
    torch.save(content, tmp_path / "clip.pt")
    refuse(tmp_path / "clip.pt", "1 tensors are missing, ln_final.weight", "'ln_finale.weight'")
    content.pop("text_projection")
    torch.save(content, tmp_path / "clip.pt")
    refuse(tmp_path / "clip.pt", "missing", "text_projection")


def test_part_of_another_architecture(tmp_path: Path, state: State) -> None:
    torch.save({**state, "visual.transformer.resblocks.0.ls_1.gamma": torch.ones(128)}, tmp_path / "clip.pt")
    refuse(tmp_path / "clip.pt", "ls_1.gamma has no place in a CLIP")


def test_tensor_of_another_size(tmp_path: Path, state: State) -> None:
    torch.save({**state, "ln_final.bias": torch.ones(65)}, tmp_path / "clip.pt")
    refuse(tmp_path / "clip.pt", "ln_final.bias is torch.float32 of shape [65]", "[64]")


@pytest.mark.parametrize(
    ("name", "value", "part"),
    [
        ("visual.conv1.weight", torch.ones(96, 3, 8, 8), "the image tower is 96 wide"),
        ("visual.conv1.weight", torch.ones(1280, 3, 8, 8), "the image tower is 1280 wide"),
        ("visual.conv1.weight", torch.ones(128, 3), "visual.conv1.weight has the shape [128, 3]"),
        ("visual.positional_embedding", torch.ones(9, 128), "9 positions of the image tower"),
        ("visual.conv1.weight", torch.ones(128, 3, 0, 0), "visual.conv1.weight has the shape [128, 3, 0, 0]"),
        ("positional_embedding", torch.ones(0, 64), "positional_embedding has the shape [0, 64]"),
        ("token_embedding.weight", torch.ones(0, 64), "token_embedding.weight has the shape [0, 64]"),
        ("text_projection", torch.ones(64, 0), "text_projection has the shape [64, 0]"),
    ],
)
def test_sizes_that_are_no_clip(tmp_path: Path, state: State, name: str, value: Tensor, part: str) -> None:
    torch.save({**state, name: value}, tmp_path / "clip.pt")
    refuse(tmp_path / "clip.pt", part)


def test_blocks_beyond_any_clip(tmp_path: Path, state: State) -> None:
    """A name for each costs a file nothing, building them costs minutes."""
    blocks = {f"visual.transformer.resblocks.{number}.x": torch.ones(1) for number in range(100)}
    torch.save({**state, **blocks}, tmp_path / "clip.pt")
    refuse(tmp_path / "clip.pt", "the image tower has 100 blocks, ViT-L has 24")


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float64])
def test_values_that_float32_does_not_hold(tmp_path: Path, state: State, kind: torch.dtype) -> None:
    """Whatever the type: it is the weights as they are computed with that must be finite."""
    good = {name: value.to(kind) for name, value in state.items()}
    torch.save(good, tmp_path / "clip.pt")
    assert read_clip(tmp_path / "clip.pt").shape == SHAPE
    bad = torch.full((64,), 1e300 if kind == torch.float64 else float("nan"), dtype=torch.float64).to(kind)
    torch.save({**good, "ln_final.bias": bad}, tmp_path / "clip.pt")
    refuse(tmp_path / "clip.pt", "ln_final.bias holds 64 values that are not finite")


@pytest.mark.parametrize("form", ["clip.pt", "clip.safetensors"])
def test_names_that_no_terminal_should_see(tmp_path: Path, state: State, form: str) -> None:
    content = {**state, "a\n\x1b[31m": torch.ones(1)}
    if form == "clip.pt":
        torch.save(content, tmp_path / form)
    else:
        write_clip(tmp_path / form, content, {})
    refuse(tmp_path / form, r"a tensor is called 'a\n\x1b[31m'")
    torch.save({**state, "a" * 5000: torch.ones(1)}, tmp_path / "long.pt")
    refuse(tmp_path / "long.pt", "a tensor is called 'aaa", "5,000 characters")


def test_resnet_is_said_plainly(tmp_path: Path, state: State) -> None:
    content = {name: value for name, value in state.items() if not name.startswith("visual.")}
    content["visual.conv1.weight"] = torch.ones(32, 3, 3, 3)
    content["visual.layer1.0.conv1.weight"] = torch.ones(64, 32, 1, 1)
    torch.save(content, tmp_path / "RN50.pt")
    refuse(tmp_path / "RN50.pt", "image tower is a ResNet", "ViT-B/32")


def test_other_models_and_two_models(tmp_path: Path, state: State) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "linear.pt")
    refuse(tmp_path / "linear.pt", "not a CLIP", "2 tensors (weight, bias)")
    torch.save([1, 2], tmp_path / "list.pt")
    refuse(tmp_path / "list.pt", "holds a list, not a state dict")
    twice = {f"{model}.{name}": value for model in ("student", "teacher") for name, value in state.items()}
    torch.save(twice, tmp_path / "two.pt")
    refuse(tmp_path / "two.pt", "holds 2 image towers", "student.", "teacher.")


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    for name, content in (("empty.pt", b""), ("page.pt", b"<html>404</html>"), ("text.bin", b"not a weight file")):
        (tmp_path / name).write_bytes(content)
        refuse(tmp_path / name, "not a weight file")
    refuse(tmp_path / "nowhere.pt", "cannot be read (No such file or directory)")
    refuse(tmp_path, "no regular file")
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("a.txt", "a")
    refuse(tmp_path / "photos.zip", "truncated or damaged")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("form", ["archive.pt", "zip.pt", "legacy.pt", "clip.safetensors"])
def test_truncated_anywhere(tmp_path: Path, state: State, form: str) -> None:
    path = tmp_path / form
    if form == "archive.pt":
        write_archive(path, Archive(state), traced=True)
    elif form == "clip.safetensors":
        write_clip(path, state, {})
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip.pt")
    whole = path.read_bytes()
    for share in (0.0001, 0.01, 0.3, 0.9, 0.9999):
        path.write_bytes(whole[: max(16, int(len(whole) * share))])
        refuse(path, *(() if form == "legacy.pt" else ("truncated or damaged",)))  # half a name may look like code


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_archive_with_damaged_pickle_never_escapes_as_another_error(tmp_path: Path, state: State) -> None:
    write_archive(tmp_path / "clip.pt", Archive({"logit_scale": state["logit_scale"]}), traced=True)
    with zipfile.ZipFile(tmp_path / "clip.pt") as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    (data,) = (name for name in entries if name.endswith("/data.pkl"))
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        damaged = bytearray(entries[data])
        for place in torch.randint(len(damaged), (2,), generator=generator).tolist():
            damaged[place] = int(torch.randint(256, (1,), generator=generator))
        repack(tmp_path / "damaged.pt", {**entries, data: bytes(damaged)})
        with pytest.raises(UserError):
            read_clip(tmp_path / "damaged.pt")


def repack(path: Path, entries: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


class Malice:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("form", ["archive", "zip", "legacy", "pickle"])
def test_malicious_pickle_is_refused_and_named(tmp_path: Path, state: State, form: str) -> None:
    canary, path = tmp_path / "canary", tmp_path / "clip.pt"
    content = {**state, "extra": Malice(canary)}
    if form == "archive":
        entries = {"clip/constants.pkl": b"", "clip/data.pkl": pickle.dumps(Malice(canary), protocol=2)}
        repack(path, entries)
    elif form == "pickle":
        path.write_bytes(pickle.dumps(Malice(canary), protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    refuse(path, f"refused: its pickle asks for {os.mkdir.__module__}.mkdir", "not weights")
    assert not canary.exists()


@pytest.mark.parametrize(
    "call",
    [b"cbuiltins\neval\n", b"cos\nsystem\n", b"ctorch\nload\n", b"ctorch._utils\n_rebuild_qtensor\n", b"c__torch\nA\n"],
)
def test_archive_admits_nothing_but_tensors(tmp_path: Path, call: bytes) -> None:
    repack(tmp_path / "clip.pt", {"a/constants.pkl": b"", "a/data.pkl": b"\x80\x02" + call + b"(X\x01\x00\x00\x001tR."})
    refuse(tmp_path / "clip.pt", f"asks for {call[1:-1].decode().replace(chr(10), '.')}")


def test_archive_cannot_read_beyond_a_storage(tmp_path: Path) -> None:
    attack = (
        b"\x80\x02c__torch__\nM\n)\x81}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n"
        b"((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x02tQ"
        b"K\x00(M\x00\x10t(K\x01t\x89NtRsb."
    )
    repack(tmp_path / "clip.pt", {"a/constants.pkl": b"", "a/data.pkl": attack, "a/data/0": bytes(8)})
    refuse(tmp_path / "clip.pt", "truncated or damaged", "storage")


def test_activation_that_is_unknown_or_unreadable(tmp_path: Path, state: State) -> None:
    torch.save(state, tmp_path / "clip.pt")
    for description in ("{}", "[" * 100_000, '{"model_cfg": {"quick_gelu": "false"}}'):
        (tmp_path / "open_clip_config.json").write_text(description)
        refuse(tmp_path / "clip.pt", "open_clip_config.json beside it does not describe a CLIP")
    for activation in ("relu", "a\nb"):
        write_clip(tmp_path / "clip.safetensors", state, {"activation": activation})
        refuse(tmp_path / "clip.safetensors", f"activation {activation!r} is not known")


def test_unwritable_folder(tmp_path: Path, state: State) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        write_clip(tmp_path / "nowhere" / "clip.safetensors", state, {})


def test_shape_of_needs_its_tensors(state: State) -> None:
    assert shape_of(state) == SHAPE
    assert shape_of(CLIP(replace(SHAPE, vision_layers=0, text_layers=1)).state_dict()).text_layers == 1
    with pytest.raises(UserError, match="5 tensors are missing"):
        shape_of({})
