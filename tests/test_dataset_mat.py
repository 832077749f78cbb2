"""Reading of .mat data sets: every layout that is in use, and every mistake with its message."""

import json
import os
import pickle
import struct
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io
import scipy.sparse
import torch
from PIL import Image

from common.errors import UserError
from dataset.mat_reader import read_variable, text_rows
from dataset.pictures.reading import PictureFiles, resolve_paths
from dataset.texts.files import read_lines
from dataset.texts.tokenizer import tokenize
from tests import datasets

ITEMS = datasets.ITEMS
TEXTS = [datasets.captions_of(number) for number in range(ITEMS)]


@pytest.fixture
def root(tmp_path):
    return datasets.write(tmp_path / "data")


def refused(match, root, **values):
    """Opens the data set and checks that the mistake is reported in one line."""
    with pytest.raises(UserError, match=match) as error:
        datasets.opened(root, **values)
    assert "\n" not in str(error.value)


def captions_read(data):
    """All captions of all items, as token rows."""
    return data.columns["train"]["text"].captions.tokens.long()


# ---------------------------------------------------------------------------------------------- texts


def write_hdf5_texts(path: Path, key: str, rows: list[list[str]]) -> None:
    """A cell array of cell arrays of characters, as MATLAB writes it to v7.3 files."""
    with h5py.File(path, "w", userblock_size=512) as file:
        references = file.create_group("#refs#")

        def characters(text: str, name: str) -> h5py.Reference:
            codes = np.frombuffer(text.encode("utf-16-le"), np.uint16).reshape(-1, 1)
            data = references.create_dataset(name, data=codes if text else np.zeros(2, np.uint64))
            data.attrs["MATLAB_class"] = np.bytes_("char")
            if not text:
                data.attrs["MATLAB_empty"] = np.uint8(1)
            return data.ref

        outer = np.empty((len(rows), 1), dtype=h5py.ref_dtype)
        for number, texts in enumerate(rows):
            inner = np.empty((len(texts), 1), dtype=h5py.ref_dtype)
            for place, text in enumerate(texts):
                inner[place, 0] = characters(text, f"{number}_{place}")
            cell = references.create_dataset(str(number), data=inner, dtype=h5py.ref_dtype)
            cell.attrs["MATLAB_class"] = np.bytes_("cell")
            outer[number, 0] = cell.ref
        data = file.create_dataset(key, data=outer, dtype=h5py.ref_dtype)
        data.attrs["MATLAB_class"] = np.bytes_("cell")


@pytest.mark.parametrize("key", ["caption", "tags", "YAll"])
def test_caption_keys_and_cells(root, key):
    scipy.io.savemat(root / "caption.mat", {key: datasets.cells(TEXTS), "other": np.eye(2)})
    assert torch.equal(captions_read(datasets.opened(root)), tokenize(sum(TEXTS, []), 12))


@pytest.mark.parametrize(
    "array",
    [
        np.array([texts[0] for texts in TEXTS]),  # as MITH: [N]
        np.array([[texts[0]] for texts in TEXTS]),  # [N, 1]
        np.array([[texts[0] for texts in TEXTS]]),  # [1, N]
        datasets.cells([np.array([texts[0]], dtype=object) for texts in TEXTS]),  # cells in cells
        datasets.cells([texts[0] for texts in TEXTS]).reshape(-1, 1),
    ],
    ids=["N", "Nx1", "1xN", "cells in cells", "Nx1 cells"],
)
def test_one_caption_per_item(root, array):
    scipy.io.savemat(root / "caption.mat", {"caption": array})
    assert torch.equal(captions_read(datasets.opened(root)), tokenize([texts[0] for texts in TEXTS], 12))


def test_several_captions_per_row_and_blank_fillers(root):
    rows = [[*texts, "", ""][:3] for texts in TEXTS]
    scipy.io.savemat(root / "caption.mat", {"caption": np.array(rows)})
    assert torch.equal(captions_read(datasets.opened(root)), tokenize(sum(TEXTS, []), 12))


def test_text_file_keeps_empty_and_unusual_lines(root):
    (root / "caption.mat").unlink()
    lines = ["  a cat\x0b sits\u2028down ", "", *[f"line {number}" for number in range(2, ITEMS)]]
    (root / "caption.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert torch.equal(captions_read(datasets.opened(root)), tokenize(lines, 12))


@pytest.mark.parametrize("items", [1, 5])
def test_a_single_item_is_told_by_dtype(items, tmp_path):
    texts = [["first one", "second one"], ["third"], ["4"], ["5"], ["6"]][:items]
    path = tmp_path / "caption.mat"
    for array, expected in (
        (datasets.cells(texts), texts),
        (np.array([row[0] for row in texts]), [row[:1] for row in texts]),
        (np.array([[*row, ""][:2] for row in texts]), texts),
    ):
        scipy.io.savemat(path, {"caption": array})
        assert text_rows(read_variable(path, ["caption"], text=True).value, items) == expected


def test_hdf5_cells_of_cells(root):
    rows = [["", "snowman ☃ 😀"], *TEXTS[1:]]
    write_hdf5_texts(root / "caption.mat", "caption", rows)
    expected = ["snowman ☃ 😀", *sum(TEXTS[1:], [])]
    assert torch.equal(captions_read(datasets.opened(root)), tokenize(expected, 12))


def test_files_of_hdf5storage(root):
    hdf5storage = pytest.importorskip("hdf5storage")
    names = np.array([f"images/{number}.png" for number in range(ITEMS)])
    for name, content in (
        ("index.mat", {"index": names}),
        ("caption.mat", {"caption": datasets.cells([np.array(texts, dtype=object) for texts in TEXTS])}),
        ("label.mat", {"label": datasets.labels_of().astype(np.float64)}),
    ):
        (root / name).unlink()
        hdf5storage.savemat(str(root / name), content, format="7.3", oned_as="column")
        assert h5py.is_hdf5(root / name)
    data = datasets.opened(root)
    assert list(data.names) == names.tolist()
    assert torch.equal(captions_read(data), tokenize(sum(TEXTS, []), 12))
    assert data.labels.int().tolist() == datasets.labels_of().tolist()


def test_variable_length_strings_of_h5py(root):
    with h5py.File(root / "caption.mat", "w") as file:
        file["caption"] = [texts[0] for texts in TEXTS]
    assert torch.equal(captions_read(datasets.opened(root)), tokenize([texts[0] for texts in TEXTS], 12))


def test_word_vectors_instead_of_captions(root):
    words = (np.random.default_rng(0).random((ITEMS, 7)) < 0.5).astype(np.float64)
    for stored in (words, words.T, scipy.sparse.csc_matrix(words)):
        scipy.io.savemat(root / "caption.mat", {"YAll": stored})
        data = datasets.opened(root)
        assert data.offers("train") == {"image": (3, 16, 16), "labels": (4,), "bag_of_words": (7,)}
        rows = data.columns["train"]["bag_of_words"].rows(torch.arange(3), torch.zeros(3))
        assert rows.tolist() == words[data.splits.train[:3]].tolist()
    np.save(root / "words.npy", words)
    assert datasets.opened(root, captions=["words.npy"]).offers("query")["bag_of_words"] == (7,)


def test_word_vectors_that_are_no_presence(root):
    """Wikipedia's topics: the training list and the test list are two variables of one file."""
    topics = np.random.default_rng(0).random((ITEMS, 10))
    scipy.io.savemat(root / "raw_features.mat", {"I_tr": topics, "T_tr": topics[:18], "T_te": topics[18:]})
    data = datasets.opened(root, captions=["raw_features.mat"])
    rows = data.columns["query"]["bag_of_words"].rows(torch.arange(3), torch.zeros(3))
    assert torch.equal(rows, torch.from_numpy(topics).float()[data.splits.query[:3]])
    scipy.io.savemat(root / "raw_features.mat", {"T_tr": topics[:18], "T_te": topics[18:, :9]})
    refused("T_tr and T_te differ in width", root, captions=["raw_features.mat"])
    topics[3, 4] = np.nan
    scipy.io.savemat(root / "caption.mat", {"YAll": topics})
    refused("not finite", root)


# ---------------------------------------------------------------------------------------------- DCMH layout


def dcmh_arrays():
    """Pictures [N, 24, 20, 3], binary words [N, 7], labels [N, 4]."""
    pictures = np.stack([np.array(datasets.smooth_picture(number, 20, 24)) for number in range(ITEMS)])
    words = (np.random.default_rng(0).random((ITEMS, 7)) < 0.5).astype(np.float64)
    return pictures, words, datasets.labels_of().astype(np.float64)


def test_dcmh_layout(tmp_path):
    """NUS-WIDE's: pictures and tags in v7.3 files, the tags turned around, labels in a v5 file."""
    pictures, words, labels = dcmh_arrays()
    with h5py.File(tmp_path / "nus-wide-tc10-iall.mat", "w", userblock_size=512) as file:
        file["IAll"] = pictures.transpose(0, 3, 2, 1)
    for stored in (words, words.T):
        with h5py.File(tmp_path / "nus-wide-tc10-yall.mat", "w", userblock_size=512) as file:
            file["YAll"] = stored
        scipy.io.savemat(tmp_path / "nus-wide-tc10-lall.mat", {"LAll": labels})
        files = {"index": ["nus-wide-tc10-iall.mat"], "captions": ["nus-wide-tc10-yall.mat"]}
        data = datasets.opened(tmp_path, **files, labels=["nus-wide-tc10-lall.mat"])
        assert data.offers("train") == {"image": (3, 16, 16), "labels": (4,), "bag_of_words": (7,)}
        rows = data.columns["train"]["bag_of_words"].rows(torch.arange(10), torch.zeros(10))
        assert rows.tolist() == words[data.splits.train].tolist()
        assert data.labels.double().tolist() == labels.tolist()
        assert np.array_equal(pixels_of(data, 5), pictures[5])


@pytest.fixture
def coco(tmp_path):
    """One file for pictures, labels and split, in HDF5's order of dimensions; word vectors beside it."""
    pictures, words, labels = dcmh_arrays()
    with h5py.File(tmp_path / "COCO.mat", "w", userblock_size=512) as file:
        file["IAll"] = pictures.transpose(0, 3, 2, 1)
        file["LAll"] = labels.T[:, :, None]
        file["param/indexQuery"] = np.array([[3.0, 24.0, 1.0, 7.0]])
        file["param/indexDatabase"] = np.array([[number] for number in range(8, 24)])
    np.save(tmp_path / "COCO_BoW.npy", words[:, None])
    return tmp_path


COCO_FILES = {"index": ["COCO.mat"], "captions": ["COCO_BoW.npy"], "labels": ["COCO.mat"]}
COCO_SPLIT = {**datasets.SETTINGS["split"], "protocol": "lists", "query": 4, "train": 10}


def test_dcmh_layout_in_one_file_with_its_own_split(coco):
    pictures, words, labels = dcmh_arrays()
    data = datasets.opened(coco, **COCO_FILES, split=COCO_SPLIT)
    assert data.splits.query.tolist() == [2, 23, 0, 6]
    assert sorted(data.splits.database.tolist()) == list(range(7, 23))
    assert torch.equal(data.splits.train, data.splits.database[:10])
    assert data.labels.double().tolist() == labels.tolist()
    assert np.array_equal(pixels_of(data, 9), pictures[9])
    rows = data.columns["query"]["bag_of_words"].rows(torch.arange(4), torch.zeros(4))
    assert rows.tolist() == words[[2, 23, 0, 6]].tolist()


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("indexQuery", [[0.0, 1.0]], r"param/indexQuery\) is not a list of item numbers from 1 to 24"),
        ("indexQuery", [[25.0]], "from 1 to 24"),
        ("indexDatabase", [[1.5]], r"param/indexDatabase\) is not a list"),
        ("indexDatabase", [[3.0, 9.0]], "lists an item twice"),
        ("indexDatabase", None, "has none of the variables indexDatabase, param/indexDatabase"),
        ("indexQuery", [[1.0, 2.0]], "lists 2 queries; set dataset.split.query=2"),
    ],
)
def test_mistakes_in_listed_splits(coco, name, value, match):
    with h5py.File(coco / "COCO.mat", "r+") as file:
        del file[f"param/{name}"]
        if value is not None:
            file[f"param/{name}"] = np.array(value)
    refused(match, coco, **COCO_FILES, split=COCO_SPLIT)


# ---------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize("key", ["category", "label", "labels", "LAll"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int64, np.float32, np.float64, np.bool_])
def test_label_keys_and_dtypes(root, key, dtype):
    scipy.io.savemat(root / "label.mat", {key: datasets.labels_of().astype(dtype)})
    data = datasets.opened(root)
    assert data.labels.dtype == torch.bool
    assert data.labels.int().tolist() == datasets.labels_of().tolist()


@pytest.mark.parametrize("name", ["label.mat", "label.npy"])
@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda labels: labels * 2.0 - 1, "labels are 1 and -1; -1 is read as no label"),
        (lambda labels: labels.argmax(1) + 1, "one class number per item, 4 different from 1 to 4"),
        (lambda labels: labels.argmax(1)[:, None] * 10.0, "one class number per item, 4 different from 0 to 30"),
    ],
)
def test_labels_in_other_notations(root, caplog, name, write, said):
    caplog.set_level("INFO")
    expected = np.eye(4, dtype=np.int8)[np.arange(ITEMS) % 4]
    (root / "label.mat").unlink()
    if name == "label.npy":
        np.save(root / name, write(expected))
    else:
        scipy.io.savemat(root / name, {"category": write(expected)})
    assert np.array_equal(datasets.opened(root, labels=[name]).labels.numpy(), expected)
    assert said in caplog.text


def test_labels_stored_the_other_way_round(root):
    scipy.io.savemat(root / "label.mat", {"LAll": datasets.labels_of().T})
    assert datasets.opened(root).labels.int().tolist() == datasets.labels_of().tolist()
    for stored in (datasets.labels_of(), datasets.labels_of().T):
        with h5py.File(root / "label.mat", "w") as file:
            file["LAll"] = stored
        assert datasets.opened(root).labels.int().tolist() == datasets.labels_of().tolist()


# ---------------------------------------------------------------------------------------------- pictures


def pixels_of(data, number):
    return np.array(data.pictures.read(number))


@pytest.mark.parametrize("key", ["index", "imgs", "FAll"])
def test_index_keys_and_padding(root, key):
    names = np.array([f"images/{number}.png   " for number in range(ITEMS)])
    scipy.io.savemat(root / "index.mat", {key: names})
    data = datasets.opened(root)
    assert np.array_equal(pixels_of(data, 11), np.array(datasets.smooth_picture(11, 24, 24)))


def test_pictures_inside_the_index(root):
    stack = np.stack([np.array(datasets.smooth_picture(number, 20, 24)) for number in range(ITEMS)])  # [N, 24, 20, 3]

    def check(**values):
        data = datasets.opened(root, **values)
        assert len(data.pictures) == ITEMS
        assert np.array_equal(pixels_of(data, 7), stack[7])
        assert np.array_equal(pixels_of(pickle.loads(pickle.dumps(data)), 7), stack[7])

    for array in (stack, stack.transpose(1, 2, 3, 0)):
        scipy.io.savemat(root / "index.mat", {"IAll": array})
        check()
    for array in (stack.transpose(0, 3, 2, 1), stack.transpose(3, 2, 1, 0)):  # as HDF5 shows MATLAB's arrays
        with h5py.File(root / "iall.mat", "w") as file:
            file["IAll"] = array
        check(index=["iall.mat"])
        (root / "iall.mat").unlink()
    np.save(root / "pictures.npy", stack)
    check(index=["pictures.npy"])


@pytest.mark.parametrize(
    "prefix", ["/home/them/coco/images/", "C:\\data\\images\\", "../../elsewhere/images/", "./images/", ""]
)
def test_paths_of_another_machine(root, prefix):
    scipy.io.savemat(root / "index.mat", {"index": [f"{prefix}{number}.png" for number in range(ITEMS)]})
    data = datasets.opened(root, image_root=None if prefix else str(root / "images"))
    assert np.array_equal(pixels_of(data, 5), np.array(datasets.smooth_picture(5, 24, 24)))


def test_longest_ending_wins_and_nothing_outside_the_root_is_read(tmp_path):
    for name in ("a/b/1.png", "b/1.png", "1.png", "other/2.png"):
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).touch()
    root = tmp_path / "root"
    assert resolve_paths(["/x/a/b/1.png", "/x/y/b/1.png", "z/1.png"], root, "index") == [
        str(root / "a/b/1.png"),
        str(root / "b/1.png"),
        str(root / "1.png"),
    ]
    (tmp_path / "secret.png").touch()
    for outside in (str(tmp_path / "secret.png"), "../secret.png", "a/../../secret.png"):
        with pytest.raises(UserError, match=r"secret\.png' \(row 0\) is not under .*root; .*set dataset\.image_root"):
            resolve_paths([outside], root, "index")
    assert resolve_paths([str(root / "other/2.png")], Path("/"), "index") == [str(root / "other/2.png")]
    with pytest.raises(UserError, match=r"'p/1.png' and 'q/1.png' both lead to .*image_root"):
        resolve_paths(["p/1.png", "q/1.png"], root, "index")


def test_modes_become_rgb_and_exif_is_left(tmp_path):
    grey = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated
    paths = []
    for mode, suffix in (("L", "png"), ("P", "png"), ("RGBA", "png"), ("CMYK", "jpg"), ("1", "png"), ("LA", "png")):
        paths.append(str(tmp_path / f"{mode}.{suffix}"))
        grey.convert(mode).save(paths[-1])
    paths.append(str(tmp_path / "rotated.jpg"))
    Image.new("RGB", (10, 6)).save(paths[-1], exif=exif)
    pictures = [PictureFiles(paths, "index").read(number) for number in range(len(paths))]
    assert all(picture.mode == "RGB" for picture in pictures)
    assert pictures[-1].size == (10, 6)


# ---------------------------------------------------------------------------------------------- further fields


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


# ---------------------------------------------------------------------------------------------- mistakes


def test_missing_folder_and_files(root, tmp_path):
    refused(r"data folder .*nowhere of data set small is missing; prepare it .*dataset\.root", tmp_path / "nowhere")
    for name, key in (("label.mat", "labels"), ("caption.mat", "captions"), ("index.mat", "index")):
        (root / name).unlink()
        refused(rf"has no {name}.*dataset\.{key}", root)


def test_file_without_its_variable(root):
    scipy.io.savemat(root / "label.mat", {"targets": datasets.labels_of(), "version": 1})
    refused(r"label\.mat has none of the variables category, label, labels, LAll, but targets, version;", root)
    with h5py.File(root / "caption.mat", "w") as file:
        file["texts"] = [1, 2]
    refused(r"caption\.mat has none of the variables caption, tags, YAll, T_tr, but texts;", root)


def test_files_of_different_length(root):
    scipy.io.savemat(root / "caption.mat", {"caption": datasets.cells(TEXTS[:-1])})
    scipy.io.savemat(root / "label.mat", {"label": datasets.labels_of(ITEMS - 2)})
    refused(r"index\.mat has 24, .*caption\.mat has 23, .*label\.mat has 22 items; .*same pairs", root)


@pytest.mark.parametrize("name", ["index.mat", "caption.mat", "label.mat"])
@pytest.mark.parametrize("kept", [0, 60, 0.5, 0.98])
def test_truncated_file(root, name, kept):
    content = (root / name).read_bytes()
    (root / name).write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    refused(rf"{name}.*(cannot be read as a \.mat file|has none of the variables)", root)


def test_truncated_hdf5_file(root):
    write_hdf5_texts(root / "caption.mat", "caption", TEXTS)
    content = (root / "caption.mat").read_bytes()
    (root / "caption.mat").write_bytes(content[: len(content) // 2])
    refused(r"caption\.mat cannot be read as a \.mat file", root)


def test_file_of_another_kind_runs_nothing(root, tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    (root / "label.mat").write_bytes(pickle.dumps(Trap()))
    refused(r"label\.mat cannot be read as a \.mat file", root)
    np.save(root / "labels.npy", np.array([Trap()], dtype=object), allow_pickle=True)
    refused(r"labels\.npy cannot be read", root, labels=["labels.npy"])
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        (
            "label.mat",
            {"label": datasets.labels_of() * 2},
            r"row \d+, column \d+ is 2; labels are 1 and 0, 1 and -1, or one class number",
        ),
        ("label.mat", {"label": datasets.labels_of() - 0.5}, r"is 0\.5|is -0\.5"),
        ("label.mat", {"label": np.full((ITEMS, 3), np.nan)}, r"row 0, column 0 is nan"),
        (
            "label.mat",
            {"label": np.arange(ITEMS * 3).reshape(ITEMS, 3) % 3 - 1},
            r"is 0 beside -1; labels are 1 and 0, 1",
        ),
        ("label.mat", {"label": np.arange(ITEMS) % 2}, r"one column of 0 and 1: .*write class numbers from 1"),
        ("label.mat", {"label": np.arange(ITEMS) % 2 * 2 - 1}, r"one column of -1 and 1: .*write class numbers from 1"),
        ("label.mat", {"label": np.arange(ITEMS) + 5}, r"24 different numbers for 24 items"),
        ("label.mat", {"label": np.arange(ITEMS) % 3 + 0.5}, r"row 0 is 0\.5, which is no class number"),
        ("label.mat", {"label": ["cat"] * ITEMS}, r"label\.mat \(label\) is not a matrix of labels"),
        ("caption.mat", {"caption": datasets.cells([1.0] * ITEMS)}, r"caption\.mat \(caption\) holds neither texts"),
        ("index.mat", {"index": np.arange(ITEMS)}, r"index\.mat \(index\) is neither a list of picture paths"),
        ("index.mat", {"index": ["images/0.png", *[" "] * 23]}, r"index\.mat \(index\): row 1 is an empty path"),
        ("index.mat", {"IAll": np.zeros((ITEMS, 4, 4, 3))}, r"index\.mat.*no stack of RGB pictures"),
    ],
)
def test_variable_of_another_kind(root, name, content, match):
    scipy.io.savemat(root / name, content)
    refused(match, root)


def bomb(path: Path, kind: str) -> None:
    """A small file that asks for much memory, or for another file."""
    if kind == "compressed":  # 384 MiB of zeros
        deflate = zlib.compressobj(9)
        start, block = (deflate.compress(bytes(2**24)) + deflate.flush(zlib.Z_FULL_FLUSH) for _ in range(2))
        content = start + 23 * block
        header = b"MATLAB 5.0".ljust(124) + struct.pack("<H2s", 0x0100, b"IM")
        path.write_bytes(header + struct.pack("<II", 15, len(content)) + content)
    elif kind.startswith("nested"):  # 300,000,000 of something in a cell, and no bytes
        what = {"nested characters": "four", "nested cells": datasets.cells(["four"]), "nested fields": {"name": "x"}}
        scipy.io.savemat(path, {"label": datasets.cells([what[kind.removesuffix(", packed")]])})
        altered = bytearray(path.read_bytes())
        inner = altered.index(struct.pack("<I", 14), 136)  # the cell's matrix: tag, flags, dimensions
        altered[inner + 32 : inner + 40] = struct.pack("<ii", 1, 300_000_000)
        if kind.startswith("nested characters"):
            data = altered.index(b"four", inner) - 4  # a small element: length and type in four bytes
            altered[data : data + 8] = struct.pack("<II", 16, 0)
        if kind.endswith("packed"):
            packed = zlib.compress(altered[128:])
            altered[128:] = struct.pack("<II", 15, len(packed)) + packed
        path.write_bytes(altered)
    elif kind == "sparse":
        scipy.io.savemat(path, {"label": scipy.sparse.csc_matrix((60_000, 60_000))})
    else:
        with h5py.File(path, "w") as file:
            if kind == "declared":
                file.create_dataset("label", (10**9, 10**9), "f8", chunks=(64, 64))
            elif kind == "chunk":
                file.create_dataset("label", (4, 4), "u1", chunks=(30_000, 30_000), maxshape=(None, None))
            elif kind == "external":
                file.create_dataset("label", (4, 4), "u1", external=[("/etc/passwd", 0, 16)])
            elif kind == "strings":  # one of a mebibyte, a thousand times
                text = h5py.string_dtype()
                file.create_dataset("one", data="x" * 2**20, dtype=text)
                place = file["one"].id.get_offset()
                file.create_dataset("label", (1000,), text, chunks=None).write_direct(np.full(1000, "y", object))
                ends = place, file["label"].id.get_offset()
            elif kind == "cells":  # one large array, a thousand times
                large = file.create_dataset("large", (2**20,), "f8", chunks=True)
                file.create_dataset("label", data=np.full(1000, large.ref, h5py.ref_dtype), dtype=h5py.ref_dtype)
        if kind == "strings":
            altered = bytearray(path.read_bytes())
            altered[ends[1] : ends[1] + 16_000] = altered[ends[0] : ends[0] + 16] * 1000
            path.write_bytes(altered)


@pytest.mark.parametrize(
    "kind",
    [
        *("sparse", "declared", "chunk", "cells", "external", "compressed", "strings"),
        *("nested characters", "nested cells", "nested fields", "nested characters, packed", "nested cells, packed"),
    ],
)
def test_files_that_ask_for_far_more_than_they_hold(tmp_path, kind):
    bomb(tmp_path / "label.mat", kind)
    bombs = r"holds or claims more than 200 times its .* bytes.*\(decompression bomb\); save"
    match = r"keeps its values in another file; save" if kind == "external" else bombs
    with pytest.raises(UserError, match=rf"label\.mat .*{match}"):
        read_variable(tmp_path / "label.mat", ["label"])


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "read",
    [
        lambda path: read_variable(path, ["label"]),
        lambda path: PictureFiles([str(path)], "index.mat").read(0),
        read_lines,
    ],
    ids=["variable", "picture", "text"],
)
def test_a_pipe_is_not_waited_for(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"pipe.* is no regular file; "):
        read(tmp_path / "pipe")


def test_no_interpreter_reads_a_picture(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png", "EPS")
    with pytest.raises(UserError, match=r"1\.png .* is not a picture \(JPEG, PNG, "):
        PictureFiles([str(tmp_path / "1.png")], "index.mat").read(0)


def test_missing_pictures(root):
    for number in (3, 17):
        (root / "images" / f"{number}.png").unlink()
    refused(
        r"picture 'images/3\.png' \(row 3\) is not under .*; 2 of 24 pictures are missing: set dataset\.image_r", root
    )
    refused(r"'images/0\.png' \(row 0\) is not under .*nowhere; 24 of 24", root, image_root=str(root / "nowhere"))


def broken(kind, path):
    content = path.read_bytes()
    if kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "not a picture":
        path.write_bytes(b"<html>404</html>")
    elif kind == "missing":
        path.unlink()
    elif kind == "more than 144 pixels":
        Image.new("RGB", (13, 12)).save(path)
    elif kind == "far more than 144 pixels":
        Image.new("RGB", (40, 40)).save(path)


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("truncated", r"is truncated or broken"),
        ("not a picture", r"is not a picture"),
        ("missing", r"is missing"),
        ("more than 144 pixels", r"has more than 144 pixels.*decompression bomb"),
        ("far more than 144 pixels", r"has more than 144 pixels.*decompression bomb"),
    ],
)
def test_broken_picture(tmp_path, monkeypatch, kind, match):
    path = tmp_path / "1.png"
    Image.effect_noise((12, 12), 50).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 144)
    pictures = PictureFiles([str(path), str(path)], "index.mat")
    assert pictures.read(1).size == (12, 12)
    broken(kind, path)
    with pytest.raises(UserError, match=rf"1\.png \(row 1 of index\.mat\) {match}.*; ") as error:
        pictures.read(1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ('{"id": "images/99.png", "caption": "x"}', r"line 25: the index has no item 'images/99\.png'"),
        ('{"id": 24, "caption": "x"}', r"line 25: the index has no item 24"),
        ('{"id": -1, "caption": "x"}', r"line 25: the index has no item -1"),
        ('{"id": 3}', r"line 25: must be"),
        ("not json", r"line 25: must be"),
        ("[1]", r"line 25: must be"),
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


def test_text_that_is_not_utf8(root):
    (root / "caption.mat").unlink()
    (root / "caption.txt").write_bytes(b"caf\xe9\n" * ITEMS)
    refused(r"caption\.txt is not UTF-8 text", root)
