"""Runs a function in processes of its own that have the packages loaded already: importing them costs seconds."""

import gc
import multiprocessing
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tqdm.auto import tqdm

multiprocessing.set_forkserver_preload(["tests.preloaded"])


class Forked(multiprocessing.context.ForkServerProcess):
    """A process that calls a function, and that a test may kill; asked how it is as a `subprocess.Popen` is.

    Args:
        function: A function at the top level of a module.
        arguments: What can be pickled.
    """

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        super().__init__(target=_call, args=(function, arguments))
        self.start()

    def poll(self) -> int | None:
        return self.exitcode

    def communicate(self, timeout: float | None = None) -> str:
        self.join(timeout)
        return f"exit code {self.exitcode}"


def _call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    function(*arguments)


def run_processes(function: Callable[..., Any], count: int, *arguments: Any) -> list[Any]:
    """Calls `function(*arguments)` in `count` fresh processes that form one gloo group.

    Args:
        function: A function at the top level of a module.
        count: Number of processes.
        arguments: What can be pickled.

    Returns:
        What each process returned (tensors and plain values), by rank.

    Raises:
        ProcessRaisedException: With the traceback of the first process that failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        start = mp.start_processes  # public, but not exported
        start(_run, (count, folder, function, arguments), nprocs=count, start_method="forkserver")
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(count)]


def _run(rank: int, count: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=count)
    try:
        torch.save(function(*arguments), Path(folder) / f"{rank}.pt")
    finally:
        if dist.is_initialized():  # a whole run leaves its group itself
            dist.destroy_process_group()


def in_child(work: Callable[[], object]) -> int:
    """Runs something in a forked process with silent output, and returns its number at once.

    For work that a test kills at any moment, many times: a fork costs milliseconds.
    """
    gc.collect()
    child = os.fork()
    if child:
        return child
    gc.disable()  # loaders of other tests share locks with their workers: a child killed while ending them keeps one
    code = 1
    try:
        tqdm.set_lock(threading.RLock())  # the library's bars share theirs with this process: it would die locked
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        work()
        code = 0
    finally:
        os._exit(code)
