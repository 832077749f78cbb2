"""The embedded data set `openmoji`: layout, texts, labels, repeatability, and no half of it is ever left behind."""

import hashlib
import importlib.metadata
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

from common.errors import UserError
from common.yaml_layers import read_yaml
from data import make_openmoji
from data.make_openmoji import LABELS, SETTINGS, STAMP, Drawing, distinct, label_drawings, make, read_drawings
from data.mat_files import write_mat
from dataset.openmoji import OpenmojiConfig, OpenmojiDataset
from dataset.splits import make_splits
from tests.datasets import permutation
from tests.disks import small_disk_at
from utils.files import LOCK

REPOSITORY = Path(__file__).resolve().parents[1]


def digests(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def load(root: Path, file: str, key: str) -> np.ndarray:
    return scipy.io.loadmat(root / file)[key]


@pytest.fixture(scope="session")
def openmoji(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "openmoji"
    make(root, size=32, workers=1)
    return root


@pytest.fixture
def few_drawings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first drawings, and a table that fits them: for what does not depend on the number."""
    drawings = read_drawings()[:12]
    monkeypatch.setattr(make_openmoji, "read_drawings", lambda: drawings)
    monkeypatch.setattr(make_openmoji, "label_drawings", lambda items, table: np.ones((len(items), len(table)), int))


def drawing(code: str, name: str = "name", keywords: tuple[str, ...] = ("keyword",)) -> Drawing:
    return Drawing(code, name, "subgroup", keywords, (name,))


def test_layout_is_that_of_the_benchmark_sets(openmoji: Path) -> None:
    index = load(openmoji, "index.mat", "index")
    captions = load(openmoji, "caption.mat", "caption")
    labels = load(openmoji, "label.mat", "category")
    image_captions = load(openmoji, "image_caption.mat", "image_caption")
    count = len(index)
    assert 1800 < count < 1900
    assert index.shape == (count,) and index.dtype.kind == "U"
    assert captions.shape == (1, count) and captions.dtype == object
    assert all(cell.ndim == 1 and cell.dtype.kind == "U" for cell in captions[0])
    assert labels.shape == (count, len((openmoji / "labels.txt").read_text().splitlines()))
    assert image_captions.shape == (count,) and image_captions.dtype.kind == "U"
    assert load(openmoji, "family.mat", "family").shape == (count, 1)
    assert {f"images/{path.name}" for path in (openmoji / "images").iterdir()} == {path.strip() for path in index}


def test_pictures_are_rgb_on_white_and_all_different(openmoji: Path) -> None:
    seen = set()
    for path in sorted((openmoji / "images").iterdir()):
        with Image.open(path) as picture:
            assert picture.mode == "RGB" and picture.size == (32, 32)
            pixels = np.asarray(picture)
        assert pixels.min() < 250, f"{path.name} is blank"
        seen.add(pixels.tobytes())
    assert len(seen) == len(list((openmoji / "images").iterdir()))
    grinning = np.asarray(Image.open(openmoji / "images" / "1F600.png"))
    assert (grinning[0, 0] == 255).all() and grinning[15, 9].tolist() == [252, 234, 43]


def test_labels_are_common_enough_and_everywhere(openmoji: Path) -> None:
    labels = load(openmoji, "label.mat", "category")
    assert set(np.unique(labels)) == {0, 1}
    assert labels.sum(axis=0).min() >= 35
    assert labels.sum(axis=1).min() >= 1
    assert 1.5 < labels.sum(axis=1).mean() < 2
    assert len({column.tobytes() for column in labels.T}) == labels.shape[1]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("1F600", {"happy face", "face"}),
        ("1F469-200D-1F52C", {"person", "woman", "worker"}),
        ("1F1F8-1F1EE", {"flag"}),
        ("2642", {"sign or symbol"}),
        ("1F421", {"animal", "water"}),
        ("1F37C", {"food or drink", "drink or dish"}),
    ],
)
def test_labels_of_known_drawings(openmoji: Path, code: str, expected: set[str]) -> None:
    row = [path.strip() for path in load(openmoji, "index.mat", "index")].index(f"images/{code}.png")
    names = np.array((openmoji / "labels.txt").read_text().splitlines())
    assert set(names[load(openmoji, "label.mat", "category")[row] > 0]) == expected


def test_captions_begin_with_the_name_and_are_several(openmoji: Path) -> None:
    names = {item.code: item.name for item in read_drawings()}
    index = [Path(path.strip()).stem for path in load(openmoji, "index.mat", "index")]
    for code, cell in zip(index, load(openmoji, "caption.mat", "caption")[0], strict=True):
        texts = [text.strip() for text in cell]
        assert texts[0] == names[code]
        assert 2 <= len(texts) <= 5
        assert all(texts) and len(set(texts)) == len(texts)


def test_image_captions_differ_from_the_captions_where_there_is_more_to_say(openmoji: Path) -> None:
    captions = load(openmoji, "caption.mat", "caption")[0]
    image_captions = [text.strip() for text in load(openmoji, "image_caption.mat", "image_caption")]
    assert all(image_captions)
    repeated = sum(
        text.lower() in {caption.strip().lower() for caption in cell}
        for text, cell in zip(image_captions, captions, strict=True)
    )
    assert repeated < 0.1 * len(image_captions)


def test_a_complete_data_set_is_left_alone_and_another_size_replaces_it(few_drawings: None, tmp_path: Path) -> None:
    root = tmp_path / "openmoji"
    make(root, size=16, workers=1)
    before = (root / STAMP).stat().st_mtime_ns
    make(root, size=16, workers=1)
    assert (root / STAMP).stat().st_mtime_ns == before
    make(root, size=24, workers=1)
    with Image.open(next((root / "images").iterdir())) as picture:
        assert picture.size == (24, 24)
    assert os.listdir(tmp_path) == ["openmoji"]


def test_an_error_leaves_nothing_behind(few_drawings: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*arguments: object, **arrays: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(make_openmoji, "write_mat", full_disk)
    with pytest.raises(UserError, match="openmoji cannot be written: No space left on device; free some room"):
        make(tmp_path / "openmoji", size=16, workers=1)
    assert os.listdir(tmp_path) == []


def start(root: Path, workers: int) -> subprocess.Popen[str]:
    command = [sys.executable, "data/make_openmoji.py", "--root", str(root), "--size", "32", "--workers", str(workers)]
    return subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True, start_new_session=True)


def kill_when(process: subprocess.Popen[str], ready: Callable[[], bool]) -> None:
    try:
        while process.poll() is None and not ready():
            time.sleep(0.001)
    finally:
        process.kill()
    process.wait()


def test_workers_end_with_a_killed_run(tmp_path: Path) -> None:
    process = start(tmp_path / "openmoji", workers=2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    kill_when(process, lambda: len(children.read_text().split()) == 3)  # two workers and multiprocessing's own helper
    process.communicate(timeout=60)  # returns when no process holds the other end any more
    assert os.listdir(tmp_path) == [LOCK]  # which nobody holds


@pytest.mark.slow
def test_killed_then_made_by_two_processes_at_once(openmoji: Path, tmp_path: Path) -> None:
    """Nothing half made is ever seen, one process makes the data set, with the same bytes on any number of workers."""
    root = tmp_path / "openmoji"
    images = tmp_path / ".openmoji.partial" / "images"
    process = start(root, workers=1)
    kill_when(process, lambda: images.is_dir() and len(os.listdir(images)) > 400)
    process.communicate()
    assert images.is_dir() and not root.exists()

    processes = [start(root, workers=2) for _ in range(2)]
    messages = [process.communicate(timeout=200)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sum("nothing to do" in message for message in messages) == 1
    assert digests(root) == digests(openmoji)
    assert os.listdir(tmp_path) == ["openmoji"]


@pytest.mark.slow
def test_interrupted_while_its_workers_start_it_says_one_line(tmp_path: Path) -> None:
    """Ctrl-C reaches all processes of a terminal."""
    process = start(tmp_path / "openmoji", workers=2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while process.poll() is None and len(children.read_text().split()) < 3:
        time.sleep(0.001)
    time.sleep(0.1)  # all have started, and load their packages
    os.killpg(process.pid, signal.SIGINT)
    message = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "Traceback" not in message
    assert message.splitlines()[-1] == "interrupted; run the same command again"
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_a_worker_that_is_killed_is_one_line() -> None:
    with pytest.raises(UserError, match="a process that draws was ended from outside.*fewer --workers"):
        with make_openmoji._map(os._exit, [9] * 200, workers=2) as results:  # type: ignore[list-item]
            list(results)


@pytest.mark.parametrize("stamp", [None, '{"model": "of generated pictures"}', "[]", "no JSON", "\xff"])
def test_another_folder_is_never_replaced(few_drawings: None, tmp_path: Path, stamp: str | None) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").write_bytes(b"precious")
    if stamp is not None:
        (tmp_path / "photos" / STAMP).write_text(stamp, encoding="latin-1")
    with pytest.raises(UserError, match="photos: was not made by make_openmoji; move it away or choose another --root"):
        make(tmp_path / "photos", size=16, workers=1)
    assert (tmp_path / "photos" / "holiday.jpg").read_bytes() == b"precious"


@pytest.mark.parametrize("package", make_openmoji.PACKAGES)
def test_a_missing_package_is_named_with_the_way_out(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = importlib.metadata.version

    def without(name: str) -> str:
        if name == package:
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without)
    with pytest.raises(UserError, match=rf"{package} is not installed.*pip install -r requirements\.txt"):
        make(tmp_path / "openmoji", size=32, workers=1)
    assert os.listdir(tmp_path) == []


def test_a_link_to_a_folder_stays_and_the_folder_is_written(few_drawings: None, tmp_path: Path) -> None:
    disk, link = tmp_path / "disk", tmp_path / "openmoji"
    disk.mkdir()
    link.symlink_to(disk)
    for size in (16, 17):
        make(link, size=size, workers=1)
        assert link.is_symlink() and (disk / "index.mat").is_file()
        assert sorted(os.listdir(tmp_path)) == ["disk", "openmoji"]


def test_a_disk_in_place_of_the_folder(few_drawings: None, tmp_path: Path) -> None:
    with small_disk_at(tmp_path / "disk", "1m") as disk:
        with pytest.raises(UserError, match="disk: a disk is mounted there.*name a folder in it with --root"):
            make(disk, size=16, workers=1)
        make(disk / "openmoji", size=16, workers=1)
        assert os.listdir(disk) == ["openmoji"]


def test_the_folder_that_one_stands_in(
    few_drawings: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert make_openmoji.main(["--root", ".", "--size", "16", "--workers", "1"]) == 0
    assert (tmp_path / "here" / "index.mat").is_file()
    capsys.readouterr()
    for root, said in (("", "argument --root: is empty; name a path"), ("/", "/: was not made by make_openmoji")):
        assert make_openmoji.main(["--root", root, "--size", "16"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and said in error and error.count("\n") == 1


@pytest.mark.parametrize(("size", "workers"), [(15, 1), (0, 1), (-8, 1), (2049, 1), (10**20, 1), (32, 0)])
def test_numbers_out_of_range_are_refused(size: int, workers: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--size must be 16 to 2048 and --workers at least 1"):
        make(tmp_path / "openmoji", size, workers)


def test_command_line_reports_a_mistake_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    command = [sys.executable, "data/make_openmoji.py", "--root", str(tmp_path / "file" / "openmoji")]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("error: folder ") and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("codes", "same"),
    [
        (("1F3C3", "1F3C3-200D-2640-FE0F", "1F3C3-200D-2642-FE0F-200D-27A1-FE0F"), True),
        (("1F9D1-200D-1F33E", "1F468-200D-1F33E", "1F469-200D-1F33E"), True),
        (("1F468", "1F469", "1F9D1"), True),
        (("2640", "2642"), False),
        (("27A1", "2B05"), False),
        (("1F43B", "1F43B-200D-2744-FE0F"), False),
        (("1F468-200D-1F33E", "1F468-200D-1F373"), False),
    ],
)
def test_variants_of_a_drawing_are_one_family(codes: tuple[str, ...], same: bool) -> None:
    assert (len({drawing(code).family for code in codes}) == 1) == same


def test_no_skin_tones_and_every_name_once() -> None:
    drawings = read_drawings()
    assert not any(tone in item.code for item in drawings for tone in make_openmoji.SKIN_TONES)
    assert len({item.name for item in drawings}) == len(drawings)


def test_keywords_are_words_and_dealt_out_without_loss() -> None:
    words = tuple(f"word{number}" for number in range(19))
    item = drawing("1F600", "grinning face", words)
    told = " ".join(item.captions[1:]).split() + item.image_caption.split(", ")[1:]
    assert sorted(told) == sorted(words)
    assert len(item.captions) == 4
    assert all(":" not in word and word.strip() == word for item in read_drawings() for word in item.keywords)


def test_of_equal_drawings_the_most_general_remains() -> None:
    drawings = [drawing("1F468-200D-1F33E"), drawing("1F469", keywords=("a", "b")), drawing("1F470"), drawing("1F471")]
    picture = np.arange(3072) % 200
    thumbnails = np.stack([picture, picture + 1, picture, picture + 20]).astype(np.uint8)
    assert distinct(thumbnails, drawings) == [1, 3]


@pytest.mark.parametrize(
    "rules", [{"subgroups": ["animal-dragon"]}, {"add": ["no such drawing"]}, {"remove": ["neither"]}, {"ad": ["cat"]}]
)
def test_a_table_that_does_not_fit_the_packages_is_refused(rules: dict[str, list[str]]) -> None:
    with pytest.raises(UserError, match="'animal' names .*, unknown to the installed packages"):
        label_drawings([drawing("1F600")], {"animal": rules})


@pytest.mark.slow
def test_no_rule_of_the_table_is_idle() -> None:
    """An entry under `remove` takes something away, and one under `add` brings something that no other rule does."""
    drawings = read_drawings()
    for label, rules in read_yaml(LABELS.read_text(encoding="utf-8"), LABELS.name).items():
        for rule in ("add", "remove"):
            bare = {key: value for key, value in rules.items() if key not in ("add", "remove")}
            hit = {
                item.name for item, row in zip(drawings, label_drawings(drawings, {label: bare}), strict=True) if row
            }
            idle = hit.intersection(rules.get("add", [])) if rule == "add" else set(rules.get("remove", [])) - hit
            assert not idle, f"{label}: {rule} {idle}"


@pytest.fixture
def config(openmoji: Path) -> OpenmojiConfig:
    settings = read_yaml(SETTINGS.read_text(encoding="utf-8"), SETTINGS.name)["dataset"]
    return OpenmojiConfig.model_validate(settings | {"root": str(openmoji)})


def test_no_query_has_its_twin_in_the_database(openmoji: Path, config: OpenmojiConfig) -> None:
    splits = OpenmojiDataset(config).splits
    families = load(openmoji, "family.mat", "family")[:, 0]
    assert len(splits.query) == config.split.query
    assert len(splits.query) + len(splits.train) == len(families)
    assert set(families[splits.query]).isdisjoint(families[splits.database])
    assert len(set(families[splits.query])) < len(splits.query)  # some families are among the queries, whole


def test_every_class_can_be_learned_and_asked_for(config: OpenmojiConfig) -> None:
    dataset = OpenmojiDataset(config)
    assert dataset.labels[dataset.splits.train].sum(dim=0).min() >= 20
    assert dataset.labels[dataset.splits.query].sum(dim=0).min() >= 1


def test_the_split_with_families_of_one_is_the_plain_one() -> None:
    labels, config = torch.ones(50, 3, dtype=torch.bool), permutation(seed=3, query=10, train=40)
    plain, alone = make_splits(labels, config), make_splits(labels, config, torch.arange(50))
    assert plain.fingerprint == alone.fingerprint and torch.equal(plain.database, alone.database)


def test_families_that_cannot_fill_the_query_split_are_refused() -> None:
    labels = torch.ones(9, 1, dtype=torch.bool)
    with pytest.raises(UserError, match="whole families .* query split of 4; change dataset.split.query"):
        make_splits(labels, permutation(seed=1, query=4, train=5), torch.arange(9) // 3)


def test_a_family_file_of_another_form_is_refused(openmoji: Path, config: OpenmojiConfig, tmp_path: Path) -> None:
    shutil.copytree(openmoji, tmp_path / "copy")
    write_mat(tmp_path / "copy" / "family.mat", family=np.zeros((7, 2)))
    with pytest.raises(UserError, match=r"family\.mat \(family\) is not one number per picture; remove .*copy"):
        OpenmojiDataset(config.model_copy(update={"root": str(tmp_path / "copy")}))
