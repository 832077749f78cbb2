"""The folder of a run: whose it is, what lies in it, and whether a run may go on from there."""

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter

from common.checkpoint import Checkpoint, Checkpoints, load, require_same
from common.checkpoint_config import with_younger_settings
from common.config import Config
from common.errors import UserError
from common.schemas import FREE_KEYS
from common.yaml_layers import flatten
from dataset.base import PairedDataset
from runners.selection import KEYS, Entry, scores
from utils.distributed import barrier, from_main, is_main, rank
from utils.files import FolderLock, make_folder

logger = logging.getLogger(__name__)


@dataclass
class RunState:
    """Where a run stands; beside model, optimizers and configuration it is all that a run goes on from.

    Attributes:
        step: Optimizer steps taken.
        history: One entry an evaluation: `{"epoch": 3, "reports": {"16": {"i2t/mAP@all": 0.5, ...}}}`, see `selection`.
        untrained: Numbers before the first step, see `diagnostics.report_untrained`.
    """

    step: int = 0
    history: list[Entry] = field(default_factory=list)
    untrained: dict[str, float] = field(default_factory=dict)


_STATE = TypeAdapter(RunState)


class BusyError(UserError):
    """Another process is working on a run."""


class FinishedError(UserError):
    """A run is finished, and there is nothing to go on from."""


def claim_folder(folder: Path, resume: bool) -> FolderLock | None:
    """Makes a folder the own one of this process, or of its group, for one run.

    Args:
        folder: The run's folder, created if need be.
        resume: Whether a run that lies there may be continued. Without it, only a run that has kept nothing yet may
            lie there: it begins anew.

    Returns:
        The lock, held until its release or the process's end; None on other processes than the first.

    Raises:
        BusyError: If the folder is in use, on every process.
        FinishedError: If a finished run without checkpoints lies there, which beginning anew would overwrite; on every
            process.
        UserError: If it cannot be written, holds a run that is not to be continued, or a config.yaml
            that no run wrote.
    """
    lock, held = None, True
    if is_main():
        make_folder(folder, "--save-dir")
        lock = FolderLock(folder)
        held = lock.acquire(wait=False)
    if not from_main(held):
        raise BusyError(f"another process is working in {folder}; wait for it, or choose another --save-dir")
    if (folder / "config.yaml").exists():  # every process looks: a sweep goes on after some of these refusals
        _require_claimable(folder, resume)
    barrier()
    return lock


def _require_claimable(folder: Path, resume: bool) -> None:
    """Refuses a folder whose config.yaml is no run's, or that holds a run that is not to be continued."""
    logged, worked = (folder / "log.jsonl").exists(), _holds_work(folder)
    if not logged and not worked:  # a run writes its log first
        raise UserError(
            f"{folder / 'config.yaml'} was not written by a run, which would replace it; choose another folder with "
            "--save-dir"
        )
    if not resume:
        if not logged or worked:
            state = "a finished run" if (folder / "results.json").exists() else "an unfinished run"
            raise UserError(
                f"{folder} holds {state}: continue it with --resume, or choose another folder with --save-dir"
            )
        logger.info("the run in %s ended before its first checkpoint: beginning anew", folder)
    elif (folder / "results.json").exists() and not any(folder.glob("checkpoints/[!.]*")):
        raise FinishedError(
            f"{folder} holds a finished run and no checkpoint to go on from (a sweep keeps none); evaluate its best.pt "
            "with --evaluate, or choose another folder with --save-dir"
        )


def _holds_work(folder: Path) -> bool:
    """Whether a run's folder holds what beginning anew would lose: results, weights, or anything by checkpoints."""
    kept = ("results.json", "best.pt", "checkpoints/[!.]*")
    return any(any(folder.glob(pattern)) for pattern in kept)


def newest_checkpoint(checkpoints: Checkpoints) -> Checkpoint | None:
    """The newest readable checkpoint as the first process finds it, on every process; None if there is none.

    Raises:
        UserError: If another process cannot read it.
    """
    newest = checkpoints.newest() if is_main() else None
    step = from_main(-1 if newest is None else checkpoints.step_of(newest.path))
    if is_main() or step < 0:
        return newest
    path = checkpoints.path_of(step)
    try:
        return load(path)
    except UserError:
        raise UserError(
            f"{path}, where the first process goes on, cannot be read by process {rank()}; --save-dir must name a "
            "folder that all machines share"
        ) from None


def check_resumable(loaded: Checkpoint, config: Config, dataset: PairedDataset) -> None:
    """Refuses to go on from a checkpoint of other settings or other data, with every differing key.

    Raises:
        UserError: As said.
    """
    if not loaded.is_ours or not loaded.optimizers:
        raise UserError(f"checkpoint {loaded.path} holds no optimizer state, so a run cannot go on from it")
    ours, theirs = flatten(config.tree), flatten(with_younger_settings(loaded.config))
    require_same(
        {key: value for key, value in ours.items() if key not in FREE_KEYS},
        {key: value for key, value in theirs.items() if key not in FREE_KEYS},
        f"checkpoint {loaded.path}",
    )
    split = loaded.meta.get("split")
    if split != dataset.splits.fingerprint:
        raise UserError(
            f"checkpoint {loaded.path} was trained on split {split}, but the files of {config.dataset.name} now give "
            f"{dataset.splits.fingerprint}: restore them, or start a new run"
        )


def state_of(loaded: Checkpoint, steps: int) -> RunState:
    """Where the run of a checkpoint stood.

    Args:
        loaded: The checkpoint.
        steps: Of the whole run.

    Raises:
        UserError: If it does not say so, or says what cannot be.
    """
    try:
        state = _STATE.validate_json(json.dumps(loaded.meta["state"]), strict=True)
        for entry in state.history:
            sum(scores({split: entry[key] for split, key in KEYS.items() if key in entry}).values(), entry["epoch"])
    except (ValueError, LookupError, TypeError, AttributeError, StopIteration):
        state = RunState(step=-1)
    if not 0 <= state.step <= steps:
        raise UserError(
            f"checkpoint {loaded.path} does not say where its run stood (its entry 'state' is damaged): remove it to "
            "go on from an earlier one, or start a new run"
        )
    return state
