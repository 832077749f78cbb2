"""The picture cache: pictures decoded once, scaled down, and kept in one memory-mapped file.

A folder of the cache holds three files. `pictures.bin` has the grey levels of all pictures, [h, w, 3] uint8 each, one
after the other; `checks.bin` has a checksum (CRC-32) of each; `index.npz` has their sizes, from which the places
follow, and a digest of the files that they were made from. The index appears last, so where it stands the pictures are
whole. Bytes that change later are noticed when a process reads their picture for the first time.

While a cache is being built, `plan.npz` stands in the index's stead, and `done.bin` lists the parts that are on the
disk. A build that was killed goes on from there and ends in the same bytes. Threads do the work: decoding and scaling
leave Python's lock free, and no process outlives a kill.
"""

import hashlib
import logging
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from common.errors import UserError
from dataset.pictures.draws import Floats
from dataset.pictures.kernels import resize_box
from dataset.pictures.reading import Pictures
from dataset.pictures.transforms import View, crop_boxes, cropped_box, flips
from utils.files import atomic, in_turn, sync_folder
from utils.progress import progress
from utils.threads import in_threads

log = logging.getLogger(__name__)

PIXELS, CHECKS, INDEX, PLAN, DONE = "pictures.bin", "checks.bin", "index.npz", "plan.npz", "done.bin"
PART = 64  # pictures written between two entries of `done.bin`
# Of the files' layout, and of how pictures are decoded and scaled: caches of another version are made anew. 3: grey of
# 16 bits is scaled, where it was white.
_VERSION = "3"
_PARTS_A_SYNC = 64  # parts between two waits for the disk


class CachedPictures(Pictures):
    """Pictures of a cache. Those whose shorter side is longer than the stored size are scaled down, the others whole.

    Views show the same part of a picture as without a cache; pixels differ by scaling twice: for smooth pictures of
    500 x 375 pixels stored at 256 for a model that takes 224 by at most 3 grey levels of 255; by more where details
    are finer than the stored pixels.

    Args:
        path: `pictures.bin`; `checks.bin` lies beside it.
        sizes: Stored width and height, width and height of the source, [N, 4] int64.
    """

    def __init__(self, path: Path, sizes: npt.NDArray[np.int64]) -> None:
        self.path = path
        self.sizes = sizes
        self.starts = _starts(sizes)
        try:
            self.checks = np.fromfile(path.with_name(CHECKS), "<u4")  # [N]
        except OSError as error:
            raise _unreadable(path.with_name(CHECKS), error) from None
        self._checked = np.zeros(len(sizes), np.bool_)  # by this process
        self._pixels: npt.NDArray[np.uint8] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pixels": None}  # a memory map would travel as a copy of the file

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.sizes)

    def read(self, number: int) -> Image.Image:
        """As `Pictures.read`."""
        return Image.fromarray(self._stored(number))

    def view(self, number: int, view: View, size: int, draws: Floats | None) -> Tensor:
        """As `Pictures.view`: the same part of the picture to a fraction of a pixel, cut from the stored one."""
        pixels = self._stored(number)
        stored, source = self.sizes[number, :2], self.sizes[number, 2:]
        box, bounds, mirrored = np.array([0, 0, *stored], np.float64), np.array([0, 0, *stored]), False
        if draws is not None and view is View.RANDOM:
            box = crop_boxes(source[None], draws[None])[0] * np.tile(stored / source, 2)
            bounds[:2], bounds[2:] = np.floor(box[:2]), np.ceil(box[2:])
            mirrored = bool(flips(draws[None])[0])
        elif view is View.CROPPED:
            box = np.array(cropped_box((int(source[0]), int(source[1])), size)) * np.tile(stored / source, 2)
        out = np.empty((3, size, size), np.uint8)
        resize_box(pixels, box, bounds, view is not View.RANDOM, mirrored, out)
        return torch.from_numpy(out)

    def size(self, number: int) -> tuple[int, int]:
        """As `Pictures.size`."""
        width, height = self.sizes[number, 2:].tolist()
        return width, height

    def source_size(self, number: int, picture: Image.Image) -> tuple[int, int]:  # noqa: ARG002 - of another size
        """As `Pictures.source_size`."""
        return self.size(number)

    def _stored(self, number: int) -> npt.NDArray[np.uint8]:
        """Grey levels, [h, w, 3]."""
        if self._pixels is None:
            try:
                pixels = np.memmap(self.path, np.uint8, "r", shape=(int(self.starts[-1]),))
            except (OSError, ValueError) as error:
                raise _unreadable(self.path, error) from None
            self._pixels = pixels.view(np.ndarray)
        width, height = self.sizes[number, :2]
        stored = self._pixels[self.starts[number] : self.starts[number + 1]]
        # Once a process and picture, not all at the start: 30 GB would be read before the first batch. Takes 0.1 ms for
        # a picture of 262 kB (a view of it 0.5 ms), on one core.
        if not self._checked[number]:
            if zlib.crc32(stored.data) != self.checks[number]:
                raise UserError(
                    f"{self.path}: picture {number} of the picture cache has changed since it was stored (wrong "
                    f"checksum); remove the folder {self.path.parent} and run again, which builds it anew"
                )
            self._checked[number] = True
        return stored.reshape(height, width, 3)


def cached_pictures(pictures: Pictures, folder: Path, name: str, stored_size: int) -> CachedPictures:
    """Opens the cache of some pictures; builds it first, or goes on with building, where it is not whole.

    A cache is taken for whole only if every source file has the path, size and time of change that it was made from.
    Several processes may call this at once: one builds, the others wait.

    Args:
        pictures: The source.
        folder: Where caches lie (`dataset.cache`); this one gets a subfolder.
        name: The data set's name.
        stored_size: Pixels of the shorter side, `dataset.stored_size`.

    Raises:
        UserError: If the pictures are no files, one is missing, broken or changes during the build, or there is no
            room or no right to write.
    """
    files = pictures.files()
    if files is None:
        raise UserError(
            f"dataset.cache: the pictures of {name} are stored decoded, so there is nothing to gain; "
            "set dataset.cache=null"
        )
    paths = "\n".join(os.path.abspath(file) for file in files)
    folder = folder / f"{name}-{stored_size}px-{_digest(paths)}"
    stamp = _digest(_VERSION, *map(_state_of_file, files))
    sizes = _whole(folder, stamp)
    if sizes is None:
        with in_turn(folder, "dataset.cache"):
            sizes = _whole(folder, stamp)  # another process may have built it in the meantime
            if sizes is None:
                sizes = _build(pictures, folder, name, stored_size, stamp)
    cached = CachedPictures(folder / PIXELS, sizes)
    cached.view(0, View.SQUASHED, 1, None)  # maps the file and compiles, so that worker processes inherit both
    return cached


def stored_sizes(sizes: npt.NDArray[np.int64], stored_size: int) -> npt.NDArray[np.int64]:
    """Sizes at which pictures are stored: shorter side `stored_size`, ratio kept, never larger than the source.

    Args:
        sizes: Width and height, [N, 2].
        stored_size: Pixels.

    Returns:
        Width and height, [N, 2].
    """
    shorter = sizes.min(axis=1, keepdims=True)
    scaled = np.rint(sizes * stored_size / shorter).astype(np.int64)
    return np.where(shorter > stored_size, scaled, sizes)


def _build(pictures: Pictures, folder: Path, name: str, stored_size: int, stamp: str) -> npt.NDArray[np.int64]:
    """Builds a cache, or goes on with it; returns the sizes [N, 4]."""
    try:
        sizes = _read_index(folder / PLAN, stamp)
        if sizes is None:
            log.info("picture cache of %s: planning", name)
            for old in (INDEX, PLAN, DONE, CHECKS, PIXELS):  # what vouches for a file goes before the file
                (folder / old).unlink(missing_ok=True)
                sync_folder(folder)
            found = in_threads(pictures.size, range(len(pictures)))
            source = np.array(list(progress(found, total=len(pictures), desc="sizes", unit="picture")), np.int64)
            sizes = np.concatenate([stored_sizes(source, stored_size), source], axis=1)
            with atomic(folder / PLAN) as temporary, open(temporary, "wb") as file:
                np.savez(file, stamp=np.array(stamp), sizes=sizes)
        total = int(_starts(sizes)[-1])
        _require_room(folder, name, len(sizes), total)
        with _writable(folder / PIXELS) as handle, _writable(folder / CHECKS) as checks:
            os.posix_fallocate(handle, 0, total)  # no surprise after an hour's work
            os.posix_fallocate(checks, 0, 4 * len(sizes))
            _write_parts(pictures, sizes, folder, handle, checks)
        (folder / DONE).unlink()
        os.replace(folder / PLAN, folder / INDEX)
        sync_folder(folder)
    except OSError as error:
        raise UserError(
            f"picture cache {folder} cannot be written: {error.strerror or error}; free some room, set dataset.cache "
            "to another folder, or to null"
        ) from None
    log.info("picture cache of %s is whole: %s", name, folder)
    return sizes


@contextmanager
def _writable(path: Path) -> Iterator[int]:
    """A file's handle, for reading and writing."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        yield handle
    finally:
        os.close(handle)


def _write_parts(pictures: Pictures, sizes: npt.NDArray[np.int64], folder: Path, handle: int, checks: int) -> None:
    """Writes the parts that `done.bin` does not list. A part is listed when its bytes are on the disk.

    Args:
        pictures: The source.
        sizes: As `CachedPictures`.
        folder: Of the cache.
        handle: Of `pictures.bin`.
        checks: Of `checks.bin`.
    """
    starts = _starts(sizes)
    parts = [range(first, min(first + PART, len(sizes))) for first in range(0, len(sizes), PART)]

    def write(part: int) -> int:
        for number in parts[part]:
            picture, (width, height, *source) = pictures.read(number), sizes[number].tolist()
            if list(picture.size) != source:
                files = pictures.files()
                raise UserError(f"{files[number] if files else number} changed while the cache was built; run again")
            if (width, height) != picture.size:
                picture = picture.resize((width, height), Image.Resampling.BICUBIC)
            pixels = picture.tobytes()
            _write_all(handle, pixels, int(starts[number]))
            _write_all(checks, np.uint32(zlib.crc32(pixels)).astype("<u4").tobytes(), 4 * number)
        return len(parts[part])

    with _writable(folder / DONE) as listed:
        known = np.fromfile(folder / DONE, "<u4")
        os.ftruncate(listed, known.nbytes)  # a kill may leave part of a number
        os.lseek(listed, 0, os.SEEK_END)
        open_parts = sorted(set(range(len(parts))) - set(known.tolist()))
        before = len(sizes) - sum(len(parts[part]) for part in open_parts)
        with progress(total=len(sizes), initial=before, desc="picture cache", unit="picture") as bar:
            for start in range(0, len(open_parts), _PARTS_A_SYNC):
                group = open_parts[start : start + _PARTS_A_SYNC]
                for count in in_threads(write, group):
                    bar.update(count)
                os.fdatasync(handle)
                os.fdatasync(checks)
                _write_all(listed, np.array(group, "<u4").tobytes(), None)
                os.fdatasync(listed)
        os.fsync(handle)
        os.fsync(checks)


def _write_all(handle: int, content: bytes, place: int | None) -> None:
    """Writes all bytes at a place, or at the file's current one."""
    view = memoryview(content)
    while view:
        written = os.write(handle, view) if place is None else os.pwrite(handle, view, place)
        view = view[written:]
        place = None if place is None else place + written


def _require_room(folder: Path, name: str, count: int, total: int) -> None:
    """Says how large the cache will be, and refuses to begin what cannot end."""
    begun = folder / PIXELS
    need = total - (begun.stat().st_blocks * 512 if begun.exists() else 0)
    free = shutil.disk_usage(folder).free
    log.info(
        "picture cache of %s: %d pictures take %s in %s, which has %s free",
        name, count, _amount(total), folder, _amount(free),
    )  # fmt: skip
    if need > free:
        raise UserError(
            f"the picture cache of {name} needs {_amount(need)}, and {folder} has {_amount(free)} free; free some "
            "room, set dataset.cache to a folder on another disk, or to null"
        )


def _whole(folder: Path, stamp: str) -> npt.NDArray[np.int64] | None:
    """The sizes [N, 4] of a whole cache that was made from the files as they are now, else None."""
    sizes = _read_index(folder / INDEX, stamp)
    if sizes is None:
        return None
    expected = {PIXELS: _starts(sizes)[-1], CHECKS: 4 * len(sizes)}
    whole = all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in expected.items())
    return sizes if whole else None


def _read_index(path: Path, stamp: str) -> npt.NDArray[np.int64] | None:
    """The sizes [N, 4] that a file lists, if it carries the stamp; else None."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return file["sizes"] if str(file["stamp"]) == stamp else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} of the picture cache cannot be read ({error}); remove its folder and run again")


def _starts(sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Byte at which each picture begins, and the end, [N + 1]."""
    return np.concatenate([[0], np.cumsum(3 * sizes[:, 0] * sizes[:, 1])])


def _state_of_file(path: str) -> str:
    """Size and time of change; a missing file is reported when it is read."""
    try:
        status = os.stat(path)
    except OSError:
        return "missing"
    return f"{status.st_size} {status.st_mtime_ns}"


def _digest(*texts: str) -> str:
    return hashlib.blake2b("\n".join(texts).encode("utf-8", "surrogateescape"), digest_size=6).hexdigest()


def _amount(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
