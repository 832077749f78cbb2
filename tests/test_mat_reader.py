"""Reading a variable of a file: what tells its items apart, and files that ask for too much memory."""

import os
import struct
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io
import scipy.sparse

from common.errors import UserError
from dataset.mat_reader import number_matrix, read_variable, text_rows
from dataset.pictures.reading import PictureFiles
from dataset.texts.files import read_lines
from tests import datasets


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


@pytest.mark.parametrize("filled", [True, False])
def test_sparse_matrices_of_every_version(filled, tmp_path):
    dense = np.zeros((5, 3)) if not filled else np.array([[1, 0, 0], [0, 0, 0], [1, 0, 1], [0, 0, 1], [0, 0, 0.5]])
    matrix = scipy.sparse.csc_matrix(dense)
    scipy.io.savemat(tmp_path / "old.mat", {"label": matrix})
    with h5py.File(tmp_path / "new.mat", "w", userblock_size=512) as file:
        group = file.create_group("label")
        group.attrs.update(MATLAB_class=np.bytes_("double"), MATLAB_sparse=np.uint64(5))
        group["jc"] = matrix.indptr.astype(np.uint64)
        if filled:
            group["data"], group["ir"] = matrix.data, matrix.indices.astype(np.uint64)
    for name in ("old.mat", "new.mat"):
        found = number_matrix(read_variable(tmp_path / name, ["label"]).value, 5)
        assert found is not None and np.array_equal(found, dense)


def write_object(path: Path, name: bytes, in_cell: bool) -> None:
    """A MATLAB 5 file as MATLAB writes it for a string in double quotes, alone or in a cell."""

    def element(kind: int, content: bytes) -> bytes:
        return struct.pack("<II", kind, len(content)) + content + bytes(-len(content) % 8)

    def matrix(cls: int, *parts: bytes) -> bytes:
        return element(14, element(6, struct.pack("<II", cls, 0)) + b"".join(parts))

    reference = matrix(13, element(5, struct.pack("<ii", 1, 1)), element(1, b""), element(6, bytes(4)))
    value = element(1, b"MCOS") + element(1, b"string") + reference
    if in_cell:
        whole = matrix(1, element(5, struct.pack("<ii", 1, 1)), element(1, name), matrix(17, element(1, b""), value))
    else:
        whole = matrix(17, element(1, name), value)
    path.write_bytes(b"MATLAB 5.0".ljust(124) + struct.pack("<H2s", 0x0100, b"IM") + whole)


@pytest.mark.parametrize("stored", ["string", "strings in a cell", "string, v7.3"])
def test_objects_of_matlab_are_refused_with_what_to_do(stored, tmp_path):
    path = tmp_path / "caption.mat"
    if stored == "string, v7.3":
        with h5py.File(path, "w", userblock_size=512) as file:
            file["caption"] = np.array([[0xDD000000, 2, 1, 1, 1, 1]], np.uint32)
            file["caption"].attrs.update(MATLAB_class=np.bytes_("string"), MATLAB_object_decode=np.int32(3))
    else:
        write_object(path, b"caption", in_cell=stored == "strings in a cell")
    with pytest.raises(UserError, match=r"caption\.mat.* holds an object of MATLAB .*; save there cellstr"):
        read_variable(path, ["caption"], text=True)


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
            elif kind == "sparse, v7.3":
                file["label/jc"] = np.zeros(60_001, np.uint64)
                file["label"].attrs["MATLAB_sparse"] = np.uint64(60_000)
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
        *("sparse", "sparse, v7.3", "declared", "chunk", "cells", "external", "compressed", "strings"),
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
