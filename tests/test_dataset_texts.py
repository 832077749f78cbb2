"""Texts of .mat data sets: captions in every form, word vectors, text files."""

from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io
import scipy.sparse
import torch

from dataset.texts.tokenizer import tokenize
from tests import datasets
from tests.datasets import ITEMS, TEXTS, captions_read, refused


@pytest.fixture
def root(tmp_path):
    return datasets.write(tmp_path / "data")


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


def test_truncated_hdf5_file(root):
    write_hdf5_texts(root / "caption.mat", "caption", TEXTS)
    content = (root / "caption.mat").read_bytes()
    (root / "caption.mat").write_bytes(content[: len(content) // 2])
    refused(r"caption\.mat cannot be read as a \.mat file", root)


def test_text_that_is_not_utf8(root):
    (root / "caption.mat").unlink()
    (root / "caption.txt").write_bytes(b"caf\xe9\n" * ITEMS)
    refused(r"caption\.txt is not UTF-8 text", root)
