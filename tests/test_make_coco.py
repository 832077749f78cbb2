"""COCO in small, against what must come of it; and its JSON reader against files that are cut at every byte."""

import json
from pathlib import Path

import pytest
from scipy.io import loadmat

from common.errors import UserError
from data import make_coco
from data.make_coco import PROTOCOLS, collect, read_captions, read_json, read_objects
from data.preparation import run
from tests import miniatures

TWO, CAR = '{"id": 2, "file_name": "a.jpg"}', '{"id": 3, "name": "car"}'


def prepare(source: Path, root: Path, *more: str) -> int:
    return run("coco", "MS COCO 2017", PROTOCOLS, collect, ["--source", str(source), "--root", str(root), *more])


def test_pairs_captions_and_labels(tmp_path: Path) -> None:
    source, root = miniatures.coco(tmp_path / "source"), tmp_path / "root"
    assert prepare(source, root) == 0
    index = [path.rstrip() for path in loadmat(root / "index.mat")["index"]]
    assert index == [f"train2017/{number:012}.jpg" for number in (3, 7, 9, 25, 581)] + ["val2017/000000000008.jpg"]
    caption = loadmat(root / "caption.mat")["caption"]
    assert caption.dtype == object and caption.shape == (1, 6)
    assert [[text.rstrip() for text in item] for item in caption[0]] == [
        [""],  # a picture without captions keeps its place
        ["seven"],
        ["Grüße 😀"],
        ["A car and a person.", "second", "third"],
        ["one"],
        ["brushing", 'a "quoted" \\ caption'],
    ]
    label = loadmat(root / "label.mat")
    assert (root / "labels.txt").read_text().split() == ["car", "person", "toothbrush"]  # the file's order
    assert label["category"].tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 1, 0], [0, 1, 1]]


def test_report(tmp_path: Path) -> None:
    assert prepare(miniatures.coco(tmp_path / "source"), tmp_path / "root") == 0
    rows = {line[:28].strip(): line[28:].split() for line in (tmp_path / "root/check.txt").read_text().splitlines()}
    assert rows["train2017"] == ["5", "117,266", "<-", "differs"]
    assert rows["val2017"] == ["1", "4,952", "<-", "differs"]
    assert rows["pictures without an object"] == ["2"]
    assert rows["captions"] == ["8"]
    assert rows["pairs without text"] == ["1"]
    assert rows["captions a pair"] == ["1.33", "(0", "to", "3)"]
    assert rows["picture modes"] == ["L", "1,", "RGB", "5"]


def test_reader_gives_the_same_for_any_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = miniatures.coco(tmp_path) / "annotations/captions_train2017.json"
    whole = read_captions(path)
    for window in (1, 2, 3, 17):
        monkeypatch.setattr(make_coco, "BUFFER", window)
        assert read_captions(path) == whole


def test_reader_takes_any_json_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_coco, "BUFFER", 5)
    path = tmp_path / "x.json"
    value: dict[str, object] = {
        "n": -12.5e3,
        "t": True,
        "none": None,
        "s": 'a]}\\"é',
        "empty": [],
        "deep": [[{"a": [1]}], 7],
        "o": {"": {}},
    }
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")
    seen: list[object] = []
    read_json(path, {"deep": seen.append, "empty": seen.append})
    assert seen == [[{"a": [1]}], 7]


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    source = miniatures.coco(tmp_path)
    path = source / "annotations/instances_val2017.json"
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match="instances_val2017.json: ends in the middle"):
            read_objects(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"images": [], "annotations": []}', "has no list categories"),
        ("[1, 2]", "is damaged"),
        ('{"images": [{"id": 1}], "annotations": [], "categories": []}', "is damaged"),
        ('{"images": [7], "annotations": [], "categories": []}', "is damaged"),
        (
            f'{{"images": [], "annotations": [{{"image_id": {10**30}, "category_id": 1}}], "categories": []}}',
            "is damaged",
        ),
        ('{"images": [], "annotations": [{"image_id": 5, "category_id": 1}], "categories": []}', "names picture 5"),
        ('{"images": [], "annotations": [], "categories": []}', "has no object"),
        ('{"images": [], "annotations": [], "categories": []} [', "is damaged .something stands behind its end"),
        ('{"images": ' + "[" * 100_000, "is damaged .*recursion"),
        (f'{{"images": [{TWO}, {TWO}], "annotations": [], "categories": []}}', "picture 2 is listed twice"),
        ('{"images": [{"id": 1, "file_name": null}], "annotations": [], "categories": []}', "file_name is None"),
        (
            '{"images": [], "annotations": [{"image_id": 5, "category_id": true}], "categories": []}',
            "category_id is True",
        ),
        (f'{{"images": [], "annotations": [], "categories": [{CAR}, {CAR}]}}', "category 3 'car' is listed twice"),
    ],
)
def test_damaged_json(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "instances_train2017.json"
    path.write_text(content)
    with pytest.raises(UserError, match=said):
        read_objects(path)


@pytest.mark.parametrize("entry", ['"image_id": "one", "caption": "a cat"', '"image_id": 1, "caption": null'])
def test_a_caption_without_text_or_picture(tmp_path: Path, entry: str) -> None:
    path = tmp_path / "captions_train2017.json"
    path.write_text(f'{{"annotations": [{{{entry}}}]}}')
    with pytest.raises(UserError, match="captions_train2017.json: is damaged"):
        read_captions(path)


def test_rubbish_in_the_middle_is_refused_within_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make_coco, "BUFFER", 64)
    monkeypatch.setattr(make_coco, "LARGEST", 256)
    path = tmp_path / "captions_train2017.json"
    path.write_text('{"annotations": [\x00' + "x" * 100_000 + "]}")
    with pytest.raises(UserError, match="is damaged"):
        read_captions(path)


@pytest.mark.parametrize("missing", ["train2017", "val2017", "annotations"])
def test_missing_archive(tmp_path: Path, capsys: pytest.CaptureFixture[str], missing: str) -> None:
    source = miniatures.coco(tmp_path / "source")
    (source / missing).rename(tmp_path / "elsewhere")
    assert prepare(source, tmp_path / "root") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert missing in error and ".zip" in error
