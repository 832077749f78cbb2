"""Fields beside pictures, texts and labels: captions of the pictures, counterparts, stored features."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io
import scipy.sparse
import torch

from common.errors import UserError
from dataset.texts.tokenizer import tokenize
from tests import datasets
from tests.datasets import ITEMS, pixels_of, refused


@pytest.fixture
def root(tmp_path):
    return datasets.write(tmp_path / "data")


def sentences():
    return [f"a drawing of thing {number}" for number in range(ITEMS)]


def write_image_captions(root: Path, form: str) -> None:
    if form == "char matrix":
        scipy.io.savemat(root / "image_caption.mat", {"image_caption": sentences()})
    elif form == "column":
        scipy.io.savemat(root / "image_caption.mat", {"image_caption": np.array(sentences())[:, None]})
    elif form == "cells":
        scipy.io.savemat(root / "image_caption.mat", {"image_caption": datasets.cells(sentences())})
    elif form == "text":
        (root / "image_caption.txt").write_text("\n".join(sentences()), encoding="utf-8")
    else:
        entries = [
            {"id": number if number % 2 else f"images/{number}.png", "caption": text}
            for number, text in enumerate(sentences())
        ]
        lines = [json.dumps(entry) for entry in reversed(entries)]
        (root / "image_caption.jsonl").write_text("\n".join(lines), encoding="utf-8")


@pytest.mark.parametrize("form", ["char matrix", "column", "cells", "text", "json lines"])
def test_image_captions_and_counterparts(root, form):
    write_image_captions(root, form)
    data = datasets.opened(root)
    counterparts = {"counterpart_image", "counterpart_caption"}
    assert all(data.offers(split)["image_caption"] == (12,) for split in ("query", "train", "database"))
    assert counterparts <= set(data.offers("train"))
    assert counterparts <= set(data.offers("database"))
    assert not counterparts & set(data.offers("query"))
    rows = data.columns["train"]["counterpart_caption"].rows(torch.arange(10), torch.zeros(10))
    assert torch.equal(rows, tokenize(sentences(), 12)[data.splits.train])
    paired = datasets.opened(root, query_counterpart="paired")
    assert paired.columns["query"]["counterpart_image"].numbers.equal(paired.splits.query)
    with pytest.raises(UserError, match="set dataset.query_counterpart to generated"):
        data.require("query", frozenset(counterparts))


@pytest.mark.parametrize("form", ["mat", "npy", "h5"])
def test_stored_features(root, form):
    image, text = (np.random.default_rng(seed).normal(size=(ITEMS, 3 + seed)) for seed in (1, 2))
    for name, features in (("image_feature", image), ("text_feature", text)):
        path = root / f"{name}.{form}"
        if form == "mat":
            scipy.io.savemat(path, {name: features})
        elif form == "npy":
            np.save(path, features)
        else:
            with h5py.File(path, "w") as file:
                file[name] = features
    data = datasets.opened(root)
    for split in ("query", "train", "database"):
        for name, features in (("image_feature", image), ("text_feature", text)):
            items = data.splits.items(split)
            rows = data.columns[split][name].rows(torch.arange(len(items)), torch.zeros(len(items)))
            assert torch.equal(rows, torch.from_numpy(features).float()[items])
    assert {"image_feature", "text_feature"} <= data.constant_fields("train")


@pytest.mark.parametrize(
    ("features", "match"),
    [
        (np.ones((ITEMS - 1, 3)), "image_feature.npy has 23 items; they must list the same pairs"),
        (np.ones(ITEMS), "is no matrix of features"),
        (np.array([["a"]] * ITEMS), "is no matrix of features"),
        (np.full((ITEMS, 2), 1e39), "not finite as float32"),
        (np.full((ITEMS, 2), np.nan), "not finite as float32"),
    ],
)
def test_stored_features_that_are_none(root, features, match):
    np.save(root / "image_feature.npy", features)
    refused(match, root)


def generated(root):
    folder = root / "generated"
    folder.mkdir()
    for number in range(1, 7):
        datasets.smooth_picture(1000 + number, 24, 24).save(folder / f"{number}.png")
    (root / "generated.txt").write_text("\n".join(f"made up {number}" for number in range(6)))
    return {
        "query_counterpart": "generated",
        "counterpart_images": str(folder),
        "counterpart_captions": str(root / "generated.txt"),
    }


def test_generated_counterparts(root):
    write_image_captions(root, "text")
    data = datasets.opened(root, **generated(root))
    column = data.columns["query"]["counterpart_image"]
    assert np.array_equal(pixels_of(data, int(column.numbers[4])), np.array(datasets.smooth_picture(1005, 24, 24)))
    assert np.array_equal(pixels_of(data, 4), np.array(datasets.smooth_picture(4, 24, 24)))
    captions = data.columns["query"]["counterpart_caption"].rows(torch.arange(6), torch.zeros(6))
    assert torch.equal(captions, tokenize([f"made up {number}" for number in range(6)], 12))
    assert data.columns["train"]["counterpart_image"].numbers.equal(data.splits.train)


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ('{"id": "images/99.png", "caption": "x"}', r"line 25: the index has no item 'images/99\.png'"),
        ('{"id": 24, "caption": "x"}', r"line 25: the index has no item 24"),
        ('{"id": -1, "caption": "x"}', r"line 25: the index has no item -1"),
        ('{"id": 3}', r"line 25: must be"),
        ("not json", r"line 25: must be"),
        ("[1]", r"line 25: must be"),
        pytest.param("[" * 100_000, r"line 25: must be", id="nested"),
        pytest.param(f'{{"id": {"1" * 5000}, "caption": "x"}}', r"line 25: must be", id="digits"),
    ],
)
def test_json_lines_mistakes(root, line, match):
    write_image_captions(root, "json lines")
    with (root / "image_caption.jsonl").open("a") as file:
        file.write(f"\n{line}\n")
    refused(match, root)


def test_image_captions_of_another_length(root):
    write_image_captions(root, "json lines")
    path = root / "image_caption.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:-2]))
    refused(r"2 of 24 items have no caption, the first is 'images/0\.png' \(row 0\)", root)
    (root / "image_caption.txt").write_text("one\ntwo\n")
    refused(r"index\.mat has 24, .*image_caption\.txt has 2 items", root)


def test_generated_counterparts_mistakes(root):
    refused(r"counterpart_images or counterpart_captions is null", root, query_counterpart="generated")
    settings = generated(root)
    refused(
        r"nowhere \(dataset\.counterpart_images\) is not a folder", root, **settings | {"counterpart_images": "nowhere"}
    )
    refused(r"none\.txt cannot be read", root, **settings | {"counterpart_captions": "none.txt"})
    (root / "generated" / "5.png").unlink()
    refused(r"picture '5\.png' \(row 4\) is not under .*missing: make them with data/make_gen", root, **settings)
    (root / "generated.txt").write_text("one\n")
    refused(r"has 1 lines, but there are 6 queries", root, **settings)
