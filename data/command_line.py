"""How the scripts of this folder begin and end: command line, exit code, and one line that says what went wrong."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from common.errors import UserError
from utils.arguments import Parser
from utils.output import BROKEN_PIPE
from utils.signals import heed_interrupts


def run_script(parser: Parser, work: Callable[[argparse.Namespace], object], arguments: Sequence[str] | None) -> int:
    """Reads a script's command line and does its work.

    Args:
        parser: Of its options.
        work: What the script does with them; the same command may be given again after an interruption.
        arguments: Of the command line; None takes those of the process.

    Returns:
        0; 2 for a mistake of the user or a fault of the disk; 130 if the user interrupted it, 141 if nobody reads what
        it prints.
    """
    heed_interrupts()
    try:
        work(parser.parse_intermixed_args(arguments))
    except UserError as error:
        return _told(str(error))
    except BrokenPipeError:
        return BROKEN_PIPE
    except OSError as error:
        return _told(f"{error.filename or parser.prog}: {error.strerror or error}; mend it and run again")
    except MemoryError:
        return _told(
            f"{parser.prog}: memory ran out; free some, or look for a file that is far larger than it should be"
        )
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; run the same command again\n")
        return 130
    return 0


def named_path(text: str) -> Path:
    """A path, for argparse; none that is empty, as where a variable of a shell is not set."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; name a path")
    return Path(text)


def _told(why: str) -> int:
    sys.stderr.write(f"error: {why}\n")
    return 2
