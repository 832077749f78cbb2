"""TwDH: worked values in float64, tie bits, code lengths, imports."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common.checkpoint import Checkpoint
from common.config import load_config
from common.errors import UserError
from common.types import Progress
from models.blocks.center_files import write_centers
from models.blocks.hash_centers import HashCenters, hadamard, majority_codes, wrong_bits
from models.blocks.heads import pair_codes
from models.twdh import TwDH, TwDHConfig
from runners.setup import load_weights
from tests.tiny_models import CLASSES, SHAPE, build, data_info, rows_of, section
from tests.worked import filled, multi_hot, wave

START = Progress(epoch=0, epochs=1, step=0, steps_per_epoch=1)
DOUBLE = torch.float64
ROOT = Path(__file__).parents[1]
SMALL: dict[str, Any] = {"bits": 16, "short_bits": [16, 8], "long_bits": 64}


def small(cache: Path, **overrides: Any) -> TwDH:
    """TwDH on the tiny CLIP: 64 bits, and 8 and 16."""
    model = build("TwDH", str(cache), **{**SMALL, **overrides})
    assert isinstance(model, TwDH)
    return model


# ---------------------------------------------------------------------------------------------- worked values


def worked_model() -> TwDH:
    """Features of width 16, 8 long bits and 4 short ones, 5 classes, in float64."""
    width, bits = 16, 8
    layers: dict[str, tuple[int, ...]] = {
        "atten.in_proj_weight": (3 * width, width),
        "atten.in_proj_bias": (3 * width,),
        "atten.out_proj.weight": (width, width),
        "atten.out_proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
        "fc2.weight": (2 * bits, width),
        "fc2.bias": (2 * bits,),
    }
    shapes = {f"{head}_hash.{name}": shape for head in ("img", "txt") for name, shape in layers.items()}
    heads = TwDH.import_reference(filled(shapes, norms=("txt_hash.norm",), dtype=DOUBLE))
    data = data_info(rows_of(), "unused")
    data = replace(data, backbone=replace(data.clip, shape=replace(SHAPE, embed_dim=width)))
    values = {"bits": 4, "long_bits": bits, "short_bits": [4], "quantization_weight": 0.5, "low_rate": 0.25}
    model = TwDH(TwDHConfig.model_validate(section("TwDH", **values)), data).double()
    assert heads.keys() <= model.state_dict().keys()
    centers = {
        "long_centers": hadamard(bits)[1:6],
        "short_centers_4": wave(0.3, 5, 4).sign(),
        "transform_4": wave(0.2, 16, 8, DOUBLE),
    }
    model.load_state_dict({**model.state_dict(), **heads, **centers})
    return model


def worked_pairs(model: TwDH) -> tuple[Tensor, Tensor]:
    """Long pairs of both modalities, [4, 16]; the image head's norm is in training mode."""
    model.train()
    return model.image_head(wave(0.1, 4, 16, DOUBLE)), model.text_head(wave(0.6, 4, 16, DOUBLE))


@torch.no_grad()
def test_worked_pairs() -> None:
    model = worked_model()
    image, text = worked_pairs(model)
    assert float(image.sum()) == pytest.approx(32, abs=1e-9)
    assert float(image.square().sum()) == pytest.approx(16.005252894, abs=2e-9)
    assert image[0, :3].tolist() == pytest.approx([0.510290415, 0.489709585, 0.515374546], abs=1e-9)
    assert float(text.square().sum()) == pytest.approx(16.127539452, abs=2e-9)
    assert text[0, :3].tolist() == pytest.approx([0.437752469, 0.562247531, 0.510925698], abs=1e-9)
    image, text = model.shorten(image, 4), model.shorten(text, 4)
    assert image.shape == (4, 8) and image.dtype == DOUBLE
    assert float(image.square().sum()) == pytest.approx(8.611214235, abs=2e-9)
    assert image[0, :2].tolist() == pytest.approx([0.599254410, 0.400745590], abs=1e-9)
    assert float(text.square().sum()) == pytest.approx(8.690478048, abs=2e-9)
    assert text[0, :2].tolist() == pytest.approx([0.647247555, 0.352752445], abs=1e-9)


def test_worked_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    model, labels = worked_model(), multi_hot(4, 5)
    monkeypatch.setattr(model, "draw_ties", torch.ones)
    assert pair_codes(model.target_pairs(labels, "long_centers")).tolist() == [
        [1, 1, 1, 1, 1, -1, 1, -1],
        [1, 1, -1, 1, 1, -1, -1, -1],
        [1, -1, -1, 1, 1, -1, -1, 1],
        [1, 1, 1, 1, -1, -1, -1, -1],
    ]
    short = [[1, 1, 1, 1], [1, -1, -1, -1], [1, -1, -1, -1], [1, -1, -1, 1]]
    assert pair_codes(model.target_pairs(labels, "short_centers_4")).tolist() == short


def test_worked_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    model = worked_model()
    monkeypatch.setattr(model, "draw_ties", torch.ones)
    out = model.objective(*worked_pairs(model), multi_hot(4, 5))
    wanted = {
        "center_image": 0.700813263,
        "center_text": 0.704289160,
        "quantization_image": 0.999671694,
        "quantization_text": 0.992028784,
        "center_4": 0.776180849,
        "quantization_4": 0.918644232,
    }
    assert {name: term.item() for name, term in out.terms.items()} == pytest.approx(wanted, abs=1e-9)
    assert out.loss.item() == pytest.approx(1.624182601, abs=1e-9)


@pytest.mark.parametrize("path", sorted((ROOT / "tests/golden").glob("TwDH-*.npz")), ids=lambda path: path.stem)
def test_targets_of_the_golden_cases(path: Path) -> None:
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files if name.startswith("in/")}
        shorts = json.loads(str(file["cfg"]))["shorts"]
    centers = {"long": arrays["in/long_center"], **{str(bits): arrays[f"in/short_center/{bits}"] for bits in shorts}}
    for name, codes in centers.items():
        found = majority_codes(arrays["in/label"], codes, arrays[f"in/random_center/{name}"])
        assert torch.equal(found, arrays[f"in/target/{name}"])


# ---------------------------------------------------------------------------------------------- draws, codes


def test_ties_are_signs_drawn_anew_from_the_global_generator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(tmp_path)
    torch.manual_seed(3)
    first, second = model.draw_ties(500), model.draw_ties(500)
    torch.manual_seed(3)
    assert torch.equal(model.draw_ties(500), first) and not torch.equal(first, second)
    assert torch.equal(first.abs(), torch.ones_like(first)) and abs(float(first.double().mean())) < 0.15
    drawn: list[int] = []
    draw = model.draw_ties

    def recorded(bits: int) -> Tensor:
        drawn.append(bits)
        return draw(bits)

    monkeypatch.setattr(model, "draw_ties", recorded)
    model(rows_of(), START)
    assert drawn == [64, 8, 16]  # once a batch: the long code, then the short ones, ascending


@pytest.mark.parametrize(("bits", "lengths"), [(16, (16, 8, 64)), (8, (8, 16, 64))])
def test_all_lengths_stand_side_by_side(tmp_path: Path, bits: int, lengths: tuple[int, ...]) -> None:
    model = small(tmp_path, bits=bits).eval()
    assert isinstance(model, TwDH) and model.code_lengths == lengths
    with torch.no_grad():
        pairs = model.image_head(model.backbone.image_features(rows_of()["image"]))
        codes = dict(zip(lengths, torch.split(model.encode_image(rows_of()), list(lengths), dim=1), strict=True))
        assert torch.equal(codes[64], pair_codes(pairs))
        for short in (8, 16):
            minus, plus = (pairs @ model.get_buffer(f"transform_{short}")).view(11, -1, 2).unbind(-1)
            assert torch.equal(codes[short], (plus > minus).float() * 2 - 1)
    assert any("relevant" in mark and "mAP@5000" in mark for mark in model.marks)
    assert any("64-bit" in mark and "closed form" in mark for mark in model.marks)


def test_perfect_long_codes_give_the_short_centers(tmp_path: Path) -> None:
    model = small(tmp_path)
    for bits in (8, 16):
        long, short = model.get_buffer("long_centers"), model.get_buffer(f"short_centers_{bits}")
        assert wrong_bits(model.get_buffer(f"transform_{bits}"), long, short) == 0


# ---------------------------------------------------------------------------------------------- options


def test_low_rate_weighs_everything_about_short_codes(tmp_path: Path) -> None:
    losses, terms = [], {}
    for rate in (0.0, 0.3):
        model = small(tmp_path, low_rate=rate)
        torch.manual_seed(1)
        out = model(rows_of(), START)
        losses.append(out.loss.item())
        terms = {name: value.item() for name, value in out.terms.items()}
    short = sum(terms[f"{name}_{bits}"] for name in ("center", "quantization") for bits in (8, 16))
    assert losses[1] - losses[0] == pytest.approx(0.3 * short, rel=1e-4)


def test_centers_do_not_follow_the_seed_of_the_run(tmp_path: Path) -> None:
    one, other = small(tmp_path), small(tmp_path, center_seed=5)
    assert torch.equal(one.get_buffer("long_centers"), small(tmp_path).get_buffer("long_centers"))
    assert not torch.equal(one.get_buffer("long_centers"), other.get_buffer("long_centers"))
    data = replace(data_info(rows_of(), str(tmp_path)), seed=99)
    one.prepare(data)
    assert torch.equal(one.get_buffer("long_centers"), small(tmp_path).get_buffer("long_centers"))


def test_training_items_without_labels(tmp_path: Path) -> None:
    model = small(tmp_path)
    labels = rows_of()["labels"].clone()
    labels[[2, 7]] = 0
    data = replace(data_info(rows_of(), str(tmp_path)), train_labels=labels)
    with pytest.raises(UserError, match="2 of 11 training items have no label.*minus_one"):
        model.prepare(data)
    model = small(tmp_path, unlabelled="minus_one")
    model.prepare(data)
    assert torch.equal(
        pair_codes(model.target_pairs(labels, "long_centers"))[[2, 7]], -torch.ones(2, model.config.long_bits)
    )
    undecided = torch.full((11, 128), 0.5)
    assert model.objective(undecided, undecided, labels).loss.isfinite()


@pytest.mark.parametrize("name", ["coco", "mirflickr25k", "nuswide"])
def test_shipped_configs_follow_the_papers_protocol(name: str) -> None:
    config = load_config(ROOT / f"configs/TwDH/{name}.yaml")
    assert config.evaluate.cutoffs == [5000, "all"] and config.evaluate.definitions[0] == "relevant"
    assert config.dataset.augment and config.dataset.name == name and config.dataset.split.query == 5000
    assert (config.model.long_bits, config.run.batch_size, config.run.epochs, config.run.seed) == (512, 128, 100, 1814)


# ---------------------------------------------------------------------------------------------- reference checkpoints


def as_reference(state: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
    """The state as the authors' library or QinLab's saves it, without centres and transforms."""
    renamed = {}
    for name, value in state.items():
        if name.startswith(("long_", "short_", "transform_")):
            continue
        name = name.replace("_head.attention.", "_head.atten.").replace("_head.fc.", "_head.fc2.")
        name = name.replace("image_head.", "hash.img_hash.").replace("text_head.", "hash.txt_hash.")
        if layout == "QinLab":
            name = name.replace("backbone.", "clip.").removeprefix("hash.")
        renamed[name] = value
    if layout == "QinLab":
        for head in ("image_hash", "text_hash"):
            renamed |= {f"{head}.fc.weight": torch.zeros(64, SHAPE.embed_dim), f"{head}.fc.bias": torch.zeros(64)}
    return renamed


@pytest.mark.parametrize("layout", ["unified", "QinLab"])
def test_reference_checkpoints_take_the_centers_of_a_file(tmp_path: Path, layout: str) -> None:
    source = small(tmp_path).eval()
    assert isinstance(source, TwDH)
    for bits in (8, 16):  # no closed form
        source.get_buffer(f"transform_{bits}").normal_()
    centers, transforms = (
        {bits: source.get_buffer(f"{name}_{bits}") for bits in (8, 16)} for name in ("short_centers", "transform")
    )
    write_centers(tmp_path / "64.safetensors", HashCenters(source.get_buffer("long_centers"), centers, transforms), {})
    torch.nn.init.normal_(source.text_head.fc.weight)
    renamed = as_reference(source.state_dict(), layout)
    loaded = Checkpoint({}, renamed, path=Path("authors.pth"))
    imported = TwDH.import_reference(renamed)

    model = small(tmp_path, centers="file", transform="file", center_folder=str(tmp_path)).eval()
    with torch.no_grad():
        assert not torch.equal(model.encode_text(rows_of()), source.encode_text(rows_of()))
        load_weights(model, {"": imported}, loaded)
        assert torch.equal(model.encode_image(rows_of()), source.encode_image(rows_of()))
        assert torch.equal(model.encode_text(rows_of()), source.encode_text(rows_of()))
    assert torch.equal(model.get_buffer("long_centers"), source.get_buffer("long_centers"))

    with pytest.raises(UserError, match="no hash centres.*convert_twdh_centers.py"):
        load_weights(small(tmp_path), {"": imported}, loaded)
    with pytest.raises(UserError, match="does not fit TwDH with 16 bits"):
        load_weights(small(tmp_path, long_bits=32), {"": imported}, loaded)


def test_own_state_brings_its_centers(tmp_path: Path) -> None:
    source, model = small(tmp_path), small(tmp_path, center_seed=8)
    model.load_state_dict(source.state_dict())
    assert torch.equal(model.get_buffer("transform_16"), source.get_buffer("transform_16"))
    assert model.get_buffer("long_centers").shape == (CLASSES, 64)
