"""`main.py --evaluate` of state dicts that the authors' code and the unified peer write."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from common.config import load_config
from common.registry import MODELS
from dataset.texts.tokenizer import VOCABULARY
from models.blocks.center_files import write_centers
from models.blocks.hash_centers import HashCenters
from models.clip.weights import write_clip
from runners.setup import encoded_splits, make_loader, open_dataset
from tests import tiny_data
from tests.commands import ROOT, refused, run
from tests.parity_cases import open_case
from tests.tiny_models import SMALL, build

GOLDEN = Path(__file__).parent / "golden"
CASES = [  # golden file, settings of its variant, start of the names that the authors do not save
    ("DCMHT-original-b16B8C24s1201", [], None),
    ("DCMHT-unified-b16B8C24s1101", ["model.head=unified"], None),
    ("MITH-original-b16B8C24s1301", [], None),
    ("MITH-unified-b16B8C24s1401", [], None),
    ("DSPH-original-b16B8C80s1601", [], "hyp."),
    ("DSPH-unified-b16B13C80s1501", [], None),  # proxies of 80 classes, for data of 4
    ("DNPH-original-b16B13C80s1801", [], "DNPH."),
    ("DNPH-unified-b16B8C24s1701", [], None),
    ("DDBH-qinlab-b16B8C24s3101", ["model.bits=16"], None),
    ("DNpH-qinlab-b16B8C24s3461", ["model.bits=16"], None),
    ("DNcH-qinlab-b16B8C24s3203", ["model.bits=16"], "cls2emb."),
    ("DDWSH-original-b16B8C24s3403", ["model.bits=16"], "criterion."),
    ("DGHDGH-original-b16B8C24s3201", ["model.bits=16"], "criterion."),
    ("DPSIH-original-b16B8C24s3301", ["model.bits=16"], None),
    ("DIMCH-unified-b64B13C80s2101", ["model.bits=64", "model.set_size=8"], None),
    (
        "UMoED-unified-b16B8C24s2202",
        ["model.set_size=8", "model.layers=2", "model.heads=8", "model.mixture={experts: 2, slots: 3}"],
        None,
    ),
]
HASH = (("image_head.", "hash.img_hash."), ("text_head.", "hash.txt_hash."))
CLIP = (("backbone.", "clip."),)  # the unified library renamed its backbone
SETS = (("image_head.", "hash.img_token_hash."), ("text_head.", "hash.txt_token_hash."), (".mix.", ".token_layer."),
        (".hidden.", ".hash_layer.0."), (".out.", ".hash_layer.3."))  # fmt: skip
GAN = (("backbone.", "ImgNet.clip_image_encode."), ("image.decoder.", "ImgNet.decoder."),
       ("text.decoder.", "TxtNet.decoder."))  # fmt: skip
LAYOUTS: dict[str, tuple[str, dict[str, object], tuple[tuple[str, str], ...], tuple[str, ...]]] = {
    # method, settings, parts of our names and theirs, our names that are not saved
    "DCMHT, linear": ("DCMHT", {"head": "linear"},
                      (*CLIP, ("image_head.", "image_hash."), ("text_head.", "text_hash.")), ()),
    "DCMHT, unified": ("DCMHT", {"head": "unified"},
                       (*CLIP, *HASH, ("_hash.attention.", "_hash.atten."), ("_hash.fc.", "_hash.fc2.")), ()),
    "DSPH": ("DSPH", {}, (*CLIP, ("_head.", "_hash.")), ("proxies.vectors",)),
    "DSPH, unified": ("DSPH", {}, (*HASH, ("proxies.vectors", "hyp.proxies")), ()),
    "DSPH, unified of old": ("DSPH", {}, (*CLIP, *HASH, ("proxies.vectors", "hyp.proxies")), ()),
    "DPBE": ("DPBE", {}, (*CLIP, ("_head.fc.", "_hash.0."), ("image_head.hessian", "hessian_i"),
                          ("text_head.hessian", "hessian_t")), ()),
    "DIMCH": ("DIMCH", {}, SETS, ()),
    "DIMCH of old": ("DIMCH", {}, (*CLIP, *SETS), ()),
    "CAGAN": ("CFRH", {}, (*GAN, ("image.encoder.", "ImgNet.hash_layer."), ("text.encoder.0.", "TxtNet.fc1."),
                           ("text.encoder.2.", "TxtNet.fc2.")), ()),
    "JDSH": ("CFRH", {}, (*GAN, ("image.encoder.", "ImgNet.fc_encode."), ("text.encoder.0.", "TxtNet.net.0."),
                          ("text.encoder.2.", "TxtNet.net.2.")), ()),
    "UCCH": ("UCCH", {**SMALL["UCCH"], "input": "features"},
             (("image_net.", "image_model_state_dict.fc."), ("text_net.", "text_model_state_dict.fc.")),
             ("memory.rows",)),
    "UCMFH": ("UCMFH", SMALL["UCMFH"],
              (("backbone.", "backbone."), ("fusion.", "FusionTransformer.transformerEncoder.layers."),
               ("image_head.", "ImageMlp."), ("text_head.", "TextMlp."), ("Mlp.hidden.", "Mlp.fc1."),
               ("Mlp.out.", "Mlp.tohash.")), ()),
}  # fmt: skip
TWDH, VTPH = "TwDH-unified-b16B8C24s2003", "VTPH-original-b16B8C24s1901"


def read(name: str, rows: int) -> tuple[dict[str, object], dict[str, np.ndarray]]:
    """Settings and arrays of a golden case; its token table with random rows up to `rows`."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    cfg = json.loads(str(arrays.pop("cfg")))
    (table,) = (key for key in arrays if key.startswith("sd/") and key.endswith("token_embedding.weight"))
    extra = np.random.default_rng(0).normal(scale=0.3, size=(rows - len(arrays[table]), arrays[table].shape[1]))
    return cfg, {**arrays, table: np.concatenate([arrays[table], extra.astype(np.float32)])}


def save(arrays: dict[str, np.ndarray], path: Path, left_out: str | None = None, prefix: str | None = None) -> Path:
    """The case's state dict as the reference's `torch.save` would leave it; CLIP under another prefix if given."""
    state: dict[str, Tensor] = {}
    for key, array in arrays.items():
        name = key.removeprefix("sd/")
        if key.startswith("sd/") and not (left_out and name.startswith(left_out)):
            state[name.replace("backbone.", prefix, 1) if prefix else name] = torch.from_numpy(array)
    torch.save(state, path)
    return path


def settings(name: str, tiny_overrides: list[str], more: list[str]) -> tuple[Path, list[str]]:
    """Configuration file and entries that put a case's method on the tiny data, in the sizes of the case's CLIP."""
    sizes = [
        "dataset.image_size=64",
        "dataset.text_length=32",
        f"dataset.tokens={VOCABULARY}",
        "evaluate.caption=first",
    ]
    return ROOT / "configs" / MODELS.folder(name.split("-")[0]) / "coco.yaml", [*tiny_overrides, *sizes, *more]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_of_every_layout_become_ours(layout: str, tmp_path: Path) -> None:
    method, options, renames, unsaved = LAYOUTS[layout]
    model = build(method, str(tmp_path), **options)
    state, theirs = model.state_dict(), {"distance.mp_dist.alpha": torch.ones(1)} if method == "DIMCH" else {}
    for name, value in state.items():
        if name not in unsaved:
            tower = name.startswith("backbone.")  # only its prefix has another name
            for ours, other in renames:
                name = name.replace(ours, other) if tower == (ours == "backbone.") else name
            theirs[name] = value
    imported = type(model).import_reference(theirs)
    missing, unknown = build(method, str(tmp_path), **options).load_state_dict(imported, strict=False)
    assert not unknown and tuple(missing) == unsaved
    assert all(imported[name] is value for name, value in state.items() if name not in unsaved)
    assert [name for name in state if model.may_be_absent(name)] == list(unsaved) or not unsaved


@pytest.mark.parametrize(("name", "more", "left_out"), CASES, ids=[case[0] for case in CASES])
def test_codes_are_those_of_the_case(
    name: str, more: list[str], left_out: str | None, tmp_path: Path, tiny_overrides: list[str]
) -> None:
    cfg, arrays = read(name, VOCABULARY)
    file, entries = settings(name, tiny_overrides, more)
    prefixes = (None, "clip.") if "unified" in name else (None,)
    for number, prefix in enumerate(prefixes):  # the unified library renamed its backbone
        path = save(arrays, tmp_path / f"model-{number}.pth", left_out, prefix)
        code, _, err = run("--config-file", file, "--save-dir", tmp_path / "run", *entries, "--evaluate", path)
        assert code == 0, err
    for number in range(len(prefixes)):
        assert_codes(cfg, arrays, file, entries, tmp_path / f"run/codes-model-{number}.npz")


def assert_codes(
    cfg: dict[str, object], arrays: dict[str, np.ndarray], file: Path, entries: list[str], written: Path
) -> None:
    """The codes in a file are those that the case's model makes of the same data."""
    model = open_case(cfg, arrays).build().eval()
    config = load_config(file, entries)
    dataset = open_dataset(config)
    with np.load(written) as found:
        for split, key in zip(encoded_splits(dataset), ("q", "r"), strict=True):
            fields = (model.image_fields | model.text_fields) & dataset.offers(split).keys()
            for batch in make_loader(config, dataset, split, frozenset(fields), torch.device("cpu")).once():
                with torch.no_grad():
                    images = model.encode_image(batch.only(model.image_fields))
                    texts = model.encode_text(batch.only(model.text_fields))
                for modality, codes in (("img", images), ("txt", texts)):
                    assert len(codes.unique(dim=0)) > 1
                    np.testing.assert_array_equal(found[f"{key}_{modality}"][batch["index"]], codes)


def test_twdh_with_the_centres_of_its_authors(tmp_path: Path, tiny_overrides: list[str]) -> None:
    """Its checkpoints hold no centres; those of as many classes as the data have come from a file."""
    cfg, arrays = read(TWDH, VOCABULARY)
    few, long = len(tiny_data.COLOURS), torch.from_numpy(arrays["in/long_center"])
    short, transforms = (
        {int(name.rpartition("/")[2]): torch.from_numpy(x) for name, x in arrays.items() if name.startswith(kind)}
        for kind in ("in/short_center/", "in/trans/")
    )
    folder = tmp_path / "centers"
    folder.mkdir()
    centers = HashCenters(long[:few], {bits: x[:few] for bits, x in short.items()}, transforms)
    write_centers(folder / f"{long.shape[1]}.safetensors", centers, {})
    more = ["model.long_bits=64", "model.short_bits=[16, 32]", "model.centers=file", "model.transform=file"]
    file, entries = settings(TWDH, tiny_overrides, [*more, f"model.center_folder={folder}"])
    path = save(arrays, tmp_path / "model.pth")
    code, _, err = run("--config-file", file, "--save-dir", tmp_path / "run", *entries, "--evaluate", path)
    assert code == 0, err
    assert_codes(cfg, arrays, file, entries, tmp_path / "run/codes-model.npz")


def test_vtph_of_two_parts_beside_a_clip(tmp_path: Path, tiny_overrides: list[str]) -> None:
    cfg, arrays = read(VTPH, VOCABULARY)
    parts: dict[str, dict[str, Tensor]] = {"clip": {}, "vtp": {}, "hash": {}}
    for key, array in arrays.items():
        if key.startswith("sd/"):
            part, _, name = key.removeprefix("sd/").partition(".")
            parts[part][name] = torch.from_numpy(array)
    write_clip(tmp_path / "clip.safetensors", parts.pop("clip"), {"source": "golden case"})
    path = tmp_path / "model.pth"
    torch.save(parts, path)
    more = [f"model.backbone={tmp_path / 'clip.safetensors'}", "model.prompt_heads=16"]
    file, entries = settings(VTPH, tiny_overrides, more)
    code, _, err = run("--config-file", file, "--save-dir", tmp_path / "run", *entries, "--evaluate", path)
    assert code == 0, err
    assert_codes(cfg, arrays, file, entries, tmp_path / "run/codes-model.npz")


def test_a_token_table_of_another_size_is_refused(tmp_path: Path, tiny_overrides: list[str]) -> None:
    name = CASES[0][0]
    path = save(read(name, 600)[1], tmp_path / "model.pth")
    file, entries = settings(name, tiny_overrides, [])
    line = refused("--config-file", file, "--save-dir", tmp_path / "run", *entries, "--evaluate", path)
    assert "dataset.tokens is 49408" in line and "set dataset.tokens=600 if" in line


WRAPPED = {
    "DataParallel": lambda state: {f"module.{name}": value for name, value in state.items()},
    "torch.compile": lambda state: {f"_orig_mod.{name}": value for name, value in state.items()},
    "Lightning": lambda state: {
        "epoch": 3, "state_dict": {f"model.{name}": value for name, value in state.items()},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}}],
    },
    "script": lambda state: {
        "args": {"lr": 0.1}, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}, "best": torch.ones(1),
        "model_state_dict": {"module": {f"_orig_mod.{name}": value for name, value in state.items()}},
        "ema": {name: value + 1 for name, value in state.items()},
    },
}  # fmt: skip


@pytest.mark.parametrize("form", WRAPPED)
def test_wrapped_as_people_save_them(form: str, tmp_path: Path, tiny_overrides: list[str]) -> None:
    name = "DSPH-unified-b16B13C80s1501"
    _, arrays = read(name, VOCABULARY)
    path = save(arrays, tmp_path / "plain.pt")
    torch.save(WRAPPED[form](torch.load(path, weights_only=True)), tmp_path / "wrapped.pt")
    config, overrides = settings(name, tiny_overrides, ["model.bits=16"])
    written = []
    for file in ("plain", "wrapped"):
        code, _, err = run(
            "--config-file", config, "--evaluate", tmp_path / f"{file}.pt", "--save-dir", tmp_path / "out", *overrides
        )
        assert code == 0, err
        with np.load(tmp_path / "out" / f"codes-{file}.npz") as codes:
            written.append({key: codes[key] for key in codes.files})
    assert "took the model under" in err
    assert all(np.array_equal(written[0][key], written[1][key]) for key in written[0])


def test_two_models_in_one_file_are_not_guessed_between(tmp_path: Path, tiny_overrides: list[str]) -> None:
    name = "DSPH-unified-b16B13C80s1501"
    state = torch.load(save(read(name, VOCABULARY)[1], tmp_path / "plain.pt"), weights_only=True)
    torch.save({"model": state, "net": {key: value + 1 for key, value in state.items()}}, tmp_path / "two.pt")
    config, overrides = settings(name, tiny_overrides, ["model.bits=16"])
    line = refused("--config-file", config, "--evaluate", tmp_path / "two.pt", *overrides)
    assert "several models that fit, under 'model.' and 'net.'" in line
