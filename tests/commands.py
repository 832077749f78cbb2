"""Runs `main.py` as a user does: in this process where that is enough, in one of its own to stop or kill it."""

import contextlib
import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import main

ROOT = Path(__file__).parent.parent
MAIN = [sys.executable, str(ROOT / "main.py")]


def start(*arguments: str | Path, command: list[str] = MAIN) -> "subprocess.Popen[str]":
    """Starts the command line in a process of its own, with one thread so that sums have one order."""
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    """Waits for a process: exit code, stdout, stderr."""
    out, err = process.communicate(timeout=280)
    return process.returncode, out, err


def run(*arguments: str | Path) -> tuple[int, str, str]:
    """Runs the command line in this process, from the root of the tree: exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    handlers, level = logging.getLogger().handlers[:], logging.getLogger().level
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.chdir(ROOT):
            code = main.main([str(argument) for argument in arguments])
    finally:
        logging.getLogger().handlers[:] = handlers
        logging.getLogger().setLevel(level)
    return code, out.getvalue(), err.getvalue()


def refused(*arguments: str | Path) -> str:
    """Runs a command line that must be refused as a user's mistake; returns the one line that says why."""
    code, out, err = run(*arguments)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2, (code, out, err)
    assert "Traceback" not in err + out
    assert len(lines) == 1, err
    return lines[0]
