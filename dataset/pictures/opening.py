"""One picture from a file or bytes: what may be opened, what is refused, and its colours. It loads no heavy package."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from common.errors import UserError

# Pictures beyond Pillow's limit are refused in `opened`; its own warning would only be a second line.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

# What picture collections hold. Pillow's other readers stay shut: that of EPS, for one, starts an interpreter.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000")


# Not torchvision.io.decode_jpeg: its pixels are Pillow's, 500 x 375 of them in 1.36 ms for 1.83 here; but copied to
# where Pillow resizes them, as is done next, a picture took 4.9 ms for 4.1, and other formats need Pillow anyway.
@contextmanager
def opened(
    source: str | BinaryIO, name: str, *, found: str, instead: str, pixels: int | None = None
) -> Iterator[Image.Image]:
    """One picture, not yet decoded; whatever goes wrong until the block ends is the user's mistake.

    Args:
        source: Path of the file, or its bytes.
        name: What the picture is, for messages.
        found: How a missing one may be found, for messages.
        instead: What to do without it, for messages.
        pixels: Most pixels; None for Pillow's limit.

    Raises:
        UserError: If it is missing, may not be read, is broken, too large, or not a picture.
    """
    limit = Image.MAX_IMAGE_PIXELS if pixels is None else pixels
    if isinstance(source, str) and os.path.exists(source) and not os.path.isfile(source):  # a pipe would be waited for
        raise UserError(f"{name} is no regular file; replace it, or {instead}")
    try:
        with Image.open(source, formats=FORMATS) as picture:
            width, height = picture.size
            if limit is not None and width * height > limit:
                raise Image.DecompressionBombError
            if is_boundless(picture):
                raise _boundless_error(name, instead)
            yield picture
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{name} is missing; fetch it again, or {found}") from None
    except PermissionError:
        raise UserError(f"{name} cannot be read (Permission denied); allow it to be read, or {instead}") from None
    except UnidentifiedImageError:
        raise UserError(f"{name} is not a picture ({', '.join(FORMATS)}); replace it, or {instead}") from None
    except Image.DecompressionBombError:
        raise UserError(
            f"{name} has more than {limit} pixels, which may be an attack on memory (decompression bomb); "
            f"scale it down, or {instead}"
        ) from None
    except Exception as error:  # decoders of broken files raise whatever they stumble over
        raise _broken_error(name, error, instead) from None


def decoded(picture: Image.Image) -> Image.Image:
    """A picture that the user has opened, as `as_rgb` gives it.

    Raises:
        UserError: As `as_rgb`; if it is broken or closed, which shows only now, or has no pixels.
    """
    try:
        picture = as_rgb(picture)
    except UserError:
        raise
    except Exception as error:  # as in `opened`
        raise _broken_error("the picture", error, "leave it out") from None
    if 0 in picture.size:
        raise UserError("the picture has no pixels; leave it out")
    return picture


def as_rgb(picture: Image.Image) -> Image.Image:
    """A picture in RGB: grey of 16 bits is scaled to 8, of which Pillow would make white from 256 on.

    Raises:
        UserError: If its values are whole numbers of 32 bits or real ones.
    """
    if is_boundless(picture):
        raise _boundless_error("the picture", "leave it out")
    if picture.mode.startswith("I"):
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)).convert("RGB")
    return picture.convert("RGB")


def is_boundless(picture: Image.Image) -> bool:
    """Whether no one can know what is white: of PNG and PPM it is 65535, also where Pillow opens 16 bits as 32."""
    return picture.mode == "F" or (picture.mode == "I" and picture.format not in ("PNG", "PPM"))


def _broken_error(name: str, error: Exception, instead: str) -> UserError:
    why = " ".join(str(error).split()) or type(error).__name__
    return UserError(f"{name} is truncated or broken ({why}); fetch it again, or {instead}")


def _boundless_error(name: str, instead: str) -> UserError:
    return UserError(
        f"{name} has real values or whole numbers of 32 bits, and says nowhere which of them is white; save it with 8 "
        f"or 16 bits, or {instead}"
    )
