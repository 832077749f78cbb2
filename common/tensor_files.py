"""Named tensors out of files of every common form, without running anything that is in them.

A weight file is a program in two of its forms: a TorchScript archive holds code, and a pickle may call anything. Here
an archive's pickle is read by an unpickler that knows how to rebuild tensors and nothing else, other pickles by torch's
own restricted one, and safetensors hold only numbers. What a file declares is compared with its size before it is read,
so that a small file cannot fill the memory.
"""

import hashlib
import pickle
import re
import stat
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from common.errors import UserError

Tensors = dict[str, Tensor]

EXPANSION = 16  # declared bytes a byte of the file: torch.save does not compress, and programs beside weights are small
_ALLOWANCE = 1 << 20  # bytes that any file may declare
_MOST_NAMES = 1_000_000  # values of a file; those that stand in several places count each time
_DEEPEST = 64  # mappings inside each other
_LONGEST = 500  # characters of a tensor's name

CHECKSUM = "checksum"  # key of a safetensors file's metadata: `checksum` of its tensors, verified when it is read

# What training scripts and torch put around a model, and so before its names: `state_dict.module.`, ...
WRAPPERS = frozenset({"state_dict", "model_state_dict", "model", "net", "network", "module", "_orig_mod"})


@dataclass(frozen=True)
class TensorFile:
    """What a file holds.

    Attributes:
        tensors: By name; names of nested mappings are joined with dots.
        form: `state dict`, `TorchScript archive` or `safetensors`.
        metadata: Words beside the tensors, of safetensors.
        content: What torch.save wrote, as it is; None for the other forms.
    """

    tensors: Tensors
    form: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    content: Any = None


def read_tensors(path: Path) -> TensorFile:
    """Reads a file onto the CPU.

    Raises:
        UserError: Without the path, which the caller knows best: if the file is missing, no regular file, damaged,
            declares far more than it holds, asks for code to be run, or has names that no message can show.
    """
    file = _read(path)
    for name in file.tensors:  # messages show names, and a terminal obeys what is not printable
        if len(name) > _LONGEST or not name.isprintable():
            raise UserError(
                f"a tensor is called {name[:40]!r}, {len(name):,} characters in all; names are printable and have at "
                f"most {_LONGEST}"
            )
    return file


def _read(path: Path) -> TensorFile:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
            raise UserError("no regular file; name a weight file")
        with open(path, "rb") as file:
            start = file.read(9)
        if start.startswith(b"PK"):
            with zipfile.ZipFile(path) as archive:
                _require_honest(archive, status.st_size)
                if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                    return TensorFile(_ArchiveReader(archive, status.st_size).read(), "TorchScript archive")
                damaged = archive.testzip()
            if damaged is not None:
                raise UserError(f"damaged (entry {damaged} fails its checksum); fetch it anew, or use an earlier one")
            return _read_pickle(path, status.st_size)
        if start.startswith(b"\x80"):
            return _read_pickle(path, status.st_size)
        if start[8:] == b"{" or path.suffix == ".safetensors":
            with safetensors.safe_open(path, framework="pt") as opened:  # refuses sizes that the file does not have
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
                metadata = opened.metadata() or {}
            if CHECKSUM in metadata and metadata[CHECKSUM] != checksum(tensors):
                raise UserError("damaged: its tensors are not those that were written (the checksum differs)")
            return TensorFile(tensors, "safetensors", metadata)
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror or error}); name a weight file") from None
    except (zipfile.BadZipFile, safetensors.SafetensorError, NotImplementedError) as error:
        raise UserError(f"truncated or damaged ({error}); fetch it anew") from None
    raise UserError("not a weight file (TorchScript archive, state dict of torch.save, or safetensors)")


def unwrapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensors]:
    """The models that a file may hold, under the names that they have without wrappers.

    Args:
        tensors: Tensors of a file, by name.

    Returns:
        Prefix -> the tensors under it, for every prefix that consists of words of `WRAPPERS`, the shortest first; the
        first is the empty one. What torch.compile and data parallelism write inside of names is left out everywhere.
    """
    prefixes = {""}
    for name in tensors:
        words = name.split(".")
        for count, word in enumerate(words[:-1], start=1):
            if word not in WRAPPERS:
                break
            prefixes.add(".".join(words[:count]) + ".")
    return {
        prefix: {
            re.sub(r"(?<=\.)(?:_orig_mod|module)\.", "", name.removeprefix(prefix)): value
            for name, value in tensors.items()
            if name.startswith(prefix)
        }
        for prefix in sorted(prefixes, key=lambda prefix: (prefix.count("."), prefix))
    }


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and values of tensors on the CPU, whatever their order."""
    state = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().contiguous()
        state.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        state.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def require_finite(tensors: Mapping[str, Tensor], place: str) -> None:
    """Refuses tensors with NaN, infinity, or what is infinity in float32, in which models compute.

    Args:
        tensors: By name, any shapes.
        place: The file, for the message.

    Raises:
        UserError: With the first that has one.
    """
    for name, value in tensors.items():
        if not value.is_floating_point():
            continue
        finite = value.float().isfinite()
        if not bool(finite.all()):
            raise UserError(
                f"{place}: {name} holds {int((~finite).sum())} values that are not finite as float32 (NaN, infinity), "
                "so its codes would mean nothing; use an earlier checkpoint, or fetch the file anew"
            )


def _require_honest(archive: zipfile.ZipFile, size: int) -> None:
    declared = sum(entry.file_size for entry in archive.infolist())
    if declared > EXPANSION * size + _ALLOWANCE:
        raise UserError(
            f"declares {declared / 1e6:,.0f} MB in a file of {size / 1e6:,.1f} MB, more than {EXPANSION} times its "
            "size, which may be an attack on memory; save it with torch.save"
        )


def _require_plain(tensors: Mapping[str, Tensor], size: int) -> None:
    """Refuses tensors that claim more than a file of `size` bytes holds, or that are no plain numbers in memory."""
    total = 0
    for name, value in tensors.items():
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized or value.is_nested:
            raise UserError(f"{name} is no plain tensor (sparse, quantised, nested, without values); save dense ones")
        total += value.numel() * value.element_size()
        if total > EXPANSION * size + _ALLOWANCE:
            raise UserError(
                f"{name} of shape {list(value.shape)} claims more values than the file of {size / 1e6:,.1f} MB holds; "
                "that may be an attack on memory"
            )


def _read_pickle(path: Path, size: int) -> TensorFile:
    """What torch.save wrote: a state dict, or one inside of other plain values."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL ([\w.]+)|class ([\w.]+)", str(error))
        if asked is None:
            raise UserError("truncated or damaged, or a pickle that torch.save did not write; fetch it anew") from None
        raise UserError(_refused(asked[1] or asked[2])) from None
    except Exception as error:  # bytes of a damaged pickle lead to any exception at all
        why = (str(error).splitlines() or [""])[0][:200] or type(error).__name__
        raise UserError(f"truncated or damaged ({why}); fetch it anew") from None
    if not isinstance(content, Mapping):
        raise UserError(f"holds a {type(content).__name__}, not a state dict; save model.state_dict()")
    tensors = _flattened(content)
    _require_plain(tensors, size)
    return TensorFile(tensors, "state dict", content=content)


def _flattened(content: Mapping[Any, Any]) -> Tensors:
    """The tensors of nested mappings, names joined with dots, in order."""
    tensors: Tensors = {}
    visited = 0

    def visit(tree: Mapping[Any, Any], prefix: str, depth: int) -> None:
        nonlocal visited
        for key, value in tree.items():
            visited += 1  # counted, since one mapping may stand in two places, and those in two more, ...
            if visited > _MOST_NAMES or depth > _DEEPEST:
                raise UserError("holds more values, or deeper ones, than a model has; save model.state_dict()")
            if isinstance(value, Tensor):
                tensors[f"{prefix}{key}"] = value
            elif isinstance(value, Mapping):
                visit(value, f"{prefix}{key}.", depth + 1)

    visit(content, "", 1)
    return tensors


def _refused(name: str) -> str:
    return f"refused: its pickle asks for {name}, which is code and not weights; save model.state_dict() or safetensors"


class _Node:
    """Stands for an object of a TorchScript program: keeps its attributes, has no behaviour."""

    attributes: Mapping[str, Any] = {}

    def __setstate__(self, attributes: Mapping[str, Any]) -> None:
        self.attributes = attributes


class _ArchiveReader(pickle.Unpickler):
    """Reads the attributes of a TorchScript archive: admits the rebuilding of tensors, and nothing else."""

    def __init__(self, archive: zipfile.ZipFile, size: int) -> None:
        names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if not names:
            raise UserError("a TorchScript archive without its data; fetch it anew")
        super().__init__(archive.open(names[0]))
        self._archive = archive
        self._size = size
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
                if len(named) + len(nodes) > _MOST_NAMES or prefix.count(".") > _DEEPEST:
                    raise UserError("names more parts than a model has; that may be an attack on memory")
            _require_plain(named, self._size)
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
