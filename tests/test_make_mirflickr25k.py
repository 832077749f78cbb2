"""MIRFlickr-25K in small, against what its two protocols must make of it."""

from pathlib import Path

import pytest
from scipy.io import loadmat

from data.make_mirflickr25k import CLASSES, PROTOCOLS, collect
from data.preparation import run
from tests import miniatures


def make(folder: Path, protocol: str) -> Path:
    source, root = miniatures.mirflickr25k(folder / "source"), folder / "root"
    arguments = ["--source", str(source), "--root", str(root), "--protocol", protocol]
    assert run("mirflickr25k", "MIRFlickr-25K", PROTOCOLS, collect, arguments) == 0
    return root


def test_dcmht_takes_every_labelled_picture_by_number_as_text(tmp_path: Path) -> None:
    root = make(tmp_path, "dcmht")
    order = "1 10 100 11 12 13 14 15 16 17 18 19 2 20 21 22 3 4 5 6 7 8 9".split()
    index = loadmat(root / "index.mat")["index"]
    assert [path.rstrip() for path in index] == [f"mirflickr/im{number}.jpg" for number in order]

    caption = loadmat(root / "caption.mat")["caption"]
    assert caption.shape == (23, 1)  # one string a row, as the released files have it
    texts = {number: caption[row, 0].rstrip() for row, number in enumerate(order)}
    assert texts["1"] == "common nineteen nineteen"
    assert texts["3"] == "café 日本"
    assert texts["2"] == texts["10"] == ""  # an empty file and no file
    assert texts["100"] == "common"
    assert texts["22"] == "common nineteen"

    label = loadmat(root / "label.mat")
    assert label["category"].shape == (23, 24) and label["category"].dtype == "int64"
    assert (root / "labels.txt").read_text().split() == CLASSES == sorted(CLASSES)
    rows = {number: row for number, row in zip(order, label["category"], strict=True)}
    assert rows["1"].all()
    assert [CLASSES[column] for column in rows["100"].nonzero()[0]] == ["water"]
    assert [CLASSES[column] for column in rows["3"].nonzero()[0]] == ["sky"]


def test_mith_keeps_pictures_with_a_frequent_tag(tmp_path: Path) -> None:
    root = make(tmp_path, "mith")
    numbers = [1, *range(4, 10), *range(11, 23), 100]
    index = loadmat(root / "index.mat")["index"]
    assert [path.rstrip() for path in index] == [f"mirflickr/im{number}.jpg" for number in numbers]
    # `nineteen` is in 19 files, twice in one of them: 20 times, but not in 20 pictures.
    assert {text.rstrip() for text in loadmat(root / "caption.mat")["caption"][:, 0]} == {"common"}


def test_report_states_what_was_found_beside_the_known_figures(tmp_path: Path) -> None:
    report = (make(tmp_path, "dcmht") / "check.txt").read_text()
    rows = {line[:28].strip(): line[28:].split() for line in report.splitlines()}
    assert rows["pairs"] == ["23", "24,581", "<-", "differs"]
    assert rows["labels"] == ["24", "24"]
    assert rows["pairs without text"] == ["2"]
    assert rows["pictures without a tag file"] == ["1"]
    assert rows["tags without a picture"] == ["1"]
    assert rows["labels without items"] == ["0"]
    assert rows["pictures with equal bytes"] == ["1"]
    assert rows["picture modes"] == ["CMYK", "1,", "L", "1,", "RGB", "21"]
    assert rows["picture widths"] == ["40.00", "(40", "to", "40)"]  # as stored: EXIF rotation is not applied
    assert "sky 22;" in report and "water 2\n" in report


def test_pictures_are_found_from_the_output_folder(tmp_path: Path) -> None:
    root = make(tmp_path, "dcmht")
    for path in loadmat(root / "index.mat")["index"]:
        assert (root / path.rstrip()).is_file()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("sky.txt", "1\n2\n25001\n", "line 3 is no picture number"),
        ("sky.txt", "1\nsix\n", "line 2 is no picture number"),
        ("sky.txt", "1" * 5000, "line 1 is no picture number"),  # more digits than Python takes for a number
        ("tree.txt", "", "is empty"),
    ],
)
def test_damaged_label_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str, said: str
) -> None:
    source = miniatures.mirflickr25k(tmp_path / "source")
    (source / "mirflickr25k_annotations_v080" / name).write_text(content)
    assert run("m", "M", PROTOCOLS, collect, ["--source", str(source), "--root", str(tmp_path / "root")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and name in error and said in error
    assert not list((tmp_path / "root").glob("*.mat"))


def test_of_two_files_with_one_number_only_the_plain_name_counts(tmp_path: Path) -> None:
    source = miniatures.mirflickr25k(tmp_path / "source")
    whole = collect(source, "dcmht")
    for zeros in ("0", "00", "000"):
        miniatures.text(source / f"mirflickr/meta/tags/tags{zeros}1.txt", zeros)
    assert collect(source, "dcmht").captions == whole.captions


def test_missing_label_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = miniatures.mirflickr25k(tmp_path / "source")
    (source / "mirflickr25k_annotations_v080/river.txt").unlink()
    assert run("m", "M", PROTOCOLS, collect, ["--source", str(source), "--root", str(tmp_path / "root")]) == 2
    assert "river.txt: is not there" in capsys.readouterr().err


def test_annotations_unpacked_beside_the_pictures_are_found(tmp_path: Path) -> None:
    source = miniatures.mirflickr25k(tmp_path / "source")
    (source / "mirflickr25k_annotations_v080").rename(source / "mirflickr/annotations")
    assert len(collect(source, "dcmht").images) == 23
