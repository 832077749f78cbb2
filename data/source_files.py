"""What lies in the source folder of a preparation: finding and reading annotation files, and checking pictures."""

import hashlib
import io
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from PIL import Image, UnidentifiedImageError

from common.errors import UserError
from data.mat_files import clean_text, writing
from dataset.pictures.opening import FORMATS, is_boundless
from utils.files import atomic
from utils.progress import progress

Item = TypeVar("Item")
Result = TypeVar("Result")

log = logging.getLogger(__name__)

JOURNAL = ".pictures.jsonl"  # what is known of every picture, so that an interrupted or repeated run goes on from it
SEARCH_DEPTH = 3  # folders below the source in which an archive may have been unpacked
BATCH = 4096  # tasks handed to the threads at a time


@dataclass(frozen=True)
class Picture:
    """What decoding a picture told.

    Attributes:
        size: Bytes of the file.
        modified: Time of its last change, nanoseconds.
        fault: Why it cannot be decoded; empty if it can.
        mode: Pillow's colour mode (RGB, L, CMYK, ...).
        width: Pixels, as stored: EXIF rotation is not applied, as no paper's code does.
        height: Pixels, as stored.
        digest: Of the file's bytes.
    """

    size: int
    modified: int
    fault: str
    mode: str = ""
    width: int = 0
    height: int = 0
    digest: str = ""


def find(source: Path, name: str, archive: str, fits: Callable[[Path], bool] = os.path.exists) -> Path:
    """Finds a file or folder of an unpacked archive, in the source folder or a few folders below it.

    Args:
        source: Folder that the user names; what may not be looked at below it is passed over.
        name: Relative path inside the archive, as short as it is unmistakable.
        archive: Which download holds it, for the message.
        fits: Whether a path is one that is looked for.

    Returns:
        The nearest one; of equally near ones the first by name.

    Raises:
        UserError: If there is none.
    """
    level = [source]
    for _ in range(SEARCH_DEPTH + 1):
        for folder in level:
            if fits(folder / name):
                return folder / name
        level = [below for folder in level for below in _subfolders(folder)]
    raise UserError(f"{source}: {name} is not there; download {archive} and unpack it there (see data/README.md)")


def read_lines(path: Path) -> list[str]:
    """Lines of a text file without outer blanks; blank ones at the end do not count.

    Args:
        path: File in UTF-8; bytes that are not are replaced.

    Raises:
        UserError: If it cannot be read.
    """
    # Only line feeds part lines: str.splitlines would also cut at the exotic ones that occur in tags.
    lines = [line.decode("utf-8", "replace").strip() for line in read_bytes(path).split(b"\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def read_list(path: Path) -> list[str]:
    """Lines of a file that lists something: as `read_lines`, at least one, and what names of files can be made of.

    Args:
        path: File in UTF-8.

    Raises:
        UserError: If it cannot be read, is empty, or has a NUL character.
    """
    lines = read_lines(path)
    if not lines:
        raise UserError(f"{path}: is empty; unpack the archive again")
    for row, line in enumerate(lines, 1):
        if "\0" in line:
            raise UserError(f"{path}: line {row} has a NUL character; unpack the archive again")
    return lines


def read_bytes(path: Path) -> bytes:
    """All bytes of a file.

    Args:
        path: File to read.

    Raises:
        UserError: If it cannot be read.
    """
    with reading(path) as stream:
        return stream.read()


@contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
    """Opens a file of an archive; what the system says about a read that fails becomes one line for the user.

    Args:
        path: File to read.

    Raises:
        UserError: If it cannot be read, to the end of the block.
    """
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise UserError(f"{path}: is no regular file; unpack the archive again")
    try:
        with path.open("rb") as stream:
            yield stream
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); unpack the archive again") from error


def parallel(
    function: Callable[[Item], Result], items: Sequence[Item], title: str, unit: str
) -> Iterator[tuple[Item, Result]]:
    """Applies a function to items on threads, with a progress bar; results come in the items' order.

    Args:
        function: Spends its time in reading or decoding, which Python does not serialise.
        items: Its arguments.
        title: Name of the bar.
        unit: What is counted.

    Yields:
        Item and result.
    """
    pool = ThreadPoolExecutor(2 * (os.cpu_count() or 1))
    try:
        with progress(total=len(items), desc=title, unit=unit, smoothing=0.05) as bar:
            for start in range(0, len(items), BATCH):
                batch = items[start : start + BATCH]
                for item, result in zip(batch, pool.map(function, batch), strict=True):
                    yield item, result
                    bar.update()
    finally:
        pool.shutdown(cancel_futures=True)


def scan_pictures(source: Path, images: Iterable[str], root: Path) -> dict[str, Picture | None]:
    """Decodes every picture once, and remembers the outcome in a journal in the output folder.

    Args:
        source: Folder that the names start from.
        images: Picture files.
        root: Folder of the journal. A picture whose size and time of change are as noted is not read again.

    Returns:
        For every picture what was found; None if there is no such file.

    Raises:
        UserError: If the journal cannot be written.
    """
    path = root / JOURNAL
    known = _read_journal(path)
    found: dict[str, Picture | None] = {}
    changed: list[str] = []
    for image in images:
        noted = known.get(image)
        try:
            status = (source / image).stat()
        except OSError:
            found[image] = None
            continue
        if noted is not None and (noted.size, noted.modified) == (status.st_size, status.st_mtime_ns):
            found[image] = noted
        else:
            changed.append(image)
    if changed:
        log.info("%s: %d of %d pictures are still to be checked", source, len(changed), len(changed) + len(found))
        with writing(path), path.open("ab") as journal:
            journal.write(b"\n")  # ends a line that a killed run left unfinished
            for image, picture in parallel(lambda name: inspect_picture(source / name), changed, "pictures", "img"):
                found[image] = picture
                if picture is not None:
                    known[image] = picture
                    journal.write(_journal_line(image, picture))
    lines = b"".join(_journal_line(image, known[image]) for image in sorted(known))
    if path.exists() and path.read_bytes() != lines:  # as it came in, or as a killed run left it
        with atomic(path) as temporary:
            temporary.write_bytes(lines)
    return found


def inspect_picture(path: Path) -> Picture | None:
    """Reads and decodes one picture to its end.

    Args:
        path: The file.

    Returns:
        What was found; None if there is no such file.
    """
    try:
        status = path.stat()
        if not path.is_file():  # a pipe would be waited for
            return Picture(status.st_size, status.st_mtime_ns, "no regular file")
    except OSError:
        return None
    try:
        content = path.read_bytes()
    except OSError as error:  # at time 0: may be otherwise next time, without any change that the file's time tells
        return Picture(status.st_size, 0, f"cannot be read ({error.strerror})")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
            mode, (width, height) = picture.mode, picture.size
            if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError("decompression bomb: too many pixels")
            if is_boundless(picture):
                raise ValueError("real values or 32 bits, of which no one knows which is white")
            # JPEG's cheapest scale: every coded bit is still read, so a cut file is noticed, in less time.
            picture.draft("L", (1, 1))
            picture.load()
    except Exception as error:  # noqa: BLE001 - decoders fail in many ways on bytes that are no picture
        unknown = isinstance(error, UnidentifiedImageError)
        fault = "not a picture" if unknown else clean_text(str(error)) or type(error).__name__
        return Picture(status.st_size, status.st_mtime_ns, fault)
    digest = hashlib.blake2b(content, digest_size=12).hexdigest()
    return Picture(status.st_size, status.st_mtime_ns, "", mode, width, height, digest)


def _subfolders(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return sorted(Path(entry.path) for entry in entries if os.path.isdir(entry.path))  # links in a circle: none
    except OSError:
        return []


def _read_journal(path: Path) -> dict[str, Picture]:
    known: dict[str, Picture] = {}
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        try:
            image, *values = json.loads(line)
            known[image] = Picture(*values)
        except (ValueError, TypeError):  # the line in which a killed run stopped
            continue
    return known


def _journal_line(image: str, picture: Picture) -> bytes:
    p = picture
    values = [image, p.size, p.modified, p.fault, p.mode, p.width, p.height, p.digest]
    return json.dumps(values, separators=(",", ":")).encode() + b"\n"
