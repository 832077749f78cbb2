"""The picture cache: the same pictures, whatever happens while it is built."""

import contextlib
import io
import logging
import os
import random
import shutil
import signal
import subprocess
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from dataset.loader import build_loader
from dataset.pictures import cache
from dataset.pictures.cache import CHECKS, DONE, INDEX, PIXELS, PLAN, CachedPictures, cached_pictures, stored_sizes
from dataset.pictures.draws import Purpose, uniform
from dataset.pictures.reading import JoinedPictures, PictureArray, PictureFiles
from dataset.pictures.transforms import CROP_DRAWS, STD, View, view_pixels
from tests import datasets
from tests.disks import small_disk_at, without_rights
from tests.processes import in_child, run_processes

STORED = 24
SIZES = [(40, 30), (30, 40), (24, 24), (90, 25), (20, 12), (1, 7), (33, 33)]


def write_pictures(folder: Path, count: int) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [str(folder / f"{number}.png") for number in range(count)]
    for number, path in enumerate(paths):
        datasets.smooth_picture(number, *SIZES[number % len(SIZES)]).save(path)
    return paths


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_pictures(tmp_path_factory.mktemp("pictures"), 150)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many parts of few pictures, so that kills meet every stage."""
    monkeypatch.setattr(cache, "PART", 4)
    monkeypatch.setattr(cache, "_PARTS_A_SYNC", 3)


def build(paths: list[str], folder: Path, stored_size: int = STORED) -> CachedPictures:
    return cached_pictures(PictureFiles(paths, "index.mat"), folder, "small", stored_size)


def contents(folder: Path) -> dict[str, bytes]:
    """Everything below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------------------------------------- what is stored


def test_pictures_are_stored_with_their_ratio_and_never_enlarged(paths: list[str], tmp_path: Path) -> None:
    pictures = build(paths, tmp_path)
    assert len(pictures) == len(paths)
    expected = [(32, 24), (24, 32), (24, 24), (86, 24), (20, 12), (1, 7), (24, 24)]
    for number, path in enumerate(paths):
        size, source = expected[number % len(SIZES)], Image.open(path).convert("RGB")
        assert pictures.size(number) == source.size
        stored = pictures.read(number)
        assert stored.size == size and pictures.source_size(number, stored) == source.size
        if size != source.size:
            source = source.resize(size, Image.Resampling.BICUBIC)
        assert np.array_equal(np.array(stored), np.array(source))
    (folder,) = tmp_path.iterdir()
    assert {path.name for path in folder.iterdir()} == {PIXELS, CHECKS, INDEX}
    assert (folder / PIXELS).stat().st_size == sum(3 * w * h for w, h in (pictures.read(n).size for n in range(150)))


def test_stored_sizes_of_extreme_pictures() -> None:
    sizes = np.array([[10_000, 1], [1, 10_000], [257, 256], [256, 257], [256, 256], [4000, 3000]])
    assert stored_sizes(sizes, 256).tolist() == [
        [10_000, 1], [1, 10_000], [257, 256], [256, 257], [256, 256], [341, 256],
    ]  # fmt: skip


@pytest.mark.parametrize("view", list(View))
@pytest.mark.parametrize("size", [8, 16, 24, 50])
def test_views_of_pictures_stored_as_they_are_equal_those_of_pillow(
    view: View, size: int, paths: list[str], tmp_path: Path
) -> None:
    pictures = build(paths, tmp_path, stored_size=100)
    draws = uniform(3, 0, Purpose.AUGMENT, np.arange(len(paths)), CROP_DRAWS)
    for number in range(2 * len(SIZES)):
        row = draws[number] if view is View.RANDOM else None
        expected = view_pixels(Image.open(paths[number]), view, size, row)
        found = pictures.view(number, view, size, row)
        assert found.dtype == torch.uint8 and found.shape == (3, size, size)
        assert (expected.int() - found.int()).abs().max() <= (1 if view is View.RANDOM else 3)  # bicubic overshoots


@pytest.mark.parametrize("view", list(View))
def test_views_of_smooth_photographs_differ_by_three_grey_levels_at_most(view: View, tmp_path: Path) -> None:
    """The bound that `CachedPictures` states."""
    paths = [str(tmp_path / f"{number}.png") for number in range(12)]
    for number, path in enumerate(paths):
        datasets.smooth_picture(number, *((500, 375), (375, 500))[number % 2]).save(path)
    pictures = build(paths, tmp_path / "cache", stored_size=256)
    for epoch in range(3 if view is View.RANDOM else 1):
        draws = uniform(3, epoch, Purpose.AUGMENT, np.arange(len(paths)), CROP_DRAWS)
        for number, path in enumerate(paths):
            expected = view_pixels(Image.open(path), view, 224, draws[number])
            assert (expected.int() - pictures.view(number, view, 224, draws[number]).int()).abs().max() <= 3


# ---------------------------------------------------------------------------------------------- loaders


@pytest.fixture(scope="module")
def oblong(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return datasets.write(tmp_path_factory.mktemp("oblong") / "data", width=100, height=75)


def rows_of(data: Any, kind: Literal["workers", "memory"] = "workers", workers: int = 0, epoch: int | None = 2) -> Any:
    loader = build_loader(
        data, "train", frozenset({"image", "text"}), batch_size=4, seed=7, device=torch.device("cpu"), kind=kind,
        workers=workers, caption="random",
    )  # fmt: skip
    batches = list(loader.once() if epoch is None else loader.epoch(epoch))
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


@pytest.mark.parametrize("augment", [False, True])
def test_loaders_give_the_same_rows_with_and_without_cache(augment: bool, oblong: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"augment": augment, "image_size": 48, "stored_size": 56}
    plain = datasets.opened(oblong, **settings)
    stored = datasets.opened(oblong, **settings, cache=str(tmp_path / "cache"))
    levels = 255 * torch.tensor(STD)[:, None, None]
    for epoch in (2, None):
        expected, found = rows_of(plain, epoch=epoch), rows_of(stored, epoch=epoch)
        assert torch.equal(expected["index"], found["index"]) and torch.equal(expected["text"], found["text"])
        assert ((expected["image"] - found["image"]) * levels).abs().max() <= 8  # small, so less smooth to the pixel
        assert not torch.equal(expected["image"], found["image"])
        for workers in (1, 2):  # a function of (seed, epoch, index)
            again = rows_of(stored, workers=workers, epoch=epoch)
            assert all(torch.equal(found[name], again[name]) for name in found)
        if not augment or epoch is None:
            held = rows_of(stored, kind="memory", epoch=epoch)
            assert ((held["image"] - found["image"]) * levels).abs().max() <= 1.01
    assert len(list((tmp_path / "cache").iterdir())) == 1


def epoch_of(root: str, folder: str) -> Any:
    data = datasets.opened(Path(root), augment=True, image_size=48, stored_size=56, cache=folder)
    return rows_of(data, epoch=0)


def test_processes_of_a_group_share_a_cache_and_what_one_process_has(oblong: Path, tmp_path: Path) -> None:
    shares = run_processes(epoch_of, 2, str(oblong), str(tmp_path / "shared"))
    whole = epoch_of(str(oblong), str(tmp_path / "own"))
    place = {int(row): at for at, row in enumerate(whole["index"])}
    assert sorted(torch.cat([share["index"] for share in shares]).tolist()) == sorted(place)
    for share in shares:
        assert torch.equal(share["image"], whole["image"][[place[int(row)] for row in share["index"]]])
    assert contents(tmp_path / "shared") == contents(tmp_path / "own")


def test_no_cache_is_built_for_texts(oblong: Path, tmp_path: Path) -> None:
    data = datasets.opened(oblong, cache=str(tmp_path / "cache"))
    build_loader(
        data, "train", frozenset({"text"}), batch_size=4, seed=7, device=torch.device("cpu"), kind="workers", workers=0,
        caption="first",
    )  # fmt: skip
    assert not (tmp_path / "cache").exists()


# ---------------------------------------------------------------------------------------------- kills and company


@pytest.mark.slow
def test_killed_at_ten_random_moments_then_run_again_gives_identical_bytes(paths: list[str], tmp_path: Path) -> None:
    start = time.perf_counter()
    build(paths, tmp_path / "whole")
    duration = time.perf_counter() - start
    whole = contents(tmp_path / "whole")
    moments = random.Random(1)
    resumed = 0
    for attempt in range(10):
        folder = tmp_path / f"cache{attempt}"
        child = in_child(lambda folder=folder: build(paths, folder))  # type: ignore[misc]
        time.sleep(moments.uniform(0, 1.2 * duration))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        left = contents(folder)
        resumed += any(name.endswith(DONE) and content for name, content in left.items())
        build(paths, folder)
        assert contents(folder) == whole
    assert resumed


@pytest.mark.slow
def test_killed_at_every_change_of_a_name(paths: list[str], tmp_path: Path) -> None:
    """Names are what tells a whole cache from a part: dying before each removal, replacement and truncation."""
    build(paths[:10], tmp_path / "whole")
    whole = contents(tmp_path / "whole")

    def dying(original: Any, counter: list[int], deadline: int) -> Any:
        def step(*arguments: Any, **more: Any) -> Any:
            counter[0] += 1
            if counter[0] == deadline:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **more)

        return step

    def work(folder: Path, deadline: int) -> None:
        counter = [0]
        for module, name in ((os, "replace"), (Path, "unlink"), (os, "ftruncate"), (os, "fdatasync"), (os, "write")):
            setattr(module, name, dying(getattr(module, name), counter, deadline))
        build(paths[:10], folder)

    for deadline in range(1, 60):
        folder = tmp_path / f"cache{deadline}"
        killed = os.WIFSIGNALED(os.waitpid(in_child(lambda f=folder, d=deadline: work(f, d)), 0)[1])  # type: ignore[misc]
        build(paths[:10], folder)
        assert contents(folder) == whole
        if not killed:
            break
    assert 8 < deadline < 59


def test_a_build_goes_on_where_it_was_stopped(
    paths: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(paths, tmp_path / "whole")
    read, seen = PictureFiles.read, []

    def failing(self: PictureFiles, number: int) -> Image.Image:
        seen.append(number)
        if number == 60:
            raise UserError("stop")
        return read(self, number)

    def noting(self: PictureFiles, number: int) -> Image.Image:
        seen.append(number)
        return read(self, number)

    with monkeypatch.context() as patched:
        patched.setattr(PictureFiles, "read", failing)
        with pytest.raises(UserError, match="stop"):
            build(paths, tmp_path / "cache")
    (folder,) = (tmp_path / "cache").iterdir()
    assert not (folder / INDEX).exists() and (folder / PLAN).exists()
    listed = np.fromfile(folder / DONE, "<u4").tolist()
    assert len(listed) >= 12
    with (folder / DONE).open("ab") as file:
        file.write(b"\x01\x00")  # as a kill in the middle of a write leaves it
    seen.clear()
    monkeypatch.setattr(PictureFiles, "read", noting)
    build(paths, tmp_path / "cache")
    assert sorted(seen) == [number for number in range(150) if number // 4 not in listed]
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")
    seen.clear()
    build(paths, tmp_path / "cache")
    assert not seen


def test_two_processes_at_once(paths: list[str], tmp_path: Path) -> None:
    build(paths, tmp_path / "whole")
    children = [in_child(lambda: build(paths, tmp_path / "cache").read(149)) for _ in range(3)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert contents(tmp_path / "cache") == contents(tmp_path / "whole")


# ---------------------------------------------------------------------------------------------- changes and mistakes


def test_a_changed_source_is_noticed(tmp_path: Path) -> None:
    paths = write_pictures(tmp_path / "source", 9)
    old = build(paths, tmp_path / "cache")
    before = np.array(old.read(5))
    time.sleep(0.01)
    datasets.smooth_picture(77, *SIZES[3]).save(paths[5])
    new = build(paths, tmp_path / "cache")
    assert new.path == old.path
    assert new.read(5).size == (86, 24) and not np.array_equal(np.array(new.read(5)), before)
    assert np.array_equal(np.array(old.read(5)), before)  # whoever has the old one open goes on with it


def test_a_cache_of_another_version_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pictures").mkdir()
    path = tmp_path / "pictures" / "grey.png"
    Image.fromarray(np.arange(30 * 40, dtype=np.uint16).reshape(30, 40) * 50).save(path)
    with monkeypatch.context() as older:  # which made white of what exceeds 255
        older.setattr(cache, "_VERSION", "2")
        older.setattr(PictureFiles, "read", lambda self, number: Image.new("RGB", (40, 30), "white"))
        assert np.array(build([str(path)], tmp_path / "cache").read(0)).min() == 255
    assert np.array(build([str(path)], tmp_path / "cache").read(0)).min() < 10


def test_a_change_of_how_pictures_are_stored_changes_the_version(tmp_path: Path) -> None:
    """Where stored pixels are others on purpose: raise the version, and write the new digest here."""
    (tmp_path / "pictures").mkdir()
    ramp = np.arange(40 * 50, dtype=np.uint16).reshape(40, 50) * 32
    grey, colour = (ramp >> 8).astype(np.uint8), datasets.smooth_picture(3, 50, 40)
    palette = Image.fromarray(grey // 64, "P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 8, 7])
    sources = {
        "rgb": colour,
        "rgba": Image.merge("RGBA", [*colour.split(), Image.fromarray(grey)]),
        "grey": Image.fromarray(grey),
        "grey16": Image.fromarray(ramp),
        "palette": palette,
        "bits": Image.fromarray(grey).convert("1"),
    }
    for name, picture in sources.items():
        picture.save(tmp_path / "pictures" / f"{name}.png")
    pictures = build([str(tmp_path / "pictures" / f"{name}.png") for name in sources], tmp_path / "cache")
    digest = zlib.crc32(b"".join(pictures.read(number).tobytes() for number in range(len(pictures))))
    assert (cache._VERSION, f"{digest:08x}") == ("3", "1a3039e5")


@pytest.mark.parametrize(
    ("name", "match"),
    [(INDEX, r"picture cache .* cannot be written: Is a directory"), (CHECKS, r"checks\.bin.* Permission denied")],
)
def test_files_of_a_cache_that_cannot_be_used(name: str, match: str, tmp_path: Path) -> None:
    paths = write_pictures(tmp_path / "pictures", 3)
    folder = build(paths, tmp_path / "cache").path.parent
    if name == INDEX:
        (folder / name).unlink()
        (folder / name).mkdir()
    else:
        (folder / name).chmod(0)
    with contextlib.ExitStack() as stack:
        if name == CHECKS:
            stack.enter_context(without_rights(folder))
        with pytest.raises(UserError, match=match):
            build(paths, tmp_path / "cache")


def test_other_files_and_other_sizes_have_caches_of_their_own(paths: list[str], tmp_path: Path) -> None:
    first = build(paths, tmp_path)
    others = [build(paths[:20], tmp_path), build(paths[::-1], tmp_path), build(paths, tmp_path, stored_size=20)]
    assert len({first.path, *(other.path for other in others)}) == 4
    assert np.array_equal(np.array(others[1].read(0)), np.array(first.read(149)))
    assert len(JoinedPictures(first, others[0])) == 170


@pytest.mark.parametrize("damage", ["truncated pixels", "no pixels", "garbled index", "empty index", "no checks"])
def test_a_damaged_cache_is_built_again(damage: str, paths: list[str], tmp_path: Path) -> None:
    folder = build(paths, tmp_path / "cache").path.parent
    whole = contents(tmp_path / "cache")
    if damage == "truncated pixels":
        os.truncate(folder / PIXELS, 1000)
    elif damage == "no pixels":
        (folder / PIXELS).unlink()
    elif damage == "no checks":
        (folder / CHECKS).unlink()
    else:
        (folder / INDEX).write_bytes(b"PK\x03\x04 no archive" if damage == "garbled index" else b"")
    build(paths, tmp_path / "cache")
    assert contents(tmp_path / "cache") == whole


@pytest.mark.parametrize("name", [PIXELS, CHECKS])
def test_a_flipped_bit_is_noticed_when_its_picture_is_read(name: str, paths: list[str], tmp_path: Path) -> None:
    cached = build(paths, tmp_path / "cache")
    file = cached.path.with_name(name)
    content = bytearray(file.read_bytes())
    content[int(cached.starts[8]) - 1 if name == PIXELS else 4 * 7] ^= 1  # of picture 7
    file.write_bytes(content)
    opened = build(paths, tmp_path / "cache")
    assert np.array_equal(np.array(opened.read(6)), np.array(cached.read(6)))
    for read in (opened.read, lambda number: opened.view(number, View.SQUASHED, 8, None)):
        with pytest.raises(
            UserError, match=r"pictures\.bin: picture 7 .*wrong checksum\); remove the folder .*small-24px"
        ):
            read(7)
    shutil.rmtree(cached.path.parent)
    assert np.array_equal(np.array(build(paths, tmp_path / "cache").read(6)), np.array(opened.read(6)))


def test_a_picture_that_changes_during_the_build(paths: list[str], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(PictureFiles, "size", lambda self, number: (30, 30))
    with pytest.raises(UserError, match=r"png changed while the cache was built; run again"):
        build(paths, tmp_path)


def test_broken_and_missing_pictures_are_named(tmp_path: Path) -> None:
    paths = write_pictures(tmp_path / "source", 9)
    stream = io.BytesIO()
    datasets.smooth_picture(1, 64, 64).save(stream, "PNG")
    Path(paths[6]).write_bytes(stream.getvalue()[:-400])
    for _ in range(2):
        with pytest.raises(UserError, match=r"6\.png \(row 6 of index\.mat\) is truncated or broken") as error:
            build(paths, tmp_path / "cache")
        assert "\n" not in str(error.value)
        assert not [path for path in (tmp_path / "cache").rglob(INDEX)]
    Path(paths[6]).unlink()
    with pytest.raises(UserError, match=r"6\.png \(row 6 of index\.mat\) is missing"):
        build(paths, tmp_path / "cache")


def test_pictures_that_are_stored_decoded(tmp_path: Path) -> None:
    array = PictureArray(np.zeros((3, 8, 8, 3), np.uint8))
    with pytest.raises(UserError, match=r"dataset\.cache: the pictures of small are stored decoded.*cache=null"):
        cached_pictures(array, tmp_path, "small", 24)


def test_size_and_room_are_said_before_the_work(
    paths: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: _Usage(100_000))
    with pytest.raises(UserError, match=r"needs 0\.3 MiB, and .* has 0\.1 MiB free; .*dataset\.cache") as error:
        build(paths, tmp_path / "cache")
    assert "\n" not in str(error.value)
    assert "150 pictures take 0.3 MiB" in caplog.text
    assert not list((tmp_path / "cache").rglob(PIXELS))


class _Usage:
    def __init__(self, free: int) -> None:
        self.free = free


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 KiB."""
    with small_disk_at(tmp_path / "disk", "128k") as disk:
        yield disk


def test_full_disk(small_disk: Path, paths: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"needs .* free"):
        build(paths, small_disk)
    monkeypatch.setattr(cache, "_require_room", lambda *_: None)  # another process takes the room in the meantime
    with pytest.raises(UserError, match=r"cannot be written: No space left on device; free some room") as error:
        build(paths, small_disk)
    assert "\n" not in str(error.value)
    assert not list(small_disk.rglob(INDEX))


def test_read_only_folder(small_disk: Path, paths: list[str]) -> None:
    built = build(paths[:20], small_disk)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert np.array_equal(np.array(build(paths[:20], small_disk).read(3)), np.array(built.read(3)))
    for folder in (small_disk, small_disk / "new"):
        with pytest.raises(UserError, match=r"cannot be written to \(Read-only file system\).*dataset\.cache") as error:
            build(paths[:21], folder)
        assert "\n" not in str(error.value)
