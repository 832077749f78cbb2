"""Weight files of CLIP: every form is read equal, nothing in them runs, and fetching survives what networks do."""

import hashlib
import http.server
import json
import logging
import os
import pickle
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import open_clip
import pytest
import safetensors
import safetensors.torch
import torch
import transformers
from torch import Tensor, nn

import models.clip.weights as clip_weights
from common.errors import UserError
from common.tensor_files import checksum
from common.types import ClipShape
from models.clip.formats import shape_of
from models.clip.towers import CLIP
from models.clip.weights import is_config, open_backbone, read_clip, write_clip

SHAPE = ClipShape(
    embed_dim=32,
    image_size=24,
    patch_size=8,
    vision_width=128,
    vision_layers=2,
    text_width=64,
    text_layers=3,
    context_length=20,
    vocabulary=100,
)
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    torch.manual_seed(0)
    return {name: value.half().float() for name, value in CLIP(SHAPE).state_dict().items()}  # exact in half precision


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


def read_equal(path: Path, state: State, form: str) -> None:
    backbone = read_clip(path)
    assert backbone.weights is not None
    assert backbone.shape == SHAPE
    assert form in backbone.source
    assert backbone.weights.keys() == state.keys()
    for name, value in backbone.weights.items():
        assert value.dtype == torch.float32, name
        assert value.is_contiguous(), name
        assert torch.equal(value, state[name]), name


# ---------------------------------------------------------------------------------------------------------- forms


def module_of(state: State) -> nn.Module:
    """Modules nested as the names say, holding the tensors as parameters; scalars as OpenAI's archives have them."""
    root = nn.Module()
    for name, value in state.items():
        *path, last = name.split(".")
        node = root
        for part in path:
            if part not in node._modules:
                node.add_module(part, nn.Module())
            child = node._modules[part]
            assert child is not None
            node = child
        node.register_parameter(last, nn.Parameter(value.clone()))
    return root


class Archive(nn.Module):
    def __init__(self, state: State) -> None:
        super().__init__()
        for name, child in module_of(state).named_children():
            self.add_module(name, child)
        for name, value in state.items():
            if "." not in name:
                self.register_parameter(name, nn.Parameter(value.clone()))
        for name in ("input_resolution", "context_length", "vocab_size"):
            self.register_buffer(name, torch.tensor(7))
        self.sizes = [1, 2]

    def forward(self, x: Tensor) -> Tensor:
        return x * self.sizes[0]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def write_archive(path: Path, module: nn.Module, traced: bool) -> None:
    program = torch.jit.trace(module, torch.ones(2)) if traced else torch.jit.script(module)
    program.save(str(path))


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


# ----------------------------------------------------------------------------------------------- other libraries


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


# ------------------------------------------------------------------------------------------------------ bad files


def refuse(path: Path, *parts: str) -> None:
    with pytest.raises(UserError) as caught:
        read_clip(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    for part in parts:
        assert part in message, message


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
    ],
)
def test_sizes_that_are_no_clip(tmp_path: Path, state: State, name: str, value: Tensor, part: str) -> None:
    torch.save({**state, name: value}, tmp_path / "clip.pt")
    refuse(tmp_path / "clip.pt", part)


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
    (tmp_path / "open_clip_config.json").write_text("{}")
    refuse(tmp_path / "clip.pt", "open_clip_config.json beside it does not describe a CLIP")
    write_clip(tmp_path / "clip.safetensors", state, {"activation": "relu"})
    refuse(tmp_path / "clip.safetensors", "activation relu is not known")


def test_unwritable_folder(tmp_path: Path, state: State) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        write_clip(tmp_path / "nowhere" / "clip.safetensors", state, {})


def test_shape_of_needs_its_tensors(state: State) -> None:
    assert shape_of(state) == SHAPE
    assert shape_of(CLIP(replace(SHAPE, vision_layers=0, text_layers=1)).state_dict()).text_layers == 1
    with pytest.raises(UserError, match="5 tensors are missing"):
        shape_of({})


# ------------------------------------------------------------------------------------------------------- fetching


@dataclass
class Site:
    """A web server of one file, and what it should do wrong."""

    content: bytes
    ranges: bool = True  # whether it can send a part
    break_after: list[int] = field(default_factory=list)  # bytes after which to hang up, one entry a request
    requests: list[str] = field(default_factory=list)  # the Range header of every request
    url: str = ""


@pytest.fixture
def site(tmp_path: Path, state: State, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    write_clip(tmp_path / "source", state, {})
    served = Site((tmp_path / "source").read_bytes())
    digest = hashlib.sha256(served.content).hexdigest()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # noqa: N802 - http.server's name
            wanted = self.headers.get("Range", "")
            served.requests.append(wanted)
            if self.path != f"/{digest}/ViT-B-32.pt":
                self.send_error(404)
                return
            start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and served.ranges else 0
            if wanted and served.ranges and start >= len(served.content):
                self.send_error(416)
                return
            self.send_response(206 if wanted and served.ranges else 200)
            self.send_header("Content-Length", str(len(served.content) - start))
            self.end_headers()
            end = start + served.break_after.pop(0) if served.break_after else None
            self.wfile.write(served.content[start:end])

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    served.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setitem(clip_weights.OPENAI, "ViT-B/32", (digest, "ViT-B-32.pt"))
    monkeypatch.setenv("CLIP_WEIGHTS_URL", served.url + "/")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield served
    server.shutdown()
    thread.join()
    server.server_close()


def cached(tmp_path: Path) -> dict[str, int]:
    return {entry.name: entry.stat().st_size for entry in (tmp_path / "cache" / "clip").iterdir()}


def test_fetches_once_with_progress(
    tmp_path: Path, site: Site, state: State, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        backbone = open_backbone("ViT-B/32", str(tmp_path / "cache"))
        assert backbone.weights is not None
        assert torch.equal(backbone.weights["text_projection"], state["text_projection"])
    assert site.requests == [""]
    assert cached(tmp_path) == {"ViT-B-32.pt": len(site.content)}
    progress = capsys.readouterr().err
    assert "ViT-B-32.pt: 100%" in progress
    assert "B/s" in progress


def test_bad_digest_is_an_error_and_removed(tmp_path: Path, site: Site) -> None:
    site.content = bytes(len(site.content))
    with pytest.raises(UserError, match="another SHA-256 and was removed"):
        open_backbone("ViT-B/32", str(tmp_path / "cache"))
    assert cached(tmp_path) == {}


def test_cached_file_that_is_not_openais(tmp_path: Path, site: Site) -> None:
    path = tmp_path / "cache" / "clip" / "ViT-B-32.pt"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"by hand")
    with pytest.raises(UserError, match="is not OpenAI's file"):
        open_backbone("ViT-B/32", str(tmp_path / "cache"))
    assert path.exists()
    assert site.requests == []


@pytest.mark.parametrize("ranges", [True, False], ids=["resumes", "restarts"])
def test_interrupted_fetch_goes_on(tmp_path: Path, site: Site, ranges: bool) -> None:
    site.ranges, site.break_after = ranges, [1000, 5000]
    assert open_backbone("ViT-B/32", str(tmp_path / "cache")).shape == SHAPE
    assert site.requests == ["", "bytes=1000-", f"bytes={6000 if ranges else 5000}-"]
    assert cached(tmp_path) == {"ViT-B-32.pt": len(site.content)}


def test_fetch_that_stalls_keeps_its_part_for_the_next_run(tmp_path: Path, site: Site) -> None:
    site.break_after = [3000, 0]
    with pytest.raises(UserError, match="the next run goes on from there"):
        open_backbone("ViT-B/32", str(tmp_path / "cache"))
    assert cached(tmp_path) == {"ViT-B-32.pt.part": 3000}
    open_backbone("ViT-B/32", str(tmp_path / "cache"))
    assert site.requests == ["", "bytes=3000-", "bytes=3000-"]
    assert cached(tmp_path) == {"ViT-B-32.pt": len(site.content)}


def test_part_that_was_complete_or_is_wrong(tmp_path: Path, site: Site) -> None:
    part = tmp_path / "cache" / "clip" / "ViT-B-32.pt.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(site.content)
    open_backbone("ViT-B/32", str(tmp_path / "cache"))
    (part.parent / "ViT-B-32.pt").unlink()
    part.write_bytes(b"of another file")
    with pytest.raises(UserError, match="another SHA-256"):
        open_backbone("ViT-B/32", str(tmp_path / "cache"))
    assert cached(tmp_path) == {}


def test_offline_says_which_file_to_put_where(tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIP_WEIGHTS_URL", "http://127.0.0.1:9")  # nobody listens to the discard port
    with pytest.raises(UserError) as caught:
        open_backbone("ViT-B/32", str(tmp_path / "cache"))
    digest = clip_weights.OPENAI["ViT-B/32"][0]
    for part in (f"http://127.0.0.1:9/{digest}/ViT-B-32.pt", f"put it at {tmp_path}/cache/clip/ViT-B-32.pt", "refused"):
        assert part in str(caught.value)


def test_address_without_the_file(tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIP_WEIGHTS_URL", f"{site.url}/elsewhere")
    with pytest.raises(UserError, match="HTTP 404"):
        open_backbone("ViT-B/32", str(tmp_path / "cache"))


def _open_in_process(cache: str) -> int:
    logging.disable()
    return len(open_backbone("ViT-B/32", cache).weights or {})


def test_two_processes_fetch_once(tmp_path: Path, site: Site, state: State) -> None:
    with get_context("fork").Pool(2) as pool:  # forked: they share the patched table
        assert pool.map(_open_in_process, [str(tmp_path / "cache")] * 2) == [len(state)] * 2
    assert site.requests == [""]
    assert cached(tmp_path) == {"ViT-B-32.pt": len(site.content)}


def test_openais_digests_are_whole() -> None:
    for digest, file in clip_weights.OPENAI.values():
        assert len(digest) == 64 and int(digest, 16)
        assert file.endswith(".pt")


def test_names_of_backbones(tmp_path: Path) -> None:
    assert is_config("configs/CLIP/config.yaml") and is_config("a.YML")
    assert not is_config("ViT-B/32") and not is_config("clip.pt")
    with pytest.raises(UserError, match=r"neither a file nor a public name \(ViT-B/32, .*did you mean 'ViT-B/32'"):
        open_backbone("VIT-B-32", str(tmp_path))
    with pytest.raises(UserError, match="weights/clip.pt"):
        open_backbone("weights/clip.pt", str(tmp_path))
