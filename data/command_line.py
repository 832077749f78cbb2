"""How the scripts of this folder end: with an exit code, and one line that says what went wrong."""

import sys
from collections.abc import Callable

from common.errors import UserError


def exit_code(work: Callable[[], object], place: str) -> int:
    """Does the work of a script.

    Args:
        work: What the script does; the same command may be given again after an interruption.
        place: Where it writes, for errors that name no file.

    Returns:
        0; 2 for a mistake of the user or a fault of the disk; 130 if the user interrupted it.
    """
    try:
        work()
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except OSError as error:
        sys.stderr.write(f"error: {error.filename or place}: {error.strerror or error}; mend it and run again\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; run the same command again\n")
        return 130
    return 0
