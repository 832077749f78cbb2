"""Where pictures come from: files named by an index, or arrays inside a .mat or .npy file."""

import os
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from common.errors import UserError
from dataset.pictures.draws import Floats
from dataset.pictures.opening import as_rgb, opened
from dataset.pictures.transforms import View, view_pixels


class Pictures(ABC):
    """Reads pictures by number. Instances travel to worker processes, so they hold no open file."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of pictures."""

    @abstractmethod
    def read(self, number: int) -> Image.Image:
        """Reads and decodes one picture.

        Returns:
            The picture in RGB.

        Raises:
            UserError: If it is missing, broken, or not a picture.
        """

    def size(self, number: int) -> tuple[int, int]:
        """Width and height of one picture in pixels, as the source has it.

        Raises:
            UserError: As `read`.
        """
        return self.read(number).size

    def view(self, number: int, view: View, size: int, draws: Floats | None) -> Tensor:
        """One picture as the model sees it, before normalisation.

        Args:
            number: Which.
            view: The transform.
            size: Side R in pixels.
            draws: Numbers for `View.RANDOM`, [CROP_DRAWS].

        Returns:
            Pixels, [3, R, R] uint8.

        Raises:
            UserError: As `read`.
        """
        return view_pixels(self.read(number), view, size, draws)

    def source_size(self, number: int, picture: Image.Image) -> tuple[int, int]:  # noqa: ARG002 - most do not scale
        """Width and height of `picture`, which `read` gave for `number`, before any scaling down."""
        return picture.size

    def files(self) -> Sequence[str] | None:
        """The file that each picture is decoded from; None where pictures are no files of their own."""
        return None


class PictureFiles(Pictures):
    """Picture files.

    Args:
        paths: One file per picture.
        place: What lists them, for messages: the index file.
        lines: The line there of each picture, where it is a text file.
    """

    def __init__(self, paths: Sequence[str], place: str, lines: Sequence[int] | None = None) -> None:
        self.paths = np.array(paths, dtype=np.str_)  # one block: worker processes share it without copying
        self.place = place
        self.lines = lines

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.paths)

    def read(self, number: int) -> Image.Image:
        """As `Pictures.read`. EXIF rotation is not applied, as in the papers' code."""
        with self._opened(number) as picture:
            return as_rgb(picture)

    def size(self, number: int) -> tuple[int, int]:
        """As `Pictures.size`; only the file's head is read."""
        with self._opened(number) as picture:
            return picture.size

    def files(self) -> Sequence[str]:
        """As `Pictures.files`."""
        paths: list[str] = self.paths.tolist()
        return paths

    def _opened(self, number: int) -> AbstractContextManager[Image.Image]:
        """One picture, not yet decoded."""
        path = str(self.paths[number])
        row = f"row {number}" if self.lines is None else f"line {self.lines[number]}"
        return opened(
            path,
            f"picture {path} ({row} of {self.place})",
            found="set dataset.image_root to its folder",
            instead="remove its row from all files" if self.lines is None else "remove the line",
        )


class PictureArray(Pictures):
    """Pictures inside an array.

    Args:
        pixels: [N, H, W, 3] uint8.
    """

    def __init__(self, pixels: npt.NDArray[np.uint8]) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.pixels)

    def read(self, number: int) -> Image.Image:
        """As `Pictures.read`."""
        return Image.fromarray(np.ascontiguousarray(self.pixels[number]))


class PictureVolume(Pictures):
    """Pictures inside a MATLAB v7.3 file, read one at a time: such files may exceed memory.

    Args:
        path: The HDF5 file.
        key: Name of its dataset, [N, 3, W, H] or, turned around, [3, W, H, N], uint8.
        number_first: Which of the two.
        count: Number of pictures N.
    """

    def __init__(self, path: Path, key: str, number_first: bool, count: int) -> None:
        self.path = path
        self.key = key
        self.number_first = number_first
        self.count = count
        self._opened: tuple[int, h5py.Dataset] | None = None  # process that opened it, and the handle

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def __len__(self) -> int:
        """Number of pictures."""
        return self.count

    def read(self, number: int) -> Image.Image:
        """As `Pictures.read`."""
        try:
            if self._opened is None or self._opened[0] != os.getpid():  # a handle must not be used across a fork
                self._opened = os.getpid(), h5py.File(self.path, "r")[self.key]
            data = self._opened[1]
            pixels = data[number] if self.number_first else data[..., number]  # [3, W, H]
        except (OSError, KeyError) as error:
            why = " ".join(str(error).split())
            raise UserError(
                f"picture {number} of {self.path} ({self.key}) cannot be read ({why}); fetch the file again"
            ) from None
        return Image.fromarray(np.ascontiguousarray(np.asarray(pixels).transpose(2, 1, 0)))


class JoinedPictures(Pictures):
    """Pictures of one source, then those of another.

    Args:
        first: Pictures 0 to len(first) - 1.
        second: The pictures after them.
    """

    def __init__(self, first: Pictures, second: Pictures) -> None:
        self.first = first
        self.second = second

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.first) + len(self.second)

    def read(self, number: int) -> Image.Image:
        """As `Pictures.read`."""
        pictures, number = self._place(number)
        return pictures.read(number)

    def size(self, number: int) -> tuple[int, int]:
        """As `Pictures.size`."""
        pictures, number = self._place(number)
        return pictures.size(number)

    def files(self) -> Sequence[str] | None:
        """As `Pictures.files`."""
        first, second = self.first.files(), self.second.files()
        return None if first is None or second is None else [*first, *second]

    def _place(self, number: int) -> tuple[Pictures, int]:
        """The source of a picture, and its number there."""
        before = len(self.first)
        return (self.first, number) if number < before else (self.second, number - before)


FIND_PICTURES = "set dataset.image_root to the folder that holds them, or fetch them"


def resolve_paths(index: Sequence[str], root: Path, place: str, remedy: str = FIND_PICTURES) -> list[str]:
    """Finds the files that an index names, wherever the index was written.

    Tries the longest end of each path that exists under `root`, so paths with foreign prefixes are found: of
    `/home/them/coco/train2017/1.jpg` first `home/them/coco/train2017/1.jpg`, then `them/coco/...`, at last `1.jpg`.
    An index comes from someone else, so it cannot lead out of `root`: `..` is dropped, and an absolute path stands as
    it is only where the user makes `/` the root. Links inside `root` are the user's own and are followed.

    Args:
        index: Paths, relative or absolute, with `/` or a backslash.
        root: The folder.
        place: What lists them, for messages.
        remedy: What to do about missing pictures, for messages.

    Returns:
        One path per entry.

    Raises:
        UserError: If a file is missing, or two entries lead to one file.
    """
    found: list[str] = []
    missing: list[int] = []
    owner: dict[str, str] = {}
    folders: dict[str, list[str]] = {}  # folder as the index writes it -> where it may be, the likeliest first
    for row, entry in enumerate(index):
        folder, name = re.fullmatch(r"(.*?)([^/\\]*)", entry, re.DOTALL).groups()  # type: ignore[union-attr]
        if folder not in folders:
            folders[folder] = list(_candidates(folder, root))
        names = spellings(name)
        places = ((there, spelt) for there in folders[folder] for spelt in names if spelt in _names(there))
        path = next((os.path.join(there, spelt) for there, spelt in places), None)
        if path is None:
            missing.append(row)
            continue
        if owner.setdefault(path, entry) != entry:
            raise UserError(
                f"{place}: {owner[path]!r} and {entry!r} both lead to {path}; set dataset.image_root to the folder "
                "that the paths of the index start from"
            )
        found.append(path)
    _names.cache_clear()
    if missing:
        if os.path.isfile(index[missing[0]]) and os.path.isabs(index[missing[0]]):
            remedy = "it lies outside; set dataset.image_root to its folder, or to / to allow every path of the index"
        raise UserError(
            f"{place}: picture {index[missing[0]]!r} (row {missing[0]}) is not under {root}; {len(missing)} of "
            f"{len(index)} pictures are missing: {remedy}"
        )
    return found


def _candidates(folder: str, root: Path) -> Iterator[str]:
    """Folders that exist and may stand for `folder`."""
    parts = [part for part in re.split(r"[/\\]+", folder) if part not in ("", ".", "..")]
    for start in range(len(parts) + 1):
        candidates = (os.path.join(root, spelt) for spelt in spellings("/".join(parts[start:])))
        yield from filter(os.path.isdir, candidates)


def spellings(path: str) -> list[str]:
    """A path as it stands, then in the normal forms of Unicode: what comes from a Mac parts accents from letters."""
    if path.isascii():
        return [path]
    return list(dict.fromkeys([path, *(unicodedata.normalize(form, path) for form in ("NFC", "NFD"))]))


@cache
def _names(folder: str) -> frozenset[str]:
    """Names in a folder: one listing instead of a look at every file."""
    return frozenset(list_folder(folder))


def list_folder(folder: str) -> list[str]:
    """Names in a folder.

    Raises:
        UserError: If it cannot be read.
    """
    try:
        return os.listdir(folder)
    except OSError as error:
        raise UserError(f"folder {folder} cannot be read ({error.strerror}); allow it to be read, or copy it") from None
