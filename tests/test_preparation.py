"""What all preparation scripts promise: nothing half written, any kill survived, one clear line for every mistake."""

import errno
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import scipy.io
from scipy.io import loadmat

from common.config import load_config
from data import (
    make_coco,
    make_iaprtc12,
    make_mirflickr25k,
    make_nuswide,
    make_wiki,
    mat_files,
    preparation,
    source_files,
)
from data.preparation import REPORT
from data.source_files import JOURNAL, inspect_picture
from tests import datasets, miniatures
from tests.disks import small_disk_at
from tests.processes import in_child
from utils.files import FolderLock

SCRIPTS = {
    "mirflickr25k": make_mirflickr25k,
    "nuswide": make_nuswide,
    "coco": make_coco,
    "wiki": make_wiki,
    "iaprtc12": make_iaprtc12,
}


WRITTEN = {"index.mat", "caption.mat", "label.mat", "labels.txt", REPORT, JOURNAL}


REPOSITORY = Path(__file__).parents[1]
MAIN = '\nif __name__ == "__main__":\n'
ALL = sorted(path.name for path in (REPOSITORY / "data").glob("*.py") if MAIN in path.read_text())


def source_of(name: str, folder: Path) -> Path:
    make: Callable[[Path], Path] = getattr(miniatures, name)
    return make(folder / "source")


def prepare(name: str, source: Path, root: Path, *more: str) -> int:
    script: ModuleType = SCRIPTS[name]
    arguments = ["--source", str(source), "--root", str(root), *more]
    return preparation.run(name, name, script.PROTOCOLS, script.collect, arguments)


def contents(root: Path) -> dict[str, bytes]:
    """Files of a folder that are no pictures."""
    return {path.name: path.read_bytes() for path in root.iterdir() if not path.is_symlink()}


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


@pytest.fixture
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process, unlike a power failure, loses nothing that was written: without waiting for the disk."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.mark.usefixtures("unsynced")
@pytest.mark.parametrize(
    "name",
    ["mirflickr25k", *(pytest.param(name, marks=pytest.mark.slow) for name in ("coco", "nuswide", "wiki", "iaprtc12"))],
)
def test_killed_at_ten_random_moments_then_run_again_gives_identical_bytes(name: str, tmp_path: Path) -> None:
    source = source_of(name, tmp_path)
    start = time.perf_counter()
    assert prepare(name, source, tmp_path / "whole") == 0
    duration = time.perf_counter() - start
    whole = contents(tmp_path / "whole")
    assert set(whole) == WRITTEN
    moments = random.Random(name)
    for attempt in range(10):
        root = tmp_path / f"root{attempt}"
        child = in_child(lambda root=root: prepare(name, source, root))  # type: ignore[misc]
        time.sleep(moments.uniform(0, 1.2 * duration))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert prepare(name, source, root) == 0
        assert contents(root) == whole


@pytest.mark.usefixtures("unsynced")
@pytest.mark.slow
def test_killed_at_every_change_of_a_name_never_leaves_a_mixture(tmp_path: Path) -> None:
    source = source_of("nuswide", tmp_path)
    mats = {"index.mat", "caption.mat", "label.mat", "labels.txt"}
    sets = {}
    for protocol in ("dcmht", "tc10"):
        assert prepare("nuswide", source, tmp_path / protocol, "--protocol", protocol) == 0
        sets[protocol] = {key: value for key, value in contents(tmp_path / protocol).items() if key in mats}

    def work(root: Path, deadline: int) -> None:
        steps = 0

        def counted(original: Callable[..., object]) -> Callable[..., object]:
            def step(*arguments: object, **more: object) -> object:
                nonlocal steps
                steps += 1
                if steps == deadline:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*arguments, **more)

            return step

        os.replace = counted(os.replace)  # type: ignore[assignment]
        Path.unlink = counted(Path.unlink)  # type: ignore[method-assign, assignment]
        prepare("nuswide", source, root, "--protocol", "tc10")

    outcomes = []
    for deadline in range(1, 40):
        root = tmp_path / f"root{deadline}"
        assert prepare("nuswide", source, root, "--protocol", "dcmht") == 0
        child = in_child(lambda root=root, deadline=deadline: work(root, deadline))  # type: ignore[misc]
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        found = {key: value for key, value in contents(root).items() if key in mats}
        if len(found) == len(mats):
            assert found in sets.values()
        outcomes.append("part" if len(found) < len(mats) else "old" if found == sets["dcmht"] else "new")
        assert prepare("nuswide", source, root, "--protocol", "tc10") == 0
        assert contents(root) == contents(tmp_path / "tc10") | {JOURNAL: contents(root)[JOURNAL]}
        if not killed:
            break
    assert {"old", "part", "new"} == set(outcomes) and outcomes[-1] == "new"


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


@pytest.mark.parametrize(
    ("stop", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted; run the same command again"),
        (MemoryError(), 2, "error: "),
        (OSError(errno.EIO, "Input/output error"), 2, "Input/output error; mend it and run again"),
    ],
)
def test_stopped_in_the_middle(
    stop: BaseException,
    code: int,
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, root = source_of("wiki", tmp_path), tmp_path / "root"

    def stopped(*_: object) -> None:
        raise stop

    with monkeypatch.context() as patched:
        patched.setattr(preparation, "make_report", stopped)
        assert prepare("wiki", source, root) == code
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert prepare("wiki", source, root) == 0
    assert "still to be checked" not in capsys.readouterr().err


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


def test_two_runs_into_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, root = source_of("wiki", tmp_path), tmp_path / "root"
    root.mkdir()
    lock = FolderLock(root)
    assert lock.acquire(wait=False)
    assert prepare("wiki", source, root) == 2
    assert "another run is writing there" in capsys.readouterr().err
    lock.release()
    assert prepare("wiki", source, root) == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 KiB."""
    with small_disk_at(tmp_path / "disk", "32k") as disk:
        yield disk


def test_full_disk_is_seen_before_the_work(
    small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (small_disk / "filler").write_bytes(bytes(32 * 1024))
    source = source_of("mirflickr25k", tmp_path)
    assert prepare("mirflickr25k", source, small_disk) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "are needed" in error and "are free" in error
    assert set(contents(small_disk)) == {"filler"}


@pytest.mark.parametrize("room", [0, 4, 8, 12])
def test_disk_that_fills_up_on_the_way(
    room: int, small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_of("mirflickr25k", tmp_path)
    (small_disk / "filler").write_bytes(bytes((32 - room) * 1024))
    monkeypatch.setattr(preparation, "_require_room", lambda *_: None)
    assert prepare("mirflickr25k", source, small_disk) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "No space left on device" in error and str(small_disk) in error
    assert not [name for name in contents(small_disk) if name.endswith((".mat", ".part")) or name == REPORT]
    (small_disk / "filler").unlink()
    assert prepare("mirflickr25k", source, small_disk) == 0


def test_read_only_folder(small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for root in (small_disk, small_disk / "new"):
        assert prepare("wiki", source_of("wiki", tmp_path), root) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert str(root) in error and "Read-only file system" in error and "--root" in error


def test_started_as_a_script(tmp_path: Path) -> None:
    """From another folder, where its mistakes are a line, too."""
    source = source_of("coco", tmp_path)
    shutil.rmtree(source / "annotations")
    command = [sys.executable, str(REPOSITORY / "data/make_coco.py"), "--source", str(source)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")


INTERRUPTED = """
HEAVY = ("numpy", "torch")
import os, runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.addaudithook(lambda event, told: event == "import" and told[0] in HEAVY and os.kill(os.getpid(), 2))
runpy.run_path(sys.argv[1], run_name="__main__")
"""


@pytest.mark.parametrize("script", ALL)
def test_interrupted_while_packages_load_no_script_complains(script: str) -> None:
    command = [sys.executable, "-c", INTERRUPTED, str(REPOSITORY / "data" / script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


def test_the_documentation_names_every_script() -> None:
    text = (REPOSITORY / "data/README.md").read_text()
    assert [script for script in ALL if f"python data/{script} " not in text] == []


def words_of_methods(text: str) -> set[str]:
    return set(re.findall(r"\b[A-Z]\w*[A-Z]\w*\b", text))


def test_the_table_of_protocols_says_what_the_scripts_do() -> None:
    text = (REPOSITORY / "data/README.md").read_text()
    table = text.partition("### Protocols")[2].partition("|---")[2].partition("\n\n")[0].splitlines()[1:]
    told: dict[str, list[tuple[str, int, int, set[str]]]] = {}
    title = ""
    for line in table:
        name, protocols, pairs, labels, _, papers = (cell.strip() for cell in line.strip("|").split("|"))
        title = name or title
        for protocol in re.findall("`([^`]+)`", protocols):
            row = (protocol, int(pairs.replace(",", "")), int(labels), words_of_methods(papers))
            told.setdefault(title, []).append(row)
    titles = ["MIRFlickr-25K", "NUS-WIDE", "MS COCO", "Wikipedia", "IAPR TC-12"]
    assert list(told) == titles
    for title, script in zip(titles, SCRIPTS.values(), strict=True):
        assert [row[:3] for row in told[title]] == [
            (name, protocol.known["pairs"], protocol.known["labels"]) for name, protocol in script.PROTOCOLS.items()
        ]
        for row, protocol in zip(told[title], script.PROTOCOLS.values(), strict=True):
            assert title == "MS COCO" or row[3] == words_of_methods(protocol.papers)


PERMUTED = {"dcmht": (1814, 5000, 10000), "mith": (1, 5000, 10000)}
MITHS_OWN = {"mirflickr25k": (1, 2000, 10000), "nuswide": (1, 2100, 10500)}


@pytest.mark.parametrize("name", ["mirflickr25k", "nuswide", "coco"])
def test_configs_deal_pairs_out_as_the_papers_of_their_protocol(name: str) -> None:
    tried = 0
    for protocol, split in PERMUTED.items():
        for method in words_of_methods(SCRIPTS[name].PROTOCOLS[protocol].papers) - {"CFRH", "DCMH"}:
            found = load_config(str(REPOSITORY / f"configs/{method}/{name}.yaml"), []).dataset.split
            expected = MITHS_OWN.get(name, split) if protocol == "mith" else split
            assert (found.protocol, found.seed, found.query, found.train) == ("permutation", *expected), method
            tried += 1
    assert tried >= 8
