"""Ctrl-C and SIGTERM end the step, not the work; a process that is gone takes those that it started with it."""

import ctypes
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

RESUMABLE = 75  # exit code after SIGTERM (EX_TEMPFAIL): run again with --resume


class Interrupted(Exception):  # noqa: N818 - not an error
    """The run was asked to stop and can go on from its newest checkpoint.

    Args:
        number: The signal.
        step: Optimizer steps taken.
        folder: The run's folder.
    """

    def __init__(self, number: int, step: int, folder: Path) -> None:
        super().__init__(f"stopped after step {step}; go on with --save-dir {folder} --resume")
        self.number = number
        self.exit_code = 130 if number == signal.SIGINT else RESUMABLE


class StopRequest:
    """Context in which SIGTERM and the first SIGINT only set `requested`; a second SIGINT acts as usual.

    SIGTERM may come several times: a scheduler sends it to every process, and launchers pass on theirs.
    """

    def __init__(self) -> None:
        self.requested = False
        self.signal = signal.SIGTERM  # what a process assumes that is stopped by another's request
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self.signal = signal.Signals(number)
        if number == signal.SIGINT:
            signal.signal(number, self._previous[number])


def die_of_interrupts() -> None:
    """Lets Ctrl-C end this process without a word while its packages load, which takes seconds.

    A process that was started to ignore Ctrl-C goes on ignoring it.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def heed_interrupts() -> None:
    """Ends `die_of_interrupts`: Ctrl-C raises KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def deaf_to_interrupts() -> Iterator[None]:
    """Starts processes that leave Ctrl-C to this one from their first moment on; meanwhile it is not heard here either.

    Only the main thread can do so: in others nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def end_with_parent() -> None:
    """Asks Linux to send this process SIGTERM when its parent is gone, so that a killed one leaves no orphans."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
