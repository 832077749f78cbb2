"""Weights of CLIP: opening a file of any common form, fetching OpenAI's, writing ours.

Whatever the form, the result is a state dict under OpenAI's key names in float32, checked name by name and size by size
against the CLIP that it describes (`models/clip/formats.py`). Files are read without running anything that is in them
(`common/tensor_files.py`).

OpenAI's files come from a public address whose path holds their SHA-256. Set the environment variable
`CLIP_WEIGHTS_URL` to fetch them from a mirror with the same layout, `<address>/<sha256>/<file>`.
"""

import http.client
import logging
import os
import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from common.errors import UserError
from common.registry import near_names
from common.tensor_files import CHECKSUM, checksum, read_tensors, require_finite
from common.types import Backbone
from models.clip.formats import activation_of, require_exact, shape_of, to_openai_names
from utils.files import atomic, in_turn, sha256
from utils.progress import progress

logger = logging.getLogger(__name__)

OPENAI = {  # name -> (SHA-256, file)
    "ViT-B/32": ("40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af", "ViT-B-32.pt"),
    "ViT-B/16": ("5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f", "ViT-B-16.pt"),
    "ViT-L/14": ("b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836", "ViT-L-14.pt"),
    "ViT-L/14@336px": ("3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02", "ViT-L-14-336px.pt"),
}
OPENAI_URL = "https://openaipublic.azureedge.net/clip/models"


def is_config(name: str) -> bool:
    """Whether `model.backbone` names the YAML of a run that trains a CLIP, not weights."""
    return Path(name).suffix.lower() in {".yaml", ".yml"}


def open_backbone(name: str, cache_dir: str) -> Backbone:
    """The CLIP of a public name, fetched into the cache if it is not there, or of a weight file.

    Args:
        name: `ViT-B/32`, `ViT-B/16`, `ViT-L/14`, `ViT-L/14@336px` (OpenAI's), or the path of a weight file.
        cache_dir: Folder that keeps what was fetched, in its subfolder `clip`.

    Returns:
        Sizes, weights in float32 on the CPU, and where they came from.

    Raises:
        UserError: If there is no such name or file, it cannot be fetched, or it is not a CLIP.
    """
    if name in OPENAI:
        return read_clip(_openai_file(name, Path(cache_dir) / "clip"))
    if not Path(name).exists():
        raise UserError(
            f"model.backbone: {name!r} is neither a file nor a public name ({', '.join(OPENAI)})"
            f"{near_names(name, list(OPENAI))}"
        )
    return read_clip(name)


def read_clip(path: str | Path) -> Backbone:
    """Reads a CLIP with vision-transformer towers from a file; nothing in the file is run.

    Forms: OpenAI's TorchScript archives; state dicts written by `torch.save`, also inside other mappings or with a
    prefix before every name; safetensors. Names: OpenAI's, which OpenCLIP shares, or those of
    Hugging Face's CLIPModel.

    The activation stands in no weight file. It is OpenAI's QuickGELU unless the model's `config.json` (Hugging Face) or
    `open_clip_config.json` (OpenCLIP) beside the file says otherwise.

    Args:
        path: The file.

    Returns:
        Sizes, weights in float32 on the CPU, and where they came from.

    Raises:
        UserError: If the file cannot be read, is damaged, asks for code to be run, or holds no such CLIP.
    """
    path = Path(path)
    try:
        file = read_tensors(path)
        state, layout = to_openai_names(file.tensors)
        shape = shape_of(state)
        require_exact(state, shape)
        activation, told = activation_of(path, file.form, layout, file.metadata)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    require_finite(state, str(path))
    precisions = sorted({str(value.dtype).removeprefix("torch.") for value in state.values()})
    logger.info(
        "read %s: %s, %s names; %d tensors, %s; pictures %d px in patches of %d, image tower %d x %d, "
        "text tower %d x %d, joint space %d; activation %s (%s)",
        *(path, file.form, layout, len(state), "/".join(precisions), shape.image_size, shape.patch_size),
        *(shape.vision_width, shape.vision_layers, shape.text_width, shape.text_layers, shape.embed_dim),
        *(activation, told),
    )
    weights = {name: value.to(torch.float32).contiguous() for name, value in state.items()}
    return Backbone(replace(shape, activation=activation), weights, f"{path} ({file.form}, {layout} names)")


def write_clip(path: str | Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a CLIP's state dict as safetensors, atomically.

    Args:
        path: The file; its folder exists.
        state: Tensors under OpenAI's names, any shapes.
        metadata: What to remember of their origin. `activation` is QuickGELU unless it says otherwise.

    Raises:
        UserError: If the file cannot be written.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    with atomic(Path(path)) as temporary:
        described = {"activation": "quick_gelu", CHECKSUM: checksum(tensors), **metadata}
        temporary.write_bytes(safetensors.torch.save(tensors, described))


# ------------------------------------------------------------------------------------------------ fetching


def _openai_file(name: str, folder: Path) -> Path:
    """The verified file of a public name, fetched if it is not in `folder`."""
    digest, file = OPENAI[name]
    path = folder / file
    if not path.exists():
        with in_turn(folder, "run.cache_dir"):
            if not path.exists():
                base = os.environ.get("CLIP_WEIGHTS_URL", OPENAI_URL).rstrip("/")
                _fetch(name, f"{base}/{digest}/{file}", path, digest)
    elif sha256(path) != digest:
        raise UserError(f"{name}: {path} is not OpenAI's file (its SHA-256 differs); delete it, and it is fetched anew")
    return path


def _fetch(name: str, url: str, path: Path, digest: str) -> None:
    """Fetches `url` to `path`; what an earlier attempt left is gone on with, and nothing unverified takes the name."""
    part = path.with_name(f"{path.name}.part")
    logger.info("%s: fetching %s", name, url)
    by_hand = f"fetch it on another machine and put it at {path}, or set model.backbone to a weight file that you have"
    while True:
        before = _size(part)
        try:
            if _transfer(url, part):
                break
            reason = "the connection was closed early"
        except urllib.error.HTTPError as error:
            if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and before:
                break  # it was complete; the digest decides
            raise UserError(f"{name}: {url} cannot be fetched (HTTP {error.code} {error.reason}); {by_hand}") from None
        except (urllib.error.URLError, ConnectionError, TimeoutError, ssl.SSLError, http.client.HTTPException) as error:
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        except OSError as error:
            raise UserError(f"{part} cannot be written: {error.strerror or error}; free some room") from None
        if _size(part) <= before:  # as long as tries bring bytes, the next goes on where the last one stopped
            kept = f"; {before / 1e6:.1f} MB are kept, and the next run goes on from there" if before else ""
            raise UserError(f"{name}: {url} cannot be fetched ({reason}){kept}; {by_hand}")
        logger.warning("%s: %s; going on", name, reason)
    if sha256(part) != digest:
        part.unlink()
        raise UserError(f"{name}: what came from {url} has another SHA-256 and was removed; run again, or {by_hand}")
    os.replace(part, path)


def _transfer(url: str, part: Path) -> bool:
    """Appends to `part` what it lacks of `url`, or starts anew if the server cannot; returns whether it is complete."""
    have = _size(part)
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=30) as reply:
        start = have if reply.status == http.HTTPStatus.PARTIAL_CONTENT else 0
        length = reply.headers["Content-Length"]
        total = None if length is None else start + int(length)
        name = part.name.removesuffix(".part")
        with (
            open(part, "ab" if start else "wb") as file,
            progress(desc=name, total=total, initial=start, unit="B", unit_scale=True) as bar,
        ):
            while chunk := reply.read(1 << 20):
                file.write(chunk)
                bar.update(len(chunk))
    return total is None or _size(part) == total


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
