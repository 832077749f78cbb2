"""Checkpoints: written whole or not at all, read without running anything, refused when they do not fit."""

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from common.tensor_files import read_tensors
from utils.files import atomic

FORMAT = "cross-modal-hashing/1"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds.

    Attributes:
        meta: Plain JSON values: the resolved configuration and where the run stood; empty for another program's file.
        model: State dict of the model, or of whatever model another program saved.
        optimizers: Optimizer name -> its state dict; empty in a file that only serves evaluation.
        path: The file.
    """

    meta: dict[str, Any]
    model: dict[str, Tensor]
    optimizers: dict[str, dict[str, Any]] = field(default_factory=dict)
    path: Path = Path()

    @property
    def is_ours(self) -> bool:
        """Whether this library wrote the file."""
        return bool(self.meta)

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration of the run.

        Raises:
            UserError: If the file, which this library wrote, does not hold it.
        """
        if "config" not in self.meta:
            raise UserError(f"checkpoint {self.path} does not hold the configuration of its run; use another")
        config: dict[str, Any] = self.meta["config"]
        return config


def save(
    path: Path,
    meta: Mapping[str, Any],
    model: Mapping[str, Tensor],
    optimizers: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Writes a checkpoint atomically.

    Args:
        path: The file; its folder exists.
        meta: JSON values.
        model: The model's state dict.
        optimizers: Optimizer name -> state dict, for a checkpoint that a run can go on from.

    Raises:
        UserError: If it cannot be written.
    """
    content = {
        "format": FORMAT,
        "meta": json.dumps(meta),
        "model": dict(model),
        "optimizers": {name: dict(state) for name, state in (optimizers or {}).items()},
    }
    with atomic(path) as temporary:
        temporary.touch()  # says why it cannot be, which torch's writer does not
        try:
            torch.save(content, temporary)
        except RuntimeError:  # torch's writer reports a full disk this way, in words of its own
            free = shutil.disk_usage(path.parent).free / 1e6
            raise UserError(
                f"checkpoint {path} cannot be written: {free:,.0f} MB are free in {path.parent}; free some room, or go "
                "on with another --save-dir"
            ) from None


def load(path: Path) -> Checkpoint:
    """Reads a checkpoint of this library, or the tensors of another program's, onto the CPU.

    Nested dicts of tensors of another program are flattened with dots (`{"hash": {"w": t}}` -> `hash.w`).

    Raises:
        UserError: If the file is missing, damaged, holds anything but tensors and plain values, or no tensors at all.
    """
    if not path.exists():
        raise UserError(f"checkpoint {path} is not there; name a .pt or .pth file")
    try:
        read = read_tensors(path)
    except UserError as error:
        raise UserError(f"checkpoint {path}: {error}") from None
    if isinstance(read.content, Mapping) and read.content.get("format") == FORMAT:
        return _ours(read.content, path)
    if not read.tensors:
        raise UserError(f"checkpoint {path} holds no tensors by name; it must be a state dict")
    return Checkpoint({}, read.tensors, path=path)


def _ours(content: Mapping[str, Any], path: Path) -> Checkpoint:
    try:
        meta, model, optimizers = json.loads(content["meta"]), dict(content["model"]), dict(content["optimizers"])
        named = all(isinstance(name, str) and isinstance(value, Tensor) for name, value in model.items())
        whole = isinstance(meta, dict) and named
        whole = whole and isinstance(meta.get("config", {}), dict)
    except (KeyError, ValueError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise UserError(f"checkpoint {path} was not written whole by this library; use an earlier one")
    return Checkpoint(meta, model, optimizers, path)


class Checkpoints:
    """The resumable checkpoints of a run: `step-00000120.pt`, ..., the newest `keep` of them.

    Args:
        folder: Where they lie; created at the first save, in a folder that exists.
        keep: How many are kept.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def paths(self) -> list[Path]:
        """The files, oldest first."""
        return sorted(path for path in self.folder.glob("step-*.pt") if path.stem.removeprefix("step-").isdecimal())

    def path_of(self, step: int) -> Path:
        """The file with the state after `step` steps."""
        return self.folder / f"step-{step:08d}.pt"

    def step_of(self, path: Path) -> int:
        """Steps taken at a file of `paths`."""
        return int(path.stem.removeprefix("step-"))

    def save(
        self,
        step: int,
        meta: Mapping[str, Any],
        model: Mapping[str, Tensor],
        optimizers: Mapping[str, Mapping[str, Any]],
    ) -> Path:
        """Writes the state after `step` steps; removes those beyond the newest `keep`, and of later steps.

        A file of a later step is a damaged one that `newest` passed over; it must not count among those kept.

        Raises:
            UserError: If it cannot be written. A run's folder that is gone is not made again: half of the run would lie
                in each of two.
        """
        path = self.path_of(step)
        try:
            self.folder.mkdir(exist_ok=True)
            for part in self.folder.glob(".step-*.part"):  # of a process killed while writing
                part.unlink()
            save(path, meta, model, optimizers)
            kept = [other for other in self.paths() if other <= path][-self.keep :]
            for other in set(self.paths()) - set(kept):
                other.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"checkpoints cannot be written to {self.folder}: {error.strerror or error}; put the folder in order "
                "and go on with --resume, or begin anew with another --save-dir"
            ) from None
        return path

    def remove(self) -> None:
        """Removes all of them, which only who holds the run's folder may do."""
        for path in self.paths():
            path.unlink(missing_ok=True)

    def newest(self) -> Checkpoint | None:
        """The newest readable checkpoint, None without files; damaged newer ones are passed over with a warning.

        Raises:
            UserError: If there are files, but all of them are damaged: beginning anew would overwrite what is left.
        """
        paths = self.paths()
        for path in reversed(paths):
            try:
                return load(path)
            except UserError as error:
                if path == paths[0]:
                    raise UserError(
                        f"{error}; it is the last of {len(paths)} in {self.folder}, so the run cannot go on: restore "
                        "one, or remove the folder of the run to begin anew"
                    ) from None
                logger.warning("%s; going back to the one before", error)
        return None


def require_same(ours: Mapping[str, Any], theirs: Mapping[str, Any], place: str) -> None:
    """Refuses to go on from a checkpoint whose configuration differs, with every differing key.

    Args:
        ours: Dotted key -> value of the present configuration.
        theirs: Dotted key -> value of the checkpoint's.
        place: The checkpoint, for the message.

    Raises:
        UserError: If any key differs.
    """
    absent = "(absent)"
    differing = [
        f"{key}: {theirs.get(key, absent)!r} there, {ours.get(key, absent)!r} now"
        for key in sorted({*ours, *theirs})
        if ours.get(key, absent) != theirs.get(key, absent)
    ]
    if differing:
        raise UserError(
            f"{place} was written under another configuration ({'; '.join(differing)}); "
            "give these keys the same values, or start a new run with another --save-dir"
        )
