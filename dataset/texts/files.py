"""Text files with one caption per item."""

import json
from collections.abc import Sequence
from pathlib import Path

from common.errors import UserError


def read_lines(path: Path) -> list[str]:
    """Lines of a UTF-8 text file, blanks around them stripped; an empty line is an empty text.

    Raises:
        UserError: If the file cannot be read or is not UTF-8.
    """
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise UserError(f"{path} is no regular file; name a text file in the dataset section")
    try:
        with path.open(encoding="utf-8-sig") as file:
            return [line.strip() for line in file]
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); name an existing file in the dataset section"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); convert it to UTF-8") from None


def read_json_lines(path: Path, ids: Sequence[str]) -> list[list[str]]:
    """Captions from lines `{"id": ..., "caption": ...}` in any order.

    Args:
        path: The file.
        ids: The items' names in order; a line may name its item by this name or by its number, from 0.

    Returns:
        The captions of every item, in the order of the lines.

    Raises:
        UserError: If a line is not of that form or names no item, or an item has no line.
    """
    numbers = {name: number for number, name in enumerate(ids)}
    captions: list[list[str]] = [[] for _ in ids]
    for row, line in enumerate(read_lines(path), start=1):
        if not line:
            continue
        try:
            entry = json.loads(line)
            item, caption = entry["id"], entry["caption"]
        except (ValueError, KeyError, TypeError, RecursionError):  # a ValueError also for thousands of digits
            item = caption = None
        if not isinstance(caption, str) or isinstance(item, bool) or not isinstance(item, str | int):
            raise UserError(f'{path}, line {row}: must be {{"id": name or number, "caption": text}}; mend the line')
        number = numbers.get(item) if isinstance(item, str) else item
        if number is None or not 0 <= number < len(captions):
            raise UserError(f"{path}, line {row}: the index has no item {item!r}; mend or remove the line")
        captions[number].append(caption.strip())
    without = [number for number, texts in enumerate(captions) if not texts]
    if without:
        raise UserError(
            f"{path}: {len(without)} of {len(ids)} items have no caption, the first is {ids[without[0]]!r} (row "
            f"{without[0]}); add a line for each"
        )
    return captions
