"""Writing of .mat files: whole or not at all, the same bytes for the same arrays, every string as it was."""

import errno
import io
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from scipy.io import loadmat

from common.errors import UserError
from data.mat_files import string_cells, string_rows, write_mat


def test_write_that_fails_leaves_the_older_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.mat"
    write_mat(path, a=np.arange(3))
    before = path.read_bytes()

    def savemat(stream: io.BufferedWriter, *_: object, **__: object) -> None:
        stream.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(scipy.io, "savemat", savemat)
    with pytest.raises(UserError, match="x.mat cannot be written: No space left on device"):
        write_mat(path, a=np.arange(4))
    assert [file.name for file in tmp_path.iterdir()] == ["x.mat"] and path.read_bytes() == before


def test_mat_files_have_the_same_bytes_at_any_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = {"index": string_rows(["a", "ü😀"]), "caption": string_cells([["x", "yy"], []]), "category": np.eye(2)}
    write_mat(tmp_path / "a.mat", **arrays)
    monkeypatch.setattr(time, "asctime", lambda *_: "Sat Jan  1 00:00:00 2000")
    write_mat(tmp_path / "b.mat", **arrays)
    assert (tmp_path / "a.mat").read_bytes() == (tmp_path / "b.mat").read_bytes()


def test_strings_survive_the_way_through_a_mat_file(tmp_path: Path) -> None:
    texts = ["plain", "", "ünïcode 😀 日本", "two\nlines\tand  blanks ", "nul\0inside", "lone \ud83d surrogate"]
    kept = ["plain", "", "ünïcode 😀 日本", "two lines and blanks", "nul inside", "lone ? surrogate"]
    cells = string_cells([[text] for text in texts] + [[]] + [texts])
    write_mat(tmp_path / "x.mat", rows=string_rows(texts), column=string_rows(texts)[:, None], cells=cells)
    found = loadmat(tmp_path / "x.mat")
    assert [text.rstrip() for text in found["rows"]] == kept
    assert found["column"].shape == (6, 1) and [text.rstrip() for text in found["column"][:, 0]] == kept
    assert found["cells"].shape == (1, 8)
    assert [[text.rstrip() for text in cell] for cell in found["cells"][0]] == [[text] for text in kept] + [[""], kept]
