"""Converts the hash centres and transforms that the authors of TwDH published (.pkl) to files of this library.

    python data/convert_twdh_centers.py --source data/transformer/TwDH --root data/twdh

The source holds `long/<bits>.pkl`, `short/<bits>.pkl` and `trans/<long>/<short>.pkl`, or folders that do, one for each
data set. What is written, `<root>/<data set>/<long>.safetensors`, is what `model.center_folder` names. Nothing but
arrays is taken out of a .pkl: a pickle that asks for anything else is refused before it runs.
"""

import logging
import pickle
import re
import sys
from pathlib import Path

if not __package__:  # run as a script: the packages of the repository stand one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from utils.signals import die_of_interrupts

    die_of_interrupts()

import torch
from torch import Tensor

from common.errors import UserError
from data.command_line import named_path, run_script
from models.blocks.center_files import check_centers, write_centers
from models.blocks.hash_centers import HashCenters, wrong_bits
from utils.arguments import Parser
from utils.files import make_folder

log = logging.getLogger(__name__)

KINDS = ("long", "short", "trans")
NUMBER = re.compile("[1-9][0-9]*")  # of 16 and 016, not both
NUMBERS = (  # types with all arithmetic; of torch's others, some have no comparison, some no values at all
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
)


def read_array(path: Path) -> Tensor:
    """The one array that a .pkl of `torch.save` holds.

    Args:
        path: The file.

    Returns:
        The array, [...], in float32.

    Raises:
        UserError: If the file is damaged, holds anything but one array, or would run code.
    """
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise UserError(f"{path} is no regular file; download it again")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from None
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error) or "Unsupported" in str(error):
            raise UserError(f"{path} is refused: its pickle asks for more than arrays, which could run code") from None
        raise UserError(f"{path} is damaged, or no file of torch.save; download it again") from None
    except Exception:  # torch raises anything from RuntimeError to KeyError on a broken file
        raise UserError(f"{path} is damaged, or no file of torch.save; download it again") from None
    if not isinstance(content, Tensor) or not _is_plain(content):
        raise UserError(f"{path} holds {type(content).__name__}, not one real array; it is no file of centres")
    return content.detach().float()


def read_set(source: Path) -> dict[int, HashCenters]:
    """Reads and checks the files of one data set.

    Args:
        source: Folder with `long`, `short` and `trans`.

    Returns:
        By long length: long centres, all short centres, and the transforms that there are.

    Raises:
        UserError: With the first file that does not fit the others.
    """
    longs, shorts = _by_bits(source / "long"), _by_bits(source / "short")
    if not longs or not shorts:
        lacking = "short" if longs else "long"
        raise UserError(f"{source / lacking} holds no <bits>.pkl; --source names what the authors published")
    arrays = {path: read_array(path) for path in (*longs.values(), *shorts.values())}
    first = next(iter(arrays.values()))
    classes = max(1, len(first) if first.dim() else 0)
    for lengths in (longs, shorts):
        for bits, path in lengths.items():
            check_centers(arrays[path], (classes, bits), str(path), signs=True)
    short = {bits: arrays[path] for bits, path in shorts.items()}
    found = {}
    for long_bits, path in longs.items():
        transforms = {}
        for bits, trans in _by_bits(source / "trans" / str(long_bits)).items():
            if bits not in short:
                raise UserError(f"{trans} leads to {bits} bits, but {source / 'short' / f'{bits}.pkl'} is not there")
            transform = read_array(trans)
            check_centers(transform, (2 * long_bits, 2 * bits), str(trans), signs=False)
            transforms[bits] = transform
        found[long_bits] = HashCenters(arrays[path], short, transforms)
    return found


def convert(source: Path, root: Path) -> list[Path]:
    """Converts one data set's files, or those of all data sets in the source folder; nothing is written unless all fit.

    Args:
        source: Folder with `long`, `short` and `trans`, or with folders that have them.
        root: Folder to write to.

    Returns:
        The files written.

    Raises:
        UserError: If there is nothing to convert, a file does not fit, or the root cannot be written.
    """
    if not source.is_dir():
        raise UserError(f"--source {source}: no such folder")
    if any((source / kind).is_dir() for kind in KINDS):
        sets = {root: read_set(source)}
    else:
        folders = sorted(folder for folder in source.iterdir() if any((folder / kind).is_dir() for kind in KINDS))
        sets = {root / folder.name: read_set(folder) for folder in folders}
    if not sets:
        raise UserError(f"--source {source}: neither it nor a folder in it holds {', '.join(KINDS)}")
    written = []
    for folder, by_length in sets.items():
        make_folder(folder, "--root")
        for long_bits, centers in by_length.items():
            path = folder / f"{long_bits}.safetensors"
            write_centers(path, centers, {"generator": "the authors of TwDH", "seed": None})
            quality = [
                f"{bits} bits {100 * wrong_bits(transform, centers.long, centers.short[bits]):.1f} %"
                for bits, transform in centers.transforms.items()
            ]
            told = f"class bits that its transforms miss: {', '.join(quality)}" if quality else "no transforms"
            log.info("%s: %d classes; %s", path, len(centers.long), told)
            written.append(path)
    return written


def main(arguments: list[str] | None = None) -> int:
    """Command line of the script; exit code 2 for a user's mistake."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--source", type=named_path, required=True, help="folder with long/, short/ and trans/")
    parser.add_argument("--root", type=named_path, default=Path("data/twdh"), help="folder to write to (%(default)s)")
    return run_script(parser, lambda options: convert(options.source, options.root), arguments)


def _is_plain(array: Tensor) -> bool:
    """Whether an array [...] is dense, of real numbers, and its file holds each of them.

    Not so of booleans, of shapes without values, and of one value that is spread over a shape larger than memory.
    """
    if array.layout is not torch.strided or array.is_nested or array.is_meta or array.dtype not in NUMBERS:
        return False
    return array.numel() * array.element_size() <= array.untyped_storage().nbytes()


def _by_bits(folder: Path) -> dict[int, Path]:
    """The files `<bits>.pkl` of a folder by their bits, ascending; empty where there is no folder."""
    return dict(sorted((int(path.stem), path) for path in folder.glob("[1-9]*.pkl") if NUMBER.fullmatch(path.stem)))


if __name__ == "__main__":
    sys.exit(main())
