"""Writing states of a run beside its steps: a file system takes seconds for what a step changes in milliseconds."""

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError

logger = logging.getLogger(__name__)


class StateWriter:
    """Context in which states are copied at once and written by a thread, one after the other in the order of `begin`.

    All copies share the same memory on the CPU, as much as the largest state: a state is copied when the one before it
    is written. The context ends when all is written.
    """

    def __init__(self) -> None:
        self._memory: dict[tuple[Any, ...], Tensor] = {}  # place in a state -> the tensor that its copies take
        self._writing: Future[object] | None = None

    def __enter__(self) -> "StateWriter":
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="state-writer")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except UserError as failure:
            if error is None:
                raise
            logger.error("%s", failure)  # beside what ends the run already
        finally:
            self._thread.shutdown()

    def begin(self, write: Callable[..., object], *states: Mapping[str, Any]) -> None:
        """Copies states, and has the copies written while the caller goes on.

        Args:
            write: Called with the copies.
            *states: Nested dicts and lists of tensors, on any device, and plain values.

        Raises:
            UserError: If the state before could not be written.
        """
        self.wait()
        copies = [self._copied(state, (number,)) for number, state in enumerate(states)]
        self._writing = self._thread.submit(write, *copies)

    def wait(self) -> None:
        """Returns when nothing is left to write.

        Raises:
            UserError: If it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _copied(self, value: Any, place: tuple[Any, ...]) -> Any:
        if isinstance(value, Tensor):
            memory = self._memory.get(place)
            if memory is None or memory.shape != value.shape or memory.dtype != value.dtype:
                memory = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
                self._memory[place] = memory
            return memory.copy_(value)  # waits for a GPU
        if isinstance(value, Mapping):
            return {key: self._copied(item, (*place, key)) for key, item in value.items()}
        if isinstance(value, list):
            return [self._copied(item, (*place, number)) for number, item in enumerate(value)]
        return value
