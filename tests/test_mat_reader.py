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
from dataset.mat_reader import read_variable, text_rows
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
