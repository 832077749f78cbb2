"""ONNX networks give the codes of the evaluation, for any number of rows, with nothing of this library around them."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.registry import MODELS
from runners.encoder import Encoder
from runners.search.engine import KINDS
from tests.checkpoints import configured, saved
from tests.commands import refused, run

onnxruntime = pytest.importorskip("onnxruntime", reason="pip install -r requirements-onnx.txt")
METHODS = [name for name in MODELS.names() if name != "CLIP"]  # it names no backbone in its settings


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_networks_give_the_evaluations_codes(method: str, tmp_path: Path, tiny_overrides: list[str]) -> None:
    *_, query, _ = saved(configured(method, tiny_overrides), tmp_path / "best.pt")
    code, _, err = run("--export", tmp_path / "best.pt", "--save-dir", tmp_path / "onnx")
    assert code == 0, err
    described = json.loads((tmp_path / "onnx/model.json").read_text())
    assert described["bits"] == 16 and sorted(path.name for path in (tmp_path / "onnx").iterdir()) == [
        "image.onnx",
        "model.json",
        "text.onnx",
    ]
    for kind in KINDS:
        part = described[kind]
        assert part["checked"]["bits_that_differ"] == 0 and part["checked"]["rows"] == len(query.labels)
        session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / part["file"]))
        (given,), (made,) = session.get_inputs(), session.get_outputs()
        assert (given.name, made.name) == (part["input"]["name"], part["output"]["name"])
        assert given.shape[1:] == part["input"]["shape"][1:] and made.shape[1:] == part["output"]["shape"][1:]
        assert isinstance(given.shape[0], str), "the number of rows is free"
        assert given.type == {"float32": "tensor(float)", "int64": "tensor(int64)"}[part["input"]["type"]]


@pytest.mark.slow
def test_a_picture_by_its_description_alone(tmp_path: Path, tiny_overrides: list[str]) -> None:
    """What `model.json` says is enough to feed the network; --input names what is compared."""
    dataset, *_ = saved(configured("DSPH", tiny_overrides), tmp_path / "best.pt")
    files = list(dataset.pictures.files() or ())[:3]
    (tmp_path / "lines.txt").write_text("a red heart\na dog\n")
    code, _, err = run(
        "--export", tmp_path / "best.pt", "--save-dir", tmp_path / "onnx",
        "--input", *files, tmp_path / "lines.txt",
    )  # fmt: skip
    assert code == 0, err
    described = json.loads((tmp_path / "onnx/model.json").read_text())
    assert (described["image"]["checked"]["rows"], described["text"]["checked"]["rows"]) == (3, 2)
    picture = described["image"]["picture"]
    size, normalisation = picture["size"], picture["normalisation"]
    small = Image.open(files[0]).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    pixels = (np.asarray(small) * normalisation["scale"] - normalisation["mean"]) / normalisation["std"]
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx/image.onnx"))
    (codes,) = session.run(None, {"image": pixels.astype(np.float32).transpose(2, 0, 1)[None]})
    assert np.array_equal(codes, Encoder.load(tmp_path / "best.pt", device="cpu").images(files[:1]).values)


def test_what_cannot_be_exported(tmp_path: Path, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path, target = tmp_path / "best.pt", tmp_path / "onnx"
    saved(configured("UCMFH", tiny_overrides, "model.missing=paired"), path)
    assert "image codes are made from image and text together, so there is no network of a picture alone" in refused(
        "--export", path, "--save-dir", target
    )
    assert "--export needs --save-dir" in refused("--export", path)
    dataset, *_ = saved(configured("DSPH", tiny_overrides), path)
    picture = (dataset.pictures.files() or [""])[0]
    assert "has no texts to compare codes of; name some, too" in refused(
        "--export", path, "--save-dir", target, "--input", picture
    )
    no_data = refused("--export", path, "--save-dir", target, f"dataset.root={tmp_path}/gone")
    assert "gone" in no_data and no_data.endswith("or name pictures and texts with --input")
    assert "takes the checkpoint as it is" in refused("--export", path, "--save-dir", target, "model.bits=32")
    target.mkdir()
    (target / "mine.txt").write_text("mine")
    assert "is there and not empty" in refused("--export", path, "--save-dir", target)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert "pip install -r requirements-onnx.txt" in refused("--export", path, "--save-dir", tmp_path / "other")
    assert not (tmp_path / "other").exists()
