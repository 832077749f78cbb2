"""Data sets of one's own: from a manifest to results, and what is refused with its line."""

import json
import re
import resource
import time
import unicodedata
from pathlib import Path
from typing import Any, Literal

import pytest
from PIL import Image

from common.config import load_dataset
from common.errors import UserError
from dataset.columns import WordColumn
from dataset.manifest import ManifestDataset
from runners.comparison import RunFolder
from runners.tables import write_summary
from tests import datasets
from tests.commands import ROOT, refused, run
from tests.processes import Forked

Form = Literal["NFC", "NFD"]  # of Unicode
WORDS = ("cat", "dog", "sofa")


def pictures(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        datasets.smooth_picture(number, 30, 24).save(folder / f"{number}.png")
    return folder


def rows_of(count: int, **more: Any) -> list[dict[str, Any]]:
    """Two to three labels and one to two texts a row; further columns as functions of the row."""
    rows = []
    for number in range(count):
        labels = [word for place, word in enumerate(WORDS) if (number + place) % 3]
        texts = [f"{' and '.join(labels)}, number {number}", "a picture"][: 1 + number % 2]
        row = {"image": f"{number}.png", "texts": texts, "labels": labels}
        rows.append({**row, **{column: value(number) for column, value in more.items()}})
    return rows


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def opened(path: Path, *settings: str) -> ManifestDataset:
    sizes = ("dataset.split.query=6", "dataset.split.train=10", "dataset.image_size=16", "dataset.text_length=12")
    section = load_dataset(ROOT / "configs/datasets/manifest.yaml", [f"dataset.file={path}", *sizes, *settings])
    return ManifestDataset(section)


def fenced(language: str) -> str:
    """The example of the page."""
    page = (ROOT / "docs/own-data.md").read_text()
    found = re.search(rf"^```{language}\n(.*?)^```", page, re.M | re.S)
    assert found is not None
    return found[1]


def test_the_example_of_the_page_runs(tmp_path: Path, tiny_overrides: list[str]) -> None:
    """Its five lines, its three lines of YAML, its two commands; the small CLIP and its sizes are the test's."""
    (tmp_path / "pets.jsonl").write_text(fenced("json"))
    for number in range(1, 6):
        datasets.smooth_picture(number, 40, 30).save(tmp_path / f"{number}.jpg")
    recipe = tmp_path / "pets.yaml"
    recipe.write_text(fenced("yaml"))
    code, out, err = run("--check-data", recipe, "--save-dir", tmp_path / "check")
    assert code == 0, err
    assert re.search(r"^cat +3 +60.0% ", out, re.M) and re.search(r"^sofa +2 +40.0% ", out, re.M)
    small = [entry for entry in tiny_overrides if entry.startswith(("model", "run.cache", "run.loader", "run.device"))]
    small += [entry for entry in tiny_overrides if entry.startswith(("dataset.image_size", "dataset.t"))]
    code, out, err = run("--config-file", recipe, "--save-dir", tmp_path / "run", *small)
    assert code == 0, err
    assert "DSPH on pets" in out
    code, out, err = run("--evaluate", tmp_path / "run/best.pt", f"dataset.file={tmp_path / 'pets.jsonl'}")
    assert code == 0, err


def test_what_rows_become(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "a", 20)
    rows = rows_of(20, image_caption=lambda number: f"drawing {number}", family=lambda number: number // 2, year=int)
    rows = [{**row, "image": f"a/{row['image']}"} for row in rows]
    data = opened(written(tmp_path / "m.jsonl", rows), "dataset.split.validation=4")
    assert list(data.label_names or ()) == ["dog", "sofa", "cat"] and data.names[3] == "a/3.png"
    names = [[list(data.label_names or ())[column] for column in row.nonzero()[:, 0]] for row in data.labels]
    assert [set(found) for found in names] == [set(row["labels"]) for row in rows]
    assert data.pictures.read(7).tobytes() == Image.open(folder / "7.png").convert("RGB").tobytes()
    sides = [{item // 2 for item in data.splits.items(split).tolist()} for split in ("query", "train", "validation")]
    assert not sides[0] & (sides[1] | sides[2]) and not sides[1] & sides[2]
    assert {"image", "text", "labels", "image_caption"} <= data.offers("query").keys()
    assert {"counterpart_image", "counterpart_caption"} <= data.offers("train").keys()

    (folder / "7.png").write_bytes(b"<html>")
    with pytest.raises(UserError, match=r"7\.png \(line 8 of .*m\.jsonl\) .*remove the line"):
        data.pictures.read(7)

    (tmp_path / "names.txt").write_text("sofa\ncat\ndog\nbird\n")
    ordered = opened(tmp_path / "m.jsonl", f"dataset.label_names={tmp_path / 'names.txt'}")
    assert ordered.labels.sum(0).tolist() == [13, 13, 14, 0] and list(ordered.label_names or ())[3] == "bird"


def test_the_split_column_is_obeyed(tmp_path: Path) -> None:
    pictures(tmp_path, 20)
    split = ["query"] * 5 + ["validation"] * 3 + ["database"] * 4 + ["train"] * 8
    path = written(tmp_path / "m.jsonl", rows_of(20, split=lambda number: split[number]))
    column = "dataset.split.protocol=column"
    with pytest.raises(UserError, match=r"set dataset.split.query=5 dataset.split.train=8 dataset.split.validation=3"):
        opened(path, column)
    sizes = (column, "dataset.split.query=5", "dataset.split.train=8", "dataset.split.validation=3")
    data = opened(path, *sizes)
    for name in ("query", "validation", "train"):
        assert data.splits.items(name).tolist() == [n for n in range(20) if split[n] == name]
    assert sorted(data.splits.database.tolist()) == list(range(5, 20))
    rows = rows_of(20, split=lambda number: split[number], family=lambda number: 0 if number in (4, 12) else number + 1)
    with pytest.raises(UserError, match=r"divides the family of row 12 .* put a family into one split"):
        opened(written(path, rows), *sizes)
    rows[3]["split"] = "test"
    with pytest.raises(
        UserError, match=r"m.jsonl, line 4: split is 'test'; .* write query, train, database, validation"
    ):
        opened(written(path, rows), *sizes)


def test_without_labels_pairs_are_what_is_measured(tmp_path: Path, tiny_overrides: list[str]) -> None:
    pictures(tmp_path, 40)
    rows = [{"image": row["image"], "texts": row["texts"]} for row in rows_of(40)]
    written(tmp_path / "m.jsonl", rows)
    recipe = tmp_path / "m.yaml"
    for name in ("UCCH", "DSPH"):
        bases = f"{ROOT}/configs/{name}/coco.yaml, {ROOT}/configs/datasets/manifest.yaml"
        (tmp_path / f"{name}.yaml").write_text(f"base: [{bases}]\ndataset: {{name: mine, file: m.jsonl}}\n")
    recipe = tmp_path / "UCCH.yaml"
    own = ("dataset.name", "dataset.root", "dataset.split", "model.backbone", "dataset.vocabulary")
    settings = [entry for entry in tiny_overrides if not entry.startswith(own)]
    settings += ["dataset.split.query=11", "dataset.split.train=20"]
    backbone = [entry for entry in tiny_overrides if entry.startswith("model.backbone")]
    small = ["model.image_hidden=[24]", "model.text_hidden=[]", "model.negatives=8"]
    command = ["--config-file", str(recipe), "--save-dir", str(tmp_path / "run"), *settings, *small, *backbone]
    assert "no labels, so there is no mAP to measure; set evaluate.pairs=true" in refused(*command)
    code, out, err = run(*command, "evaluate.pairs=true")
    assert code == 0, err
    results = json.loads((tmp_path / "run/results.json").read_text())
    numbers = results["best"]["reports"]["16"]
    assert set(numbers) == {f"{way}/{name}" for way in ("i2t", "t2i") for name in results["random_codes"]["16"]}
    assert 0 <= numbers["i2t/recall@1(expected)"] <= numbers["i2t/recall@10(expected)"] <= 1
    assert f"{numbers['t2i/median rank(expected)']:.4f}" in out and "mAP" not in out
    table = write_summary(tmp_path / "run", [RunFolder(tmp_path / "run")])  # what a sweep ends with
    assert f"T→I   UCCH          {numbers['t2i/recall@1(expected)']:.4f}" in table and "training-loss" in table
    line = refused(
        "--config-file",
        tmp_path / "DSPH.yaml",
        "--save-dir",
        tmp_path / "d",
        *settings,
        *backbone,
        "evaluate.pairs=true",
    )
    assert "has no 'labels' for the train split" in line and "choose an unsupervised method" in line


@pytest.mark.parametrize(("written_as", "stored_as"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_normal_forms_of_unicode_are_one(tmp_path: Path, written_as: Form, stored_as: Form) -> None:
    def name(number: int, form: Form) -> str:
        return unicodedata.normalize(form, f"café/é{number}.png")

    pictures(tmp_path, 18)
    (tmp_path / name(0, stored_as)).parent.mkdir()
    for number in range(18):
        (tmp_path / f"{number}.png").rename(tmp_path / name(number, stored_as))
    both: tuple[Form, Form] = ("NFC", "NFD")
    data = opened(
        written(
            tmp_path / "m.jsonl",
            rows_of(
                18,
                image=lambda number: name(number, written_as),
                labels=lambda number: unicodedata.normalize(both[number % 2], "café"),
                texts=lambda number: [unicodedata.normalize(both[number % 2], "un café, une auto")],
            ),
        ),
        "dataset.vocabulary=4",
    )
    assert data.pictures.read(3).size == (30, 24) and data.label_names == ["café"]
    column = data.columns["train"]["bag_of_words"]
    assert isinstance(column, WordColumn)
    assert sorted(column.words.vocabulary) == ["auto", "café", "un", "une"]


@pytest.mark.parametrize(
    ("rows", "settings", "expected"),
    [
        ([{"image": "0.png"}], (), "line 1: has no text"),
        ([{"text": "a"}], (), "line 1: has no image"),
        ([{"image": "0.png", "text": "a"}, {"image": "./0.png", "text": "b"}], (), "line 2: 0.png stands in line 1"),
        ([{"image": "0.png", "text": "a"}, {"image": "99.png", "text": "b"}], (), "line 2: picture '99.png' is not"),
        ([{"image": "/etc/passwd", "text": "a"}], (), "line 1: image '/etc/passwd' leads out of"),
        ([{"image": "0.png", "text": "a", "family": [1]}], (), "line 1: family is [1], not a string"),
        ([{"image": "0.png", "text": "a", "labels": "catt"}], ("names",), "'catt' is not in dataset.label_names; did"),
        ([], (), "has no rows"),
        ([{"image": "0.png", "caption": "a"}], (), "line 1: has no text, but 'caption': name that column text;"),
        (rows_of(18, labels=lambda row: [row % 2, 1 - row % 2]), (), "gives every row the labels 0 and 1, as if"),
        (rows_of(15), (), "6 query and 10 train pairs, but there are 15"),
        (rows_of(18, image_caption=lambda number: "x" if number else None), (), "line 1: has no image_caption"),
        (rows_of(18), ("dataset.split.protocol=column",), "line 1: has no split"),
    ],
)  # fmt: skip
def test_what_is_refused(tmp_path: Path, rows: list[dict[str, Any]], settings: tuple[str, ...], expected: str) -> None:
    pictures(tmp_path, 18)
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    entries = [f"dataset.label_names={tmp_path / 'names.txt'}" if entry == "names" else entry for entry in settings]
    with pytest.raises(UserError) as error:
        opened(written(tmp_path / "m.jsonl", rows), *entries)
    assert expected in str(error.value) and "\n" not in str(error.value)
    (tmp_path / "m.csv").write_bytes(b"image,text\n0.png,\xff\n")
    with pytest.raises(UserError, match=r"m.csv, line 2: is not UTF-8"):
        opened(tmp_path / "m.csv")
    with pytest.raises(UserError, match=r"no.jsonl of data set manifest is not there; set dataset.file"):
        opened(tmp_path / "no.jsonl")


def test_what_is_said_of_labels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    pictures(tmp_path, 18)
    opened(written(tmp_path / "m.jsonl", rows_of(18, labels=lambda row: ["cat", f"{row % 2}"])))
    assert "every pair has the label cat, so all are relevant to all" in caplog.text
    opened(written(tmp_path / "m.jsonl", [row | {"Label": "x"} for row in rows_of(18, labels=lambda _: None)]))
    assert "names no labels, but 'Label': name that column labels: for unsupervised methods" in caplog.text


def read_a_million(path: Path) -> None:
    # Time of the processor, memory beyond the parent's: others may be at work, and a fork begins with what it had.
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    data = opened(path)
    assert len(data) == 1_000_000 and data.labels.sum() == 2_000_000
    assert time.process_time() - start < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2 << 20  # KB


@pytest.mark.slow
def test_a_million_rows(tmp_path: Path) -> None:
    """In under a minute and 2 GB."""
    (tmp_path / "images").mkdir()
    with open(tmp_path / "m.jsonl", "w") as file:
        for number in range(1_000_000):
            name = f"images/{number:07}.jpg"
            (tmp_path / name).touch()
            labels = f'["c{number % 100}", "d{number % 7}"]'
            file.write(f'{{"image": "{name}", "text": "picture {number} of many", "labels": {labels}}}\n')
    process = Forked(read_a_million, tmp_path / "m.jsonl")
    process.join()
    assert process.exitcode == 0


def test_a_data_set_of_another_type_replaces_the_one_below(tmp_path: Path) -> None:
    """Settings of the .mat data set are unknown to a manifest; those of one type still merge."""
    assert load_dataset(ROOT / "configs/MITH/coco.yaml", []).split.seed == 1
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"base: [{ROOT}/configs/MITH/coco.yaml, {ROOT}/configs/datasets/manifest.yaml]\n"
                    "dataset: {file: x.jsonl, split: {query: 7}}\n")  # fmt: skip
    section = load_dataset(mine, [])
    assert section.type == "manifest" and section.split.query == 7 and section.split.train == 5000
    assert not hasattr(section, "query_counterpart")
