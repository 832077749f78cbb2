"""`main.py --check-data`, and data sets as others prepared them, from their files to batches."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

from common.config import DATASET_CONFIGS, load_dataset
from common.errors import UserError
from data import make_wiki, preparation
from dataset.check import SHEET, check_data, class_names, read_pictures, summary
from dataset.loader import build_loader
from dataset.mat import MatDataset
from dataset.texts.tokenizer import tokenize
from tests import commands, datasets, miniatures

ITEMS = datasets.ITEMS
CPU = torch.device("cpu")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return datasets.write(tmp_path / "data")


def overrides(root: Path, *more: str) -> list[str]:
    """`key=value` entries that put COCO's settings on the small data set."""
    small = [f"dataset.root={root}", "dataset.name=small", "dataset.split.query=6", "dataset.split.train=10"]
    return [*small, "dataset.text_length=12", "dataset.image_size=16", "dataset.vocabulary=5", *more]


def rows_of(text: str) -> dict[str, str]:
    """Rows of a table by their first cell."""
    return {cells[0].strip(): cells[1].strip() for line in text.splitlines() if len(cells := line.split("  ", 1)) == 2}


# ---------------------------------------------------------------------------------------------- what is told


def test_numbers_of_a_data_set(root: Path) -> None:
    captions = [datasets.captions_of(number) for number in range(ITEMS)]
    captions[3] = [""]
    captions[4] = ["a " * 40]
    scipy.io.savemat(root / "caption.mat", {"caption": datasets.cells(captions)})
    labels = np.hstack([datasets.labels_of(), np.zeros((ITEMS, 1), np.int8)])
    data = datasets.opened(root)
    unlabelled = int(data.splits.database[-1])
    labels[unlabelled] = 0
    scipy.io.savemat(root / "label.mat", {"category": labels})
    (root / "labels.txt").write_text("cat\ndog\nbird\nfish\nnothing\n")
    (root / "images" / "7.png").write_bytes(b"no picture")
    datasets.smooth_picture(0, 40, 31).save(root / "images" / "0.png")

    data = datasets.opened(root)
    text = summary(data, read_pictures(data), class_names(data))
    rows = rows_of(text)
    counts = labels.sum(axis=0)
    assert rows["pairs"] == "24" and rows["pairs: query"] == "6"
    assert rows["pairs: train"] == "10" and rows["pairs: database"] == "18"
    assert rows["split fingerprint"] == data.splits.fingerprint
    assert rows["pairs without label"] == "1" and rows["labels without pair"] == "1"
    assert rows["labels a pair"].startswith(f"0 to {labels.sum(axis=1).max()}, mean {labels.sum() / 24:.2f}")
    assert rows["captions a pair"].startswith("0 to 3") and rows["pairs without caption"] == "1"
    assert rows["tokens a caption"].startswith("2 to 12") and rows["tokens a caption"].endswith("1 of 12 or more")
    assert rows["pictures"] == "24" and rows["pictures missing or broken"] == "1"
    assert rows["picture widths"].startswith("24 to 40") and rows["picture heights"].startswith("24 to 31")
    assert rows["fields"] == "image, labels, text, bag_of_words"
    for name, count in zip(["cat", "dog", "bird", "fish", "nothing"], counts, strict=True):
        assert rows[name].split()[:2] == [str(count), f"{count / 24:.1%}"]
        assert rows[name].count("#") == round(40 * count / counts.max())


def test_word_vectors_instead_of_texts_and_labels_without_names(root: Path) -> None:
    scipy.io.savemat(root / "caption.mat", {"YAll": np.eye(ITEMS)})
    data = datasets.opened(root)
    rows = rows_of(summary(data, read_pictures(data), class_names(data)))
    assert "captions a pair" not in rows and rows["fields"] == "image, labels, bag_of_words"
    assert {"0", "1", "2", "3"} < set(rows)


def test_contact_sheet_shows_pairs_as_they_are(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(ITEMS):  # every picture a colour of its own
        Image.new("RGB", (30, 20), (10 * number, 250 - 10 * number, 7)).save(root / "images" / f"{number}.png")
    for folder in ("first", "second"):
        check_data("coco", overrides(root), tmp_path / folder)
    sheet = Image.open(tmp_path / "first" / SHEET)
    colours = {colour for _, colour in sheet.getcolors(1 << 24) or []}
    assert {(10 * number, 250 - 10 * number, 7) for number in range(ITEMS)} <= colours
    assert (tmp_path / "first" / SHEET).read_bytes() == (tmp_path / "second" / SHEET).read_bytes()
    assert f"contact sheet: {tmp_path / 'second' / SHEET}" in capsys.readouterr().out
    scipy.io.savemat(root / "caption.mat", {"caption": datasets.cells([["other words"]] * ITEMS)})
    check_data("coco", overrides(root), tmp_path / "second")
    assert (tmp_path / "first" / SHEET).read_bytes() != (tmp_path / "second" / SHEET).read_bytes()


# ---------------------------------------------------------------------------------------------- the command line


def test_command_line(root: Path, tmp_path: Path) -> None:
    code, out, err = commands.run("--check-data", "coco", "--save-dir", tmp_path / "check", *overrides(root))
    assert code == 0, err
    assert rows_of(out)["pairs"] == "24" and (tmp_path / "check" / SHEET).is_file()


def test_broken_pictures_are_counted_shown_and_end_in_one_line(root: Path, tmp_path: Path) -> None:
    for number in (5, 9):
        path = root / "images" / f"{number}.png"
        path.write_bytes(path.read_bytes()[:70])
    code, out, err = commands.run("--check-data", "coco", "--save-dir", tmp_path / "check", *overrides(root))
    assert code == 2 and rows_of(out)["pictures missing or broken"] == "2"
    (line,) = (line for line in err.splitlines() if line.startswith("error: "))
    assert "2 of 24 pictures of small are missing or broken, the first: picture" in line and "5.png" in line
    assert "9.png (row 9 of" in err and "Traceback" not in err
    assert (tmp_path / "check" / SHEET).is_file()


@pytest.mark.parametrize(
    ("name", "more", "match"),
    [
        ("coca", (), r"--check-data coca: neither a YAML file nor one of coco, .*did you mean 'coco'"),
        ("zzz", (), r"--check-data zzz: neither .*name one of these"),
        ("nowhere/coco.yaml", (), r"config file nowhere/coco\.yaml cannot be read"),
        ("coco", ("model.bits=16",), r"'model\.bits=16' on the command line: only dataset\.key=value"),
        ("coco", ("dataset.rot=1",), r"dataset\.rot: unknown key; did you mean 'root'"),
        ("coco", ("dataset.root=/nowhere",), r"data folder /nowhere of data set coco is missing"),
        ("coco", ("dataset.type=met",), r"dataset\.type: unknown"),
    ],
)
def test_mistakes(name: str, more: tuple[str, ...], match: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=match) as error:
        check_data(name, list(more), tmp_path)
    assert "\n" not in str(error.value)


def test_names_of_labels_that_do_not_fit(root: Path, tmp_path: Path) -> None:
    (root / "labels.txt").write_text("cat\ndog\n")
    with pytest.raises(UserError, match=r"labels\.txt names 2 labels, but the label file has 4"):
        check_data("coco", overrides(root), tmp_path)


def test_every_data_set_of_the_repository_has_valid_settings_also_inside_a_run() -> None:
    for path in DATASET_CONFIGS.glob("*.yaml"):
        assert load_dataset(path, []).name == path.stem
    whole = load_dataset(DATASET_CONFIGS.parent / "MITH" / "coco.yaml", ["dataset.split.seed=5"])
    assert whole.name == "coco" and whole.split.seed == 5


# ---------------------------------------------------------------------------------------------- prepared by others


def first_batch(data: MatDataset, split: Any = "train") -> Any:
    loader = build_loader(
        data, split, frozenset({"image", "text", "labels"}), batch_size=4, seed=1, device=CPU, kind="workers",
        workers=0, caption="first",
    )  # fmt: skip
    return next(loader.once())


def check_rows(data: MatDataset, captions: list[str], label_matrix: Any) -> None:
    """The first batch of the training split holds the pairs that its items name."""
    batch, items = first_batch(data), data.splits.train[:4].tolist()
    assert batch["image"].shape == (4, 3, 16, 16) and batch["labels"].dtype == torch.float32
    assert torch.equal(batch["text"], tokenize([captions[item] for item in items], 12))
    assert batch["labels"].tolist() == label_matrix[items].tolist()
    for item in items:
        assert np.array_equal(np.array(data.pictures.read(item)), np.array(datasets.smooth_picture(item, 24, 24)))


def test_files_of_mith(root: Path) -> None:
    """Paths of the authors' machine as [N] strings, one caption an item as [N] strings, `label` in float32."""
    texts = [datasets.captions_of(number)[0] for number in range(ITEMS)]
    paths = np.array([f"/home/them/dataset/coco/images/{number}.png" for number in range(ITEMS)])
    for name in ("index.mat", "caption.mat", "label.mat"):
        (root / name).unlink()
    scipy.io.savemat(root / "index.mat", {"index": paths})
    scipy.io.savemat(root / "caption.mat", {"caption": np.array(texts)})
    scipy.io.savemat(root / "label.mat", {"label": datasets.labels_of().astype(np.float32)})
    check_rows(datasets.opened(root), texts, datasets.labels_of())


@pytest.mark.parametrize("kind", ["cells", "column", "text file"])
def test_files_of_dcmht(kind: str, root: Path) -> None:
    """Absolute paths written by a path-changing script; captions as each of its data sets has them; `category`."""
    texts = [datasets.captions_of(number)[0] for number in range(ITEMS)]
    paths = np.array([f"{root}/images/{number}.png".ljust(200 + number % 3) for number in range(ITEMS)])
    scipy.io.savemat(root / "index.mat", {"index": paths})
    dtypes = {"cells": np.int64, "column": np.float64, "text file": np.int8}
    scipy.io.savemat(root / "label.mat", {"category": datasets.labels_of().astype(dtypes[kind])})
    if kind == "column":
        scipy.io.savemat(root / "caption.mat", {"caption": np.array(texts)[:, None]})
    elif kind == "text file":
        (root / "caption.mat").unlink()
        (root / "caption.txt").write_text("".join(f"{text}\n" for text in texts))
    check_rows(datasets.opened(root), texts, datasets.labels_of())


def test_absolute_paths_outside_the_root_and_after_a_move(root: Path, tmp_path: Path) -> None:
    """The files lie in one folder, the pictures in another: named absolutely, or by `dataset.image_root` once moved."""
    elsewhere = (root / "images").rename(tmp_path / "elsewhere")
    scipy.io.savemat(root / "index.mat", {"index": [f"{elsewhere}/{number}.png" for number in range(ITEMS)]})
    texts = [datasets.captions_of(number)[0] for number in range(ITEMS)]
    with pytest.raises(UserError, match=r"24 of 24 pictures are missing: it lies outside; set dataset\.image_root"):
        datasets.opened(root)
    check_rows(datasets.opened(root, image_root="/"), texts, datasets.labels_of())
    moved = elsewhere.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"24 of 24 pictures are missing: set dataset\.image_root"):
        datasets.opened(root)
    check_rows(datasets.opened(root, image_root=str(moved)), texts, datasets.labels_of())


def test_wikipedia_from_the_archive_to_the_published_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, root = miniatures.wiki(tmp_path / "source"), tmp_path / "root"
    protocols = make_wiki.PROTOCOLS
    arguments = ["--source", str(source), "--root", str(root)]
    assert preparation.run("wiki", "Wikipedia", protocols, make_wiki.collect, arguments) == 0
    whole = load_dataset(DATASET_CONFIGS / "wiki.yaml", [])
    known = protocols["cfrh"].known
    assert (whole.split.query, whole.split.train) == (known["testset"], known["trainset"])
    small = [f"dataset.root={root}", "dataset.split.query=2", "dataset.split.train=3"]
    splits = MatDataset(load_dataset(DATASET_CONFIGS / "wiki.yaml", small)).splits
    assert splits.query.tolist() == [3, 4]
    assert splits.train.tolist() == splits.database.tolist() == [0, 1, 2]
    check_data("wiki", small, tmp_path / "check")
    rows = rows_of(capsys.readouterr().out)
    assert rows["pairs without caption"] == "1" and rows["geography"].startswith("2")
