"""What all preparation scripts promise: the same files for the same source, and one clear line for every mistake."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import scipy.io
from scipy.io import loadmat

from data import (
    mat_files,
    source_files,
)
from data.preparation import REPORT
from data.source_files import JOURNAL, inspect_picture
from tests import datasets, miniatures
from tests.preparing import REPOSITORY, SCRIPTS, WRITTEN, contents, prepare, source_of


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_data_set_opens_what_was_written_without_a_path_being_named(name: str, tmp_path: Path) -> None:
    source, root = source_of(name, tmp_path), tmp_path / "root"
    assert prepare(name, source, root) == 0
    data = datasets.opened(root, split={**datasets.SETTINGS["split"], "seed": 1, "query": 1, "train": 2})
    pairs = SCRIPTS[name].collect(source, next(iter(SCRIPTS[name].PROTOCOLS)))
    assert list(data.names) == list(pairs.images)
    assert data.labels.tolist() == pairs.labels.tolist()
    assert data.columns["train"]["text"].captions.texts == [
        [mat_files.clean_text(text) for text in item] or [""] for item in pairs.captions
    ]
    assert {data.pictures.read(number).size for number in range(len(pairs.images))} == {(40, 30)}


def test_pictures_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, root = source_of("coco", tmp_path), tmp_path / "root"
    assert prepare("coco", source, root) == 0
    decoded: list[str] = []
    original = inspect_picture

    def noted(path: Path) -> source_files.Picture | None:
        decoded.append(path.name)
        return original(path)

    monkeypatch.setattr(source_files, "inspect_picture", noted)
    assert prepare("coco", source, root) == 0
    assert decoded == []
    # A journal that ends in the middle of a line: the rest is done again.
    journal = (root / JOURNAL).read_bytes()
    (root / JOURNAL).write_bytes(journal[: journal.rindex(b"\n", 0, -1) + 9])
    before = contents(root)
    assert prepare("coco", source, root) == 0
    assert len(decoded) == 1
    assert contents(root) == before | {JOURNAL: journal}


def test_a_changed_picture_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, root = source_of("coco", tmp_path), tmp_path / "root"
    assert prepare("coco", source, root) == 0
    path = source / "train2017/000000000007.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    before = contents(root)
    assert prepare("coco", source, root) == 2
    assert "1 of 6 pictures are missing or broken" in capsys.readouterr().err
    assert all(contents(root)[name] == before[name] for name in ("index.mat", "caption.mat", "label.mat"))


def break_pictures(source: Path) -> None:
    folder = source / "train2017"
    (folder / "000000000003.jpg").unlink()
    (folder / "000000000007.jpg").write_bytes(b"<html>not here any more</html>")
    path = folder / "000000000025.jpg"
    path.write_bytes(path.read_bytes()[:-20])
    (folder / "000000000581.jpg").write_bytes(b"")


def test_missing_and_broken_pictures_stop_the_preparation_and_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, root = source_of("coco", tmp_path), tmp_path / "root"
    break_pictures(source)
    assert prepare("coco", source, root) == 2
    output = capsys.readouterr()
    error = output.err.splitlines()[-1]
    assert "4 of 6 pictures are missing or broken" in error and "--skip-broken" in error and REPORT in error
    report = (root / REPORT).read_text()
    for text in (report, output.out):
        assert "missing pictures:\n  train2017/000000000003.jpg\n" in text
        assert "  train2017/000000000007.jpg (not a picture)\n" in text
        assert "  train2017/000000000025.jpg (image file is truncated" in text
        assert "  train2017/000000000581.jpg (not a picture)\n" in text
    assert set(contents(root)) == {REPORT, JOURNAL}


def test_skip_broken_leaves_these_pairs_out_and_says_so(tmp_path: Path) -> None:
    source, root = source_of("coco", tmp_path), tmp_path / "root"
    break_pictures(source)
    assert prepare("coco", source, root, "--skip-broken") == 0
    index = [path.rstrip() for path in loadmat(root / "index.mat")["index"]]
    assert index == ["train2017/000000000009.jpg", "val2017/000000000008.jpg"]
    assert loadmat(root / "label.mat")["category"].tolist() == [[0, 0, 1], [0, 1, 1]]
    assert [item[0].rstrip() for item in loadmat(root / "caption.mat")["caption"][0]] == ["Grüße 😀", "brushing"]
    rows = {line[:28].strip(): line[28:].split() for line in (root / REPORT).read_text().splitlines()}
    assert rows["pairs"] == ["2", "122,218", "<-", "differs"]
    assert rows["pictures missing"] == ["1"] and rows["pictures broken"] == ["3"]


def test_no_picture_at_all_is_refused_even_when_broken_ones_may_be_skipped(tmp_path: Path) -> None:
    source = source_of("wiki", tmp_path)
    for path in source.rglob("*.jpg"):
        path.unlink()
    assert prepare("wiki", source, tmp_path / "root", "--skip-broken") == 2
    assert set(contents(tmp_path / "root")) == {REPORT}


@pytest.mark.parametrize(
    ("name", "missing", "archive"),
    [
        ("mirflickr25k", "mirflickr", "mirflickr25k.zip"),
        ("mirflickr25k", "mirflickr25k_annotations_v080", "mirflickr25k_annotations_v080.zip"),
        ("nuswide", "Groundtruth", "Groundtruth.zip"),
        ("nuswide", "NUS_WID_Tags", "NUS_WID_Tags.zip"),
        ("nuswide", "ImageList", "ImageList.zip"),
        ("nuswide", "Flickr", "folder Flickr"),
        ("coco", "annotations", "annotations_trainval2017.zip"),
        ("wiki", "wikipedia_dataset", "wikipedia_dataset.zip"),
        ("iaprtc12", "images", "iaprtc12.tgz"),
        ("iaprtc12", "annotations_complete_eng", "iaprtc12.tgz"),
    ],
)
def test_missing_archive(
    name: str, missing: str, archive: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = source_of(name, tmp_path)
    shutil.rmtree(source / missing)
    assert prepare(name, source, tmp_path / "root") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {source}: ") and archive in error and "README" in error
    assert contents(tmp_path / "root") == {}


def test_missing_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare("coco", tmp_path / "nowhere", tmp_path / "root") == 2
    assert "no such folder" in capsys.readouterr().err
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--protokol", "mith"], "did you mean '--protocol'"),
        (["--skip"], "did you mean '--skip-broken'?"),  # no abbreviations: one more option would change what they mean
        (["--protocol", "nosuch"], "invalid choice: 'nosuch'"),
        (["--root"], "expected one argument"),
        (["--root", ""], "argument --root: is empty"),  # a variable of a shell that is not set
    ],
)
def test_mistakes_of_the_command_line_are_one_line(
    wrong: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare("coco", tmp_path, tmp_path / "root", *wrong) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1
    assert not (tmp_path / "root").exists()


def test_archives_unpacked_into_a_folder_each(tmp_path: Path) -> None:
    source = source_of("coco", tmp_path)
    for name in ("train2017", "val2017", "annotations"):
        (source / f"{name}-unpacked").mkdir()
        (source / name).rename(source / f"{name}-unpacked" / name)
    assert prepare("coco", source, tmp_path / "root") == 0
    for path in loadmat(tmp_path / "root/index.mat")["index"]:
        assert (source / path.rstrip()).is_file() and (tmp_path / "root" / path.rstrip()).is_file()


def test_a_report_that_nobody_reads(tmp_path: Path) -> None:
    """The data set is there all the same, nothing complains at the end, and no heavy package was waited for."""
    source, root = source_of("wiki", tmp_path), tmp_path / "root"
    script = [sys.executable, "-X", "importtime", str(REPOSITORY / "data/make_wiki.py")]
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as unread:
        command = [*script, "--source", str(source), "--root", str(root)]
        done = subprocess.run(command, stdout=unread, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 141 and set(contents(root)) == WRITTEN
    assert not any(word in done.stderr for word in ("Traceback", "Exception", " torch\n"))
    assert " numpy\n" in done.stderr


def test_a_report_for_a_terminal_of_another_encoding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = miniatures.wiki(tmp_path / "source" / "ü").parent
    (source / "ü/wikipedia_dataset/images/art/i1.jpg").unlink()
    terminal = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(terminal, encoding="ascii"))
    assert prepare("wiki", source, tmp_path / "root") == 2
    assert b"  \\xfc/wikipedia_dataset/images/art/i1.jpg\n" in terminal.getvalue()
    assert "1 of 5 pictures are missing" in capsys.readouterr().err


def test_output_into_the_source_folder_needs_no_links(tmp_path: Path) -> None:
    source = source_of("nuswide", tmp_path)
    assert prepare("nuswide", source, source) == 0
    assert not any(path.is_symlink() for path in source.iterdir())


def test_links_follow_a_source_that_moved_and_spare_what_is_no_link(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, root = source_of("wiki", tmp_path), tmp_path / "root"
    assert prepare("wiki", source, root) == 0
    moved = source.rename(tmp_path / "moved")
    assert prepare("wiki", moved, root) == 0
    assert (root / "wikipedia_dataset").resolve() == (moved / "wikipedia_dataset").resolve()
    (root / "wikipedia_dataset").unlink()
    (root / "wikipedia_dataset").mkdir()
    before = contents(root / "wikipedia_dataset")
    assert prepare("wiki", moved, root) == 2
    assert "is in the way of a link" in capsys.readouterr().err
    assert contents(root / "wikipedia_dataset") == before


@pytest.mark.parametrize("folder", ["two  blanks", "line\nbreak", os.fsdecode(b"caf\xe9")])
def test_names_that_an_index_cannot_hold_are_refused(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = miniatures.wiki(tmp_path / "source" / folder).parent
    assert prepare("wiki", source, tmp_path / "root") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {source}: picture {folder!r}"[:-1]) and "rename it" in error
    assert contents(tmp_path / "root") == {}


@pytest.mark.parametrize("name", ["../val2017/000000000008.jpg", "a\0b.jpg", "a\ud83d.jpg"])
def test_names_of_pictures_that_could_not_be_found_again_are_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = source_of("coco", tmp_path)
    path = source / "annotations/instances_val2017.json"
    path.write_text(path.read_text().replace("000000000008.jpg", json.dumps(name)[1:-1]))
    assert prepare("coco", source, tmp_path / "root") == 2
    assert f"picture {f'val2017/{name}'!r} cannot stand in the files as it is" in capsys.readouterr().err


def test_files_of_others_are_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, root = source_of("wiki", tmp_path), tmp_path / "root"
    root.mkdir()
    scipy.io.savemat(root / "caption.mat", {"caption": ["precious"]})
    before = contents(root)
    assert prepare("wiki", source, root) == 2
    assert "caption.mat: was not made by this script; move it away" in capsys.readouterr().err
    assert contents(root) == before


def test_started_as_a_script(tmp_path: Path) -> None:
    """From another folder, where its mistakes are a line, too."""
    source = source_of("coco", tmp_path)
    shutil.rmtree(source / "annotations")
    command = [sys.executable, str(REPOSITORY / "data/make_coco.py"), "--source", str(source)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
