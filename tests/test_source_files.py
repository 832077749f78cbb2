"""The source folder of a preparation: files are found and read, and every broken picture is noticed."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from data.make_coco import read_objects
from data.source_files import JOURNAL, find, inspect_picture, read_bytes, read_lines, scan_pictures
from dataset.pictures.reading import PictureFiles
from tests import miniatures
from tests.disks import without_rights


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_every_cut_of_a_jpeg_is_noticed(tmp_path: Path, mode: str, progressive: bool) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 96, len(Image.new(mode, (1, 1)).getbands())), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise.squeeze(), mode).save(stream, "JPEG", progressive=progressive)
    content = stream.getvalue()
    path = tmp_path / "x.jpg"
    path.write_bytes(content)
    whole = inspect_picture(path)
    assert whole is not None and (whole.fault, whole.mode, whole.width, whole.height) == ("", mode, 96, 64)
    for share in (0.0, 0.05, 0.3, 0.6, 0.9, 0.97):
        path.write_bytes(content[: int(share * len(content))])
        cut = inspect_picture(path)
        assert cut is not None and cut.fault
        with pytest.raises(OSError):  # the reader of the training loop agrees
            Image.open(path).convert("RGB")


@pytest.mark.parametrize("limit", [100, 1000])  # Pillow itself refuses from twice the limit on: here 1,200 pixels
def test_a_decompression_bomb_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    path = tmp_path / "x.jpg"
    miniatures.picture(path, 1)
    picture = inspect_picture(path)
    assert picture is not None and "decompression bomb" in picture.fault
    with pytest.raises(UserError, match="decompression bomb"):  # the reader of the training loop agrees
        PictureFiles([str(path)], "here").read(0)


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_pictures_that_training_refuses_are_broken(tmp_path: Path, kind: type) -> None:
    path = tmp_path / "x.tiff"
    Image.fromarray(np.ones((3, 4), kind)).save(path)
    picture = inspect_picture(path)
    assert picture is not None and "32 bits" in picture.fault
    with pytest.raises(UserError, match="32 bits"):
        PictureFiles([str(path)], "here").read(0)


def test_find_takes_the_nearest(tmp_path: Path) -> None:
    for folder in ("a/b/c", "b/c", "d/e/f/g/h"):
        (tmp_path / folder / "x").mkdir(parents=True)
    assert find(tmp_path, "x", "x.zip") == tmp_path / "b/c/x"
    assert find(tmp_path, "c/x", "x.zip") == tmp_path / "b/c/x"
    with pytest.raises(UserError, match="h/x is not there; download x.zip"):
        find(tmp_path, "h/x", "x.zip")


def test_find_passes_over_what_may_not_be_looked_at(tmp_path: Path) -> None:
    (tmp_path / "lost+found").mkdir(mode=0)
    (tmp_path / "unpacked/x").mkdir(parents=True)
    with without_rights(tmp_path):
        assert find(tmp_path, "x", "x.zip") == tmp_path / "unpacked/x"


def test_find_passes_over_links_that_lead_in_circles(tmp_path: Path) -> None:
    (tmp_path / "unpacked/x").mkdir(parents=True)
    (tmp_path / "a").symlink_to("a")
    assert find(tmp_path, "x", "x.zip") == tmp_path / "unpacked/x"


def test_a_picture_that_may_not_be_read_is_no_missing_one_and_looked_at_again(tmp_path: Path) -> None:
    path, root = tmp_path / "source/1.jpg", tmp_path / "root"
    miniatures.picture(path, 1)
    root.mkdir(mode=0o777)
    root.chmod(0o777)
    path.chmod(0)
    with without_rights(tmp_path / "source"):
        picture = scan_pictures(tmp_path / "source", ["1.jpg"], root)["1.jpg"]
    assert picture is not None and picture.fault == "cannot be read (Permission denied)"
    path.chmod(0o644)
    picture = scan_pictures(tmp_path / "source", ["1.jpg"], root)["1.jpg"]
    assert picture is not None and picture.fault == ""


def test_a_pipe_in_place_of_an_annotation_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "instances_train2017.json")
    for read in (read_bytes, read_objects):
        with pytest.raises(UserError, match="instances_train2017.json: is no regular file"):
            read(tmp_path / "instances_train2017.json")


def test_lines_part_only_at_line_feeds(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes("a\u2028b\r\n\x85c\x0bd\n\n \n".encode() + b"\xff\n\n")
    assert read_lines(tmp_path / "x") == ["a\u2028b", "c\x0bd", "", "", "\ufffd"]


def test_scan_forgets_nothing_of_other_protocols(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        miniatures.picture(tmp_path / "source" / f"{number}.jpg", number)
    (tmp_path / "root").mkdir()
    scan_pictures(tmp_path / "source", ["1.jpg", "2.jpg"], tmp_path / "root")
    found = scan_pictures(tmp_path / "source", ["2.jpg", "3.jpg", "4.jpg"], tmp_path / "root")
    assert found["4.jpg"] is None and set(found) == {"2.jpg", "3.jpg", "4.jpg"}
    assert [line[:8] for line in (tmp_path / "root" / JOURNAL).read_bytes().splitlines()] == [
        b'["1.jpg"',
        b'["2.jpg"',
        b'["3.jpg"',
    ]
