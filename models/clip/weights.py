"""Weights of CLIP: reading files of every common form without running them, fetching OpenAI's, writing ours.

A weight file is a program in two of its forms: a TorchScript archive holds code, and a pickle may call anything. Here
an archive's pickle is read by an unpickler that knows how to rebuild tensors and nothing else, other pickles by torch's
own restricted one, safetensors hold only numbers. Whatever the form, the result is a state dict under OpenAI's key
names in float32, checked name by name and size by size against the CLIP that it describes.

OpenAI's files come from a public address whose path holds their SHA-256. Set the environment variable
`CLIP_WEIGHTS_URL` to fetch them from a mirror with the same layout, `<address>/<sha256>/<file>`.
"""

import hashlib
import http.client
import json
import logging
import math
import os
import pickle
import re
import ssl
import urllib.error
import urllib.request
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from common.errors import UserError
from common.registry import near_names
from common.types import Backbone, ClipShape
from models.clip.towers import CLIP, HEAD_WIDTH
from utils.files import FolderLock, atomic, make_folder
from utils.progress import progress

logger = logging.getLogger(__name__)

Tensors = dict[str, Tensor]

OPENAI = {  # name -> (SHA-256, file)
    "ViT-B/32": ("40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af", "ViT-B-32.pt"),
    "ViT-B/16": ("5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f", "ViT-B-16.pt"),
    "ViT-L/14": ("b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836", "ViT-L-14.pt"),
    "ViT-L/14@336px": ("3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02", "ViT-L-14-336px.pt"),
}
OPENAI_URL = "https://openaipublic.azureedge.net/clip/models"
WIDEST = 1024  # of ViT-L; the wider towers of OpenCLIP (H, g, G) have heads of another width


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

    Forms: OpenAI's TorchScript archives; state dicts written by `torch.save`, also wrapped (`{"state_dict": ...}`) or
    with a prefix before every name (`module.`); safetensors. Names: OpenAI's, which OpenCLIP shares, or those of
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
        tensors, form, metadata = _read_tensors(path)
        state, layout = _to_openai_names(tensors)
        shape = shape_of(state)
        _require_exact(state, shape)
        activation, told = _activation(path, form, layout, metadata)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    precisions = sorted({str(value.dtype).removeprefix("torch.") for value in state.values()})
    logger.info(
        "read %s: %s, %s names; %d tensors, %s; pictures %d px in patches of %d, image tower %d x %d, "
        "text tower %d x %d, joint space %d; activation %s (%s)",
        *(path, form, layout, len(state), "/".join(precisions), shape.image_size, shape.patch_size),
        *(shape.vision_width, shape.vision_layers, shape.text_width, shape.text_layers, shape.embed_dim),
        *(activation, told),
    )
    weights = {name: value.to(torch.float32).contiguous() for name, value in state.items()}
    return Backbone(replace(shape, activation=activation), weights, f"{path} ({form}, {layout} names)")


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
        temporary.write_bytes(safetensors.torch.save(tensors, {"activation": "quick_gelu", **metadata}))


# ------------------------------------------------------------------------------------------------ sizes and names


def shape_of(state: Mapping[str, Tensor]) -> ClipShape:
    """Sizes of a CLIP, read off its tensors; the activation, which they do not show, is OpenAI's.

    Args:
        state: State dict under OpenAI's names: `visual.conv1.weight` [W, 3, p, p], `positional_embedding` [L, W], ...

    Raises:
        UserError: If it lacks a tensor that a size is read from, or holds towers of another kind.
    """
    dimensions = {
        "visual.conv1.weight": 4,
        "visual.positional_embedding": 2,
        "positional_embedding": 2,
        "token_embedding.weight": 2,
        "text_projection": 2,
    }
    _require_names(state, list(dimensions))
    for name, number in dimensions.items():
        if state[name].ndim != number:
            raise UserError(f"{name} has the shape {list(state[name].shape)}, a CLIP's has {number} dimensions")
    conv, positions = state["visual.conv1.weight"], state["visual.positional_embedding"]
    grid = math.isqrt(max(len(positions) - 1, 0))
    shape = ClipShape(
        embed_dim=state["text_projection"].shape[1],
        image_size=grid * conv.shape[-1],
        patch_size=conv.shape[-1],
        vision_width=conv.shape[0],
        vision_layers=_count_blocks(state, "visual.transformer"),
        text_width=state["positional_embedding"].shape[1],
        text_layers=_count_blocks(state, "transformer"),
        context_length=len(state["positional_embedding"]),
        vocabulary=len(state["token_embedding.weight"]),
    )
    for tower, width in (("image", shape.vision_width), ("text", shape.text_width)):
        if width % HEAD_WIDTH or not 0 < width <= WIDEST:
            raise UserError(
                f"the {tower} tower is {width} wide; heads are {HEAD_WIDTH} wide here, as in ViT-B and ViT-L, whose "
                f"widths are multiples of {HEAD_WIDTH} up to {WIDEST}; choose such a model"
            )
    if grid == 0 or grid**2 != len(positions) - 1:
        raise UserError(f"{len(positions)} positions of the image tower are not a square grid and a class token")
    return shape


def _count_blocks(state: Mapping[str, Tensor], tower: str) -> int:
    found = (re.match(rf"{re.escape(tower)}\.resblocks\.(\d+)\.", name) for name in state)
    return len({match[1] for match in found if match})


def _require_exact(state: Mapping[str, Tensor], shape: ClipShape) -> None:
    """Refuses a state dict that differs from the CLIP of `shape` in a name or a size."""
    with torch.device("meta"):
        expected = CLIP(shape).state_dict()
    _require_names(state, list(expected))
    unknown = [name for name in state if name not in expected]
    if unknown:
        raise UserError(
            f"{_some(unknown)} {'have' if len(unknown) > 1 else 'has'} no place in a CLIP with vision-transformer "
            "towers; a model with such parts computes something else"
        )
    for name, value in state.items():
        if value.shape != expected[name].shape or not value.is_floating_point():
            raise UserError(
                f"{name} is {value.dtype} of shape {list(value.shape)}; beside the other tensors it must be "
                f"floating-point of shape {list(expected[name].shape)}"
            )


def _require_names(state: Mapping[str, Tensor], names: list[str]) -> None:
    missing = [name for name in names if name not in state]
    if missing:
        extra = [name for name in state if name not in names]
        raise UserError(
            f"not a whole CLIP, save its full state dict: {len(missing)} tensors are missing, {_some(missing)}"
            f"{near_names(missing[0], extra)}"
        )


def _some(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


Layout = Literal["OpenAI", "Hugging Face"]
ANCHORS: dict[Layout, str] = {  # a tensor that every file of the layout holds
    "OpenAI": "visual.conv1.weight",
    "Hugging Face": "vision_model.embeddings.patch_embedding.weight",
}
NOT_WEIGHTS = re.compile(r"(^(input_resolution|context_length|vocab_size)|(^|\.)(attn_mask|position_ids))$")

HUGGING_FACE = (  # pattern of Hugging Face's name -> OpenAI's; applied in order
    (r"^vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
    (r"\.self_attn\.([qkv])_proj\.(weight|bias)$", r".attn.in_proj_\2.\1"),
    (r"^vision_model\.embeddings\.class_embedding$", "visual.class_embedding"),
    (r"^vision_model\.embeddings\.patch_embedding\.weight$", "visual.conv1.weight"),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "visual.positional_embedding"),
    (r"^vision_model\.pre_layrnorm\.", "visual.ln_pre."),  # their spelling
    (r"^vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"^visual_projection\.weight$", "visual.proj"),
    (r"^text_model\.embeddings\.token_embedding\.weight$", "token_embedding.weight"),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^text_projection\.weight$", "text_projection"),
)


def _to_openai_names(tensors: Tensors) -> tuple[Tensors, Layout]:
    """The tensors of the one CLIP among `tensors`, without prefix and under OpenAI's names."""
    for layout, anchor in ANCHORS.items():
        prefixes = [name.removesuffix(anchor) for name in tensors if re.search(rf"(^|\.){re.escape(anchor)}$", name)]
        if not prefixes:
            continue
        if len(prefixes) > 1:
            raise UserError(f"holds {len(prefixes)} image towers, under {_some(prefixes)}; save one CLIP alone")
        inside = {
            name.removeprefix(prefixes[0]): value for name, value in tensors.items() if name.startswith(prefixes[0])
        }
        state = {name: value for name, value in inside.items() if not NOT_WEIGHTS.search(name)}
        if any(name.startswith("visual.layer1.") for name in state):
            raise UserError(
                "this CLIP's image tower is a ResNet; only vision transformers have the tokens that methods here "
                "need: choose ViT-B/32, ViT-B/16 or ViT-L/14"
            )
        return (_from_hugging_face(state) if layout == "Hugging Face" else state), layout
    raise UserError(
        f"not a CLIP with a vision transformer: {len(tensors)} tensors ({_some(list(tensors)) or 'none'}), and none is "
        f"called {' or '.join(ANCHORS.values())}"
    )


def _from_hugging_face(tensors: Tensors) -> Tensors:
    """Renames, transposes the two projections, and joins query, key and value of every block."""
    state: Tensors = {}
    for name, value in tensors.items():
        for pattern, replacement in HUGGING_FACE:
            name = re.sub(pattern, replacement, name)
        state[name] = value.T if name in {"visual.proj", "text_projection"} else value
    for joint in [name.removesuffix(".q") for name in state if name.endswith(".q")]:
        parts = [f"{joint}.{part}" for part in "qkv"]
        if all(part in state for part in parts):
            state[joint] = torch.cat([state.pop(part) for part in parts])
    return state


Activation = Literal["quick_gelu", "gelu"]


def _activation(path: Path, form: str, layout: Layout, metadata: Mapping[str, str]) -> tuple[Activation, str]:
    """The activation of the MLPs, and who says so."""
    if form == "TorchScript archive":
        return "quick_gelu", "OpenAI's"
    if "activation" in metadata:
        stated, told = {metadata["activation"]}, "stated in the file"
    else:
        beside = path.with_name("config.json" if layout == "Hugging Face" else "open_clip_config.json")
        if not beside.exists():
            return "quick_gelu", f"taken as OpenAI's, since there is no {beside.name} beside the file to say"
        told = f"stated in {beside.name}"
        try:
            described = json.loads(beside.read_text(encoding="utf-8"))
            if layout == "Hugging Face":
                towers = [described.get(tower) or {} for tower in ("text_config", "vision_config")]
                stated = {tower.get("hidden_act", "quick_gelu") for tower in towers}
            else:
                stated = {"quick_gelu" if described["model_cfg"].get("quick_gelu") else "gelu"}
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            raise UserError(f"{beside.name} beside it does not describe a CLIP; mend or remove it") from None
    for activation in ("quick_gelu", "gelu"):
        if stated == {activation}:
            return activation, told
    raise UserError(f"activation {' and '.join(sorted(map(str, stated)))} is not known here, only quick_gelu and gelu")


# ------------------------------------------------------------------------------------------------ forms of files


def _read_tensors(path: Path) -> tuple[Tensors, str, Mapping[str, str]]:
    """Named tensors of a file, the name of its form, and its metadata."""
    try:
        with open(path, "rb") as file:
            start = file.read(9)
        if start.startswith(b"PK"):
            with zipfile.ZipFile(path) as archive:
                if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                    return _ArchiveReader(archive).read(), "TorchScript archive", {}
            return _read_state_dict(path), "state dict", {}
        if start.startswith(b"\x80"):
            return _read_state_dict(path), "state dict", {}
        if start[8:] == b"{" or path.suffix == ".safetensors":
            with safetensors.safe_open(path, framework="pt") as opened:
                return {name: opened.get_tensor(name) for name in opened.keys()}, "safetensors", opened.metadata() or {}
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror or error}); name a weight file") from None
    except (zipfile.BadZipFile, safetensors.SafetensorError) as error:
        raise UserError(f"truncated or damaged ({error}); fetch it anew") from None
    raise UserError("not a weight file (TorchScript archive, state dict of torch.save, or safetensors)")


def _read_state_dict(path: Path) -> Tensors:
    """Tensors of a file of `torch.save`, taken out of the wrappers that training scripts put around them."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL ([\w.]+)|class ([\w.]+)", str(error))
        if asked is None:
            raise UserError("truncated or damaged, or a pickle that torch.save did not write; fetch it anew") from None
        raise UserError(_refused(asked[1] or asked[2])) from None
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise UserError(f"truncated or damaged ({str(error).splitlines()[0]}); fetch it anew") from None
    for wrapper in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping):
        raise UserError(f"holds a {type(content).__name__}, not a state dict; save model.state_dict()")
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


def _refused(name: str) -> str:
    return f"refused: its pickle asks for {name}, which is code and not weights; save model.state_dict() or safetensors"


class _Node:
    """Stands for an object of a TorchScript program: keeps its attributes, has no behaviour."""

    attributes: Mapping[str, Any] = {}

    def __setstate__(self, attributes: Mapping[str, Any]) -> None:
        self.attributes = attributes


class _ArchiveReader(pickle.Unpickler):
    """Reads the attributes of a TorchScript archive: admits the rebuilding of tensors, and nothing else."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if not names:
            raise UserError("a TorchScript archive without its data; fetch it anew")
        super().__init__(archive.open(names[0]))
        self._archive = archive
        self._folder = names[0].removesuffix("data.pkl") + "data/"
        self._storages: Tensors = {}

    def read(self) -> Tensors:
        """Every tensor, by the path of attributes that leads to it.

        Raises:
            UserError: If the archive asks for anything but tensors, or is damaged.
        """
        try:
            named: Tensors = {}
            nodes: list[tuple[str, Any]] = [("", self.load())]
            while nodes:
                prefix, node = nodes.pop()
                for name, value in node.attributes.items():
                    if isinstance(value, _Node):
                        nodes.append((f"{prefix}{name}.", value))
                    elif isinstance(value, Tensor):
                        named[prefix + name] = value
            return named
        except (UserError, OSError, zipfile.BadZipFile):
            raise
        except Exception as error:  # bytes of a damaged pickle lead to any exception at all
            raise UserError(f"truncated or damaged ({type(error).__name__}: {error}); fetch it anew") from None

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a global of the pickle."""
        if module == "torch._utils" and name == "_rebuild_tensor_v2":
            return self._rebuild
        if module == "torch" and name in STORAGE_TYPES:
            return STORAGE_TYPES[name]
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "__torch__" or module.startswith("__torch__."):
            return _Node
        if module == "torch.jit._pickle":
            return _first  # marks lists with their element type
        raise UserError(_refused(f"{module}.{name}"))

    def persistent_load(self, identity: Any) -> Tensor:
        """The storage of a tensor, flat [n]: `identity` is ("storage", dtype, key, device, number of elements)."""
        _, dtype, key, _, _ = identity
        if key not in self._storages:
            content = bytearray(self._archive.read(self._folder + key))
            self._storages[key] = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
        return self._storages[key]

    @staticmethod
    def _rebuild(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
        return storage.as_strided(size, stride, offset)  # raises beyond the storage


STORAGE_TYPES = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
}


def _first(value: Any, *_: Any) -> Any:
    return value


# ------------------------------------------------------------------------------------------------ fetching


def _openai_file(name: str, folder: Path) -> Path:
    """The verified file of a public name, fetched if it is not in `folder`."""
    digest, file = OPENAI[name]
    path = folder / file
    if not path.exists():
        make_folder(folder, "run.cache_dir")
        lock = FolderLock(folder)
        try:
            if not lock.acquire(wait=False):
                logger.info("%s: another process is fetching into %s; waiting for it", name, folder)
                lock.acquire(wait=True)
            if not path.exists():
                base = os.environ.get("CLIP_WEIGHTS_URL", OPENAI_URL).rstrip("/")
                _fetch(name, f"{base}/{digest}/{file}", path, digest)
        finally:
            lock.release()
    elif _sha256(path) != digest:
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
    if _sha256(part) != digest:
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


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
