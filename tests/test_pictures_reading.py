"""Picture files: paths of other machines, modes, and every broken file with its message."""

import io
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import scipy.sparse
from PIL import Image

from common.errors import UserError
from dataset.pictures.reading import PictureFiles, resolve_paths
from runners.encoder import read_picture
from runners.search.service import thumbnail_of
from tests import datasets
from tests.datasets import ITEMS, pixels_of, refused


@pytest.fixture
def root(tmp_path):
    return datasets.write(tmp_path / "data")


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


@pytest.mark.parametrize(("written", "stored"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_in_the_other_normal_form_are_found(tmp_path, written, stored):
    places = [tmp_path / unicodedata.normalize(stored, name) for name in ("café/é.png", "plain/ü.png", "ö.png")]
    for place in places:
        place.parent.mkdir(exist_ok=True)
        place.touch()
    index = [unicodedata.normalize(written, name) for name in ("/them/café/é.png", "plain/ü.png", "ö.png")]
    assert resolve_paths(index, tmp_path, "index") == [str(place) for place in places]


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


@pytest.mark.parametrize("name", ["1.png", "1.tif", "1.pgm"])
def test_grey_of_16_bits_is_scaled(tmp_path, name):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    path = tmp_path / name
    if path.suffix == ".pgm":
        path.write_bytes(b"P5 8 8 65535\n" + (grey.astype(">u2") * 257).tobytes())
    else:
        Image.fromarray(grey.astype(np.uint16) * 257).save(path)
    expected = np.repeat(grey[..., None], 3, axis=2)
    assert np.array_equal(np.array(PictureFiles([str(path)], "index").read(0)), expected)
    assert np.array_equal(np.array(read_picture(path)), expected)
    with Image.open(path) as picture:
        assert np.array_equal(np.array(read_picture(picture)), expected)
    thumbnail = np.array(Image.open(io.BytesIO(thumbnail_of(str(path), 8))), int)
    assert np.abs(thumbnail - expected).max() < 40  # it is a JPEG


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_values_of_no_known_range_are_refused(tmp_path, kind):
    picture = Image.fromarray(np.arange(64).reshape(8, 8).astype(kind))
    picture.save(tmp_path / "1.tif")
    with pytest.raises(UserError, match=r"1\.tif .*says nowhere which of them is white; save it with 8 or 16 bits"):
        PictureFiles([str(tmp_path / "1.tif")], "index").read(0)
    with pytest.raises(UserError, match="the picture has real values"):
        read_picture(picture)


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
