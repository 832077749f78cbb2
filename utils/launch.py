"""Processes: which devices a run uses, starting one process per device, joining the others, failing together."""

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from common.errors import UserError
from utils.distributed import local_rank
from utils.signals import end_with_parent

_PROCESSES_A_CORE = 4  # more only wait for each other
_GRACE = 5.0  # seconds that processes have to end by themselves once one has failed
_FAILED = "failed"  # the store's key for the rank that failed first
_store: Any = None  # the group's key-value store, shared by all processes


def devices(name: str) -> list[torch.device]:
    """The devices that `run.device` names, one a process.

    Args:
        name: `auto`, `cpu`, `cpu:2` (two processes on the CPU), `cuda` (all GPUs), or GPU numbers such as `0,1`.

    Raises:
        UserError: If a device is not there or named twice.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and count == 0):
        return [torch.device("cpu")]
    if name.startswith("cpu:"):
        asked, cores = int(name.removeprefix("cpu:")), len(os.sched_getaffinity(0))
        if asked > _PROCESSES_A_CORE * cores:
            raise UserError(
                f"device {name}: {asked} processes on {cores} cores; at most {_PROCESSES_A_CORE} a core are started: "
                f"cpu:{_PROCESSES_A_CORE * cores}"
            )
        return [torch.device("cpu")] * asked
    numbers = list(range(count)) if name in ("auto", "cuda") else [int(number) for number in name.split(",")]
    twice = sorted({number for number in numbers if numbers.count(number) > 1})
    if twice:
        raise UserError(f"device {name}: GPU {twice[0]} is named twice; name each GPU once")
    absent = [number for number in numbers if number >= count]
    if absent or not numbers:
        there = f"has the GPUs 0 to {count - 1}" if count else "has no GPU that this PyTorch can use"
        missing = f"GPU {absent[0]}" if absent else "cuda"
        raise UserError(f"device {name}: {missing} is not there, this machine {there}; use --device cpu or auto")
    return [torch.device("cuda", number) for number in numbers]


def pick_device(name: str, distribute: bool) -> torch.device:
    """The device of this process; float32 is float32 on a GPU, too.

    Raises:
        UserError: If it is not there, or `name` lists several and the run is not distributed.
    """
    found = devices(name)
    torch.backends.cudnn.allow_tf32 = False  # torch's default rounds a convolution's float32 to 10 bits of mantissa
    if in_group():
        if found[0].type == "cpu":
            return found[0]
        if local_rank() >= len(found):
            raise UserError(
                f"device {name} names {len(found)} GPUs, but {local_rank() + 1} processes run on this machine"
            )
        return found[local_rank()]
    if len(found) > 1 and name not in ("auto", "cuda") and not distribute:
        raise UserError(f"device {name} names several devices; add --distribute for a process on each, or name one")
    return found[0]


def count_processes(name: str) -> int:
    """Processes that `--distribute` starts: one per device.

    Raises:
        UserError: If there is only one.
    """
    count = len(devices(name))
    if count == 1:
        raise UserError(f"--distribute needs several devices, but {name} is one; e.g. --device 0,1 or cpu:2")
    return count


def in_group() -> bool:
    """Whether a launcher (ours, torchrun, Slurm) started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def restarted() -> bool:
    """Whether torchrun started this process anew after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def meet() -> None:
    """Connects to the key-value store of the group that the launcher's environment describes, if there is a launcher.

    Done before anything that can fail, so that of several processes the first to fail can say so, once.

    Raises:
        UserError: If the group's address is in use or nobody answers there.
    """
    global _store
    if not in_group():
        return
    end_with_parent()
    try:
        store, _, _ = next(rendezvous("env://", timeout=timedelta(minutes=5)))
    except (RuntimeError, ValueError, OSError) as error:
        raise _cannot_meet(error) from None
    _store = _of_this_attempt(store)


def join(device_name: str) -> None:
    """Joins the process group, after `meet`.

    Args:
        device_name: `run.device`.

    Raises:
        UserError: If the processes cannot connect to each other, or have fewer devices than there are processes.
    """
    device = pick_device(device_name, distribute=True)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=PrefixStore("group", _store),
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            timeout=timedelta(minutes=30),
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise _cannot_meet(error) from None


def _cannot_meet(error: Exception) -> UserError:
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    return UserError(
        f"processes cannot meet at {address} ({' '.join(str(error).split())[:160]}); "
        "give all of them the same free MASTER_ADDR and MASTER_PORT"
    )


def _of_this_attempt(store: Any) -> Any:
    """The part of a store that processes of an earlier attempt, which torchrun has ended, have not written to."""
    return PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def leave() -> None:
    """Leaves the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def first_to_fail() -> bool:
    """Whether no other process of the group has failed before: only the first one's error is worth reading."""
    if _store is None:
        return os.environ.get("RANK", "0") == "0"
    me = os.environ["RANK"]
    try:
        return bool(_store.compare_set(_FAILED, "", me).decode() == me)
    except (RuntimeError, ValueError):  # the store's process is gone, so it failed before
        return False


def lost_peer(error: Exception) -> bool:
    """Whether an error says no more than that another process of the group is gone."""
    return _store is not None and (isinstance(error, dist.DistError) or "/gloo/" in str(error))


def launch(count: int) -> int:
    """Starts `count` copies of this command as one process group on this machine and waits for them.

    Signals are passed on. When one process fails, the others are ended within seconds.

    Args:
        count: Number of processes.

    Returns:
        The exit code of the process that failed first, 128 + n after signal n; 0 if none did.
    """
    # The store lives here, as torchrun's does in its agent: it outlives every process, and its port is surely free.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    group = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "WORLD_SIZE": str(count),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count))),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, *sys.argv],
            env={**os.environ, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            start_new_session=True,  # Ctrl-C reaches them once, through this process
            preexec_fn=end_with_parent,
        )
        for rank in range(count)
    ]
    passed_on: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        passed_on.append(number)
        for process in processes:
            process.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)
    while not any(process.poll() for process in processes):
        if all(process.returncode == 0 for process in processes):
            return 0
        time.sleep(0.1)
    failed = next(rank for rank, process in enumerate(processes) if process.returncode)
    _end(processes)
    told = _of_this_attempt(store)
    said = told.check([_FAILED])
    code = processes[failed].returncode
    if said and (code > 0 or -code in passed_on):  # a process killed by others tells nobody, but it was the first
        code = processes[int(told.get(_FAILED))].returncode
    if not said and -code not in passed_on:
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        sys.stderr.write(
            f"error: process {failed} of {count} was {how}; go on from the newest checkpoint with --resume\n"
        )
    return code if code > 0 else 128 - code


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    """Waits for processes that have no reason to go on, and kills those that do not end by themselves."""
    deadline = time.monotonic() + _GRACE
    while any(process.poll() is None for process in processes):
        if time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(0.1)
