"""The Wikipedia set in small, against what must come of it."""

from pathlib import Path

import pytest
from scipy.io import loadmat

from data.make_wiki import CLASSES, PROTOCOLS, collect
from data.preparation import run
from tests import miniatures


def prepare(source: Path, root: Path) -> int:
    return run("wiki", "Wikipedia", PROTOCOLS, collect, ["--source", str(source), "--root", str(root)])


def test_pairs_in_the_order_of_the_lists(tmp_path: Path) -> None:
    source, root = miniatures.wiki(tmp_path / "source"), tmp_path / "root"
    assert prepare(source, root) == 0
    images = "art/i1 warfare/i2 geography/i3 geography/i4 biology/i5".split()
    assert [path.rstrip() for path in loadmat(root / "index.mat")["index"]] == [
        f"wikipedia_dataset/images/{image}.jpg" for image in images
    ]
    caption = loadmat(root / "caption.mat")["caption"]
    assert caption.shape == (1, 5)
    assert [[text.rstrip() for text in item] for item in caption[0]] == [
        ["About aa-1."],
        ["Tom & Jérôme went & saw."],
        [""],
        ["About dd-4."],
        ["About ee-5."],
    ]
    category = loadmat(root / "label.mat")["category"]
    assert [[CLASSES[column] for column in row.nonzero()[0]] for row in category] == [
        ["art"],
        ["warfare"],
        ["geography"],
        ["geography"],
        ["biology"],
    ]
    rows = {line[:28].strip(): line[28:].split() for line in (root / "check.txt").read_text().splitlines()}
    assert rows["trainset"] == ["3", "2,173", "<-", "differs"]
    assert rows["testset"] == ["2", "693", "<-", "differs"]
    assert rows["labels without items"] == ["6"]
    assert rows["pairs without text"] == ["1"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("testset_txt_img_cat.list", "dd-4\ti4\t3\nee-5\ti", "line 2 is not text, picture, category"),
        ("testset_txt_img_cat.list", "dd-4\ti4\t11\n", "line 1 is not text, picture, category"),
        ("testset_txt_img_cat.list", "", "testset_txt_img_cat.list: is empty"),
        ("testset_txt_img_cat.list", "dd-4\0\ti4\t3\n", "line 1 has a NUL character"),
        ("texts/dd-4.xml", "<article><text>About d", "dd-4.xml: has no whole <text>"),
    ],
)
def test_damaged_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str, said: str) -> None:
    source = miniatures.wiki(tmp_path / "source")
    (source / "wikipedia_dataset" / name).write_text(content)
    assert prepare(source, tmp_path / "root") == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_missing_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = miniatures.wiki(tmp_path / "source")
    (source / "wikipedia_dataset/texts/ee-5.xml").unlink()
    assert prepare(source, tmp_path / "root") == 2
    assert "ee-5.xml: cannot be read" in capsys.readouterr().err.splitlines()[-1]
