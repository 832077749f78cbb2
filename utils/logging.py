"""What a run says while it works: log lines, the JSON-lines record and TensorBoard."""

import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from common.errors import UserError
from utils.distributed import is_main
from utils.files import write_text


class _PastBars(logging.Handler):
    """Writes log lines to stderr without breaking a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def setup_logging() -> None:
    """Sends log lines to stderr past progress bars; processes other than the first stay silent below warnings."""
    handler = _PastBars()
    handler.setFormatter(logging.Formatter("%(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO if is_main() else logging.WARNING)
    logging.getLogger("faiss").setLevel(logging.WARNING)  # says which of its builds it loads


class Record:
    """The run's JSON-lines file, one object an event, and TensorBoard scalars when that package is installed.

    Args:
        folder: The run's folder; `log.jsonl` and TensorBoard's events go there.
        upto: Steps taken at the checkpoint that the run goes on from. Of an earlier part of the run, lines of later
            steps and of evaluations after it are dropped: both come again. At 0 that is all of it, TensorBoard's
            files included.

    Raises:
        UserError: If it cannot be written.
    """

    def __init__(self, folder: Path, upto: int) -> None:
        self._path = folder / "log.jsonl"
        with self._writing():
            self._begin(folder, upto)

    def _begin(self, folder: Path, upto: int) -> None:
        if upto == 0:
            for events in (folder / "tensorboard").glob("events.out.tfevents.*"):
                events.unlink()
        if self._path.exists():  # at 0, what was measured before the first step comes again, too
            kept = (line for line in self._lines() if upto and _is_before(line, upto))
            write_text(self._path, "".join(f"{line}\n" for line in kept))
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 - open for the whole run
        self._board: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=upto + 1)

    def write(self, event: str, step: int, values: Mapping[str, Any]) -> None:
        """Appends one event; its numbers also go to TensorBoard as `event/name`.

        Raises:
            UserError: If it cannot be written.
        """
        with self._writing():
            self._file.write(json.dumps({"event": event, "step": step, **values}, allow_nan=False) + "\n")
            self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, float):
                    self._board.add_scalar(f"{event}/{name}", value, step)

    def close(self) -> None:
        """Ends the record."""
        with self._writing():
            self._file.close()
        if self._board is not None:
            self._board.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Names the file where it cannot be written."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self._path} cannot be written: {error.strerror or error}; free some room, and go on with --resume"
            ) from None

    def _lines(self) -> list[str]:
        """Whole lines; a process killed while writing leaves a part of one at the end."""
        lines = self._path.read_text(encoding="utf-8", errors="replace").split("\n")
        return [line for line in lines[:-1] if line]


def _is_before(line: str, upto: int) -> bool:
    """Whether an event precedes the checkpoint after `upto` steps; an evaluation follows the checkpoint of its step.

    A line that is no event, as a power cut may leave one, does not: the record must not keep a run from going on.
    """
    try:
        event = json.loads(line)
        step, kind = event["step"], event["event"]
        known: bool = step < upto or (step == upto and kind != "evaluation")
    except (ValueError, TypeError, LookupError):
        return False
    return known
