"""IAPR TC-12 in small, against what its protocols must make of it."""

from pathlib import Path

import numpy as np
import pytest
import scipy.io
from scipy.io import loadmat

from data.make_iaprtc12 import PROTOCOLS, collect
from data.preparation import run
from tests import miniatures


def prepare(source: Path, root: Path, protocol: str) -> int:
    arguments = ["--source", str(source), "--root", str(root), "--protocol", protocol]
    return run("iaprtc12", "IAPR TC-12", PROTOCOLS, collect, arguments)


def read(root: Path) -> list[tuple[str, str, list[int]]]:
    index, caption, label = (loadmat(root / f"{name}.mat") for name in ("index", "caption", "label"))
    rows = zip(index["index"], caption["caption"][0], label["category"], strict=True)
    return [(path.rstrip(), texts[0].rstrip(), row.nonzero()[0].tolist()) for path, texts, row in rows]


def test_distributed_labels_meet_the_descriptions_of_their_pictures(tmp_path: Path) -> None:
    source, root = miniatures.iaprtc12(tmp_path / "source"), tmp_path / "root"
    assert prepare(source, root, "dcmh") == 0
    assert read(root) == [
        ("images/40/40000.jpg", "a lake", [3]),
        ("images/01/1004.jpg", "", [0]),
        ("images/00/25.jpg", "a yellow building; two palm trees", [254]),
        ("images/00/60.jpg", "café & bar", [3]),
        ("images/01/1003.jpg", "", [7]),
    ]
    report = (root / "check.txt").read_text()
    rows = {line[:28].strip(): line[28:].split() for line in report.splitlines()}
    assert rows["pairs"] == ["5", "20,000", "<-", "differs"] and rows["labels"] == ["255", "255"]
    assert rows["pictures in the archive"] == ["5"] and rows["without annotation file"] == ["1"]
    assert (root / "labels.txt").read_text().splitlines()[254] == "label 255"


def test_lear_takes_its_lists_and_words(tmp_path: Path) -> None:
    source, root = miniatures.iaprtc12(tmp_path / "source"), tmp_path / "root"
    assert prepare(source, root, "lear") == 0
    assert read(root) == [
        ("images/00/25.jpg", "a yellow building; two palm trees", [0, 2]),
        ("images/40/40000.jpg", "a lake", [1]),
        ("images/01/1004.jpg", "", [2]),
    ]
    assert (root / "labels.txt").read_text().split() == ["building", "lake", "palm"]


def damage_labels(source: Path) -> None:
    scipy.io.savemat(source / "labelList.mat", {"labels": np.ones((5, 254), np.uint8)})


def damage_text(source: Path) -> None:
    (source / "annotations_complete_eng/00/25.eng").write_text("<DOC><DESCRIPTION>a yellow")


def lose_labels(source: Path) -> None:
    (source / "labelList.mat").unlink()


def ambiguous(source: Path) -> None:
    miniatures.picture(source / "images/02/1004.jpg", 7)


def cut(source: Path) -> None:
    path = source / "lear/iaprtc12_train_annot.hvecs"
    path.write_bytes(path.read_bytes()[:-1])


def fewer_labels(source: Path) -> None:
    scipy.io.savemat(source / "labelList.mat", {"labels": np.ones((4, 255), np.uint8)})


def more_labels(source: Path) -> None:
    scipy.io.savemat(source / "labelList.mat", {"labels": np.ones((6, 255), np.uint8)})


def empty_list(source: Path) -> None:
    for name in ("iaprtc12_train_list.txt", "iaprtc12_train_annot.hvecs"):
        (source / "lear" / name).write_bytes(b"")


def not_binary(source: Path) -> None:
    path = source / "lear/iaprtc12_train_annot.hvecs"
    path.write_bytes(path.read_bytes()[:-2] + b"\x05\x00")


@pytest.mark.parametrize(
    ("protocol", "damage", "said"),
    [
        ("dcmh", damage_labels, "the label file has 254 labels, protocol dcmh 255"),
        ("dsph", lambda source: None, "the label file has 255 labels, protocol dsph 291"),
        ("dcmh", damage_text, "25.eng: has no whole <DESCRIPTION>"),
        ("dcmh", lose_labels, "--protocol lear"),
        ("dcmh", ambiguous, "'1004.jpg' of the list may be 01/1004 or 02/1004"),
        ("dcmh", fewer_labels, "labelList.mat (labels) has labels of 4 items"),
        ("dcmh", more_labels, "labelList.mat (labels) has labels of 6 items"),
        ("lear", cut, "has 15 bytes, not 16 for 3 words and the 2 pictures listed"),
        ("lear", empty_list, "iaprtc12_train_list.txt: is empty"),
        ("lear", not_binary, "is no matrix of 0 and 1 with 3 columns"),
    ],
)
def test_damaged_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], protocol: str, damage: object, said: str
) -> None:
    source = miniatures.iaprtc12(tmp_path / "source")
    assert callable(damage)
    damage(source)
    assert prepare(source, tmp_path / "root", protocol) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and said in error
    assert not list((tmp_path / "root").glob("*.mat"))


def test_files_that_papers_pass_on_are_neither_replaced_nor_confused_with_our_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = miniatures.iaprtc12(tmp_path / "source")
    for old, new in (("imgList.mat", "index.mat"), ("labelList.mat", "label.mat")):
        (source / old).rename(source / new)
    theirs = (source / "label.mat").read_bytes()
    assert prepare(source, source, "dcmh") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "index.mat: was not made by this script" in error and "--root" in error
    assert (source / "label.mat").read_bytes() == theirs

    (source / "passed on").mkdir()
    for name in ("index.mat", "label.mat"):
        (source / name).rename(source / "passed on" / name)
    assert prepare(source, source, "lear") == 0
    assert prepare(source, source, "dcmh") == 0  # not from the files of `lear`, which are nearer
    assert len(read(source)) == 5
