"""Data sets in .mat files: every layout in use, every notation of labels, and every mistake with its message."""

import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io
import scipy.sparse
import torch

from common.errors import UserError
from tests import datasets
from tests.datasets import ITEMS, TEXTS, pixels_of, refused
from tests.disks import without_rights


@pytest.fixture
def root(tmp_path):
    return datasets.write(tmp_path / "data")


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


def test_what_is_said_of_a_picture_named_twice_and_of_no_text(root, caplog):
    index = [f"images/{number}.png" for number in [0, *range(ITEMS - 1)]]
    scipy.io.savemat(root / "index.mat", {"index": index})
    datasets.opened(root)
    assert "index.mat names 1 pictures more than once: a query may find its own picture" in caplog.text
    scipy.io.savemat(root / "caption.mat", {"caption": np.array([" "] * ITEMS)})
    refused(r"caption\.mat has no text for any of its 24 items", root)


@pytest.mark.parametrize(
    ("closed", "match"),
    [
        ("label.mat", r"label\.mat cannot be read \(Permission denied\); allow it"),
        ("images", r"folder .*images cannot be read \(Permission denied\); allow it"),
        ("images/3.png", r"picture .*3\.png \(row 3 of .*\) cannot be read \(Permission denied\); allow it"),
    ],
)
def test_what_may_not_be_read(root, closed, match):
    datasets.opened(root).pictures.read(3)  # loads what is needed
    (root / closed).chmod(0)
    try:
        with without_rights(root), pytest.raises(UserError, match=match):
            datasets.opened(root).pictures.read(3)
    finally:
        (root / closed).chmod(0o755)


def test_labels_stored_the_other_way_round(root):
    scipy.io.savemat(root / "label.mat", {"LAll": datasets.labels_of().T})
    assert datasets.opened(root).labels.int().tolist() == datasets.labels_of().tolist()
    for stored in (datasets.labels_of(), datasets.labels_of().T):
        with h5py.File(root / "label.mat", "w") as file:
            file["LAll"] = stored
        assert datasets.opened(root).labels.int().tolist() == datasets.labels_of().tolist()


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
