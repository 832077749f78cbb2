"""NUS-WIDE in small, against what its three protocols must make of it."""

from pathlib import Path

import pytest
from scipy.io import loadmat

from data import make_nuswide
from data.make_nuswide import PROTOCOLS, TC10, TC21, collect
from data.preparation import run
from tests import miniatures

EXPECTED = {
    "dcmht": [
        ("actor/0001_11.jpg", "blue sky", {"sky", "person"}),
        ("beach/0003_13.jpg", "123456", {"beach"}),
        ("lake/0004_14.jpg", "été 日本", {"lake", "water"}),
        ("lake/0005_15.jpg", "tree green", {"tree"}),
        ("sky/0006_11.jpg", "blue moon sun", {"window"}),
    ],
    "mith": [
        ("actor/0001_11.jpg", "blue sky", {"sky", "person"}),
        ("lake/0005_15.jpg", "tree", {"tree"}),
        ("sky/0006_11.jpg", "blue sun", {"window"}),
    ],
    "tc10": [
        ("actor/0001_11.jpg", "blue sky", {"sky", "person"}),
        ("lake/0004_14.jpg", "", {"lake", "water"}),
        ("sky/0006_11.jpg", "blue sun", {"window"}),
    ],
}


def prepare(source: Path, root: Path, *more: str) -> int:
    return run("nuswide", "NUS-WIDE", PROTOCOLS, collect, ["--source", str(source), "--root", str(root), *more])


@pytest.mark.parametrize("protocol", EXPECTED)
def test_protocol(tmp_path: Path, protocol: str) -> None:
    source, root = miniatures.nuswide(tmp_path / "source"), tmp_path / "root"
    assert prepare(source, root, "--protocol", protocol) == 0
    index = loadmat(root / "index.mat")["index"]
    caption = loadmat(root / "caption.mat")["caption"]
    category = loadmat(root / "label.mat")["category"]
    assert caption.dtype == object and caption.shape == (1, len(index))
    classes = TC10 if protocol == "tc10" else TC21
    found = [
        (path.rstrip(), " ".join(text.rstrip() for text in texts), {classes[column] for column in row.nonzero()[0]})
        for path, texts, row in zip(index, caption[0], category, strict=True)
    ]
    assert found == [(f"Flickr/{path}", text, labels) for path, text, labels in EXPECTED[protocol]]
    assert category.shape[1] == len(classes) and classes == sorted(classes)


def test_matrix_of_frequent_tags_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = miniatures.nuswide(tmp_path / "source")
    whole = collect(source, "mith")
    monkeypatch.setattr(make_nuswide, "ROWS_AT_A_TIME", 7)  # cuts within rows
    assert collect(source, "mith").captions == whole.captions


def test_last_lines_may_lack_their_end(tmp_path: Path) -> None:
    source = miniatures.nuswide(tmp_path / "source")
    whole = collect(source, "mith")
    for name in ("NUS_WID_Tags/AllTags1k.txt", "NUS_WID_Tags/TagList1k.txt", "ImageList/Imagelist.txt"):
        (source / name).write_bytes((source / name).read_bytes().rstrip())
    assert collect(source, "mith").captions == whole.captions


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        ("Groundtruth/AllLabels/Labels_lake.txt", "0\n", "", "Labels_lake.txt: has 1 lines, Imagelist.txt 6"),
        ("Groundtruth/AllLabels/Labels_lake.txt", "1\n", "-1130179\n", "Labels_lake.txt: line 4 is neither 0 nor 1"),
        ("NUS_WID_Tags/All_Tags.txt", "12 ", "99 ", "All_Tags.txt: line 2 is of picture 99"),
        ("NUS_WID_Tags/All_Tags.txt", "14      été 日本 \n", "", "All_Tags.txt: has 5 lines, Imagelist.txt 6"),
        ("NUS_WID_Tags/AllTags1k.txt", "1\t0\t0\t1\t\n", "", "AllTags1k.txt: has 5 lines, Imagelist.txt 6"),
        ("NUS_WID_Tags/AllTags1k.txt", "1\t0\t0\t1\t\n", "1\t0\t", "AllTags1k.txt: line 6 has not 4 values"),
        ("NUS_WID_Tags/AllTags1k.txt", "1\t1\t0\t0\t\n", "1\t2\t0\t0\t\n", "AllTags1k.txt: line 1 has values other"),
        ("NUS_WID_Tags/TagList1k.txt", "sun\r\n", "", "AllTags1k.txt: line 1 has not 3 values"),
        ("NUS_WID_Tags/TagList1k.txt", "blue\r\nsky\r\ntree\r\nsun\r\n", "", "TagList1k.txt: is empty"),
        ("ImageList/Imagelist.txt", "actor\\0001", "actor\\\0", "Imagelist.txt: line 1 has a NUL character"),
    ],
)
def test_damaged_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, old: str, new: str, said: str
) -> None:
    source = miniatures.nuswide(tmp_path / "source")
    content = (source / name).read_bytes()
    assert old.encode() in content
    (source / name).write_bytes(content.replace(old.encode(), new.encode()))
    protocol = "mith" if "1k" in name else "dcmht"
    assert prepare(source, tmp_path / "root", "--protocol", protocol) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and said in error
    assert not list((tmp_path / "root").glob("*.mat"))
