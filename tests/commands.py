"""Runs `main.py` as a user does."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
MAIN = [sys.executable, str(ROOT / "main.py")]


def environment() -> dict[str, str]:
    """One thread, so that processes do not fight for cores and sums have one order."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def start(*arguments: str | Path, command: list[str] = MAIN) -> "subprocess.Popen[str]":
    """Starts the command line; its output is read later."""
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*arguments: str | Path, command: list[str] = MAIN) -> tuple[int, str, str]:
    """Runs the command line to its end: exit code, stdout, stderr."""
    process = start(*arguments, command=command)
    out, err = process.communicate(timeout=280)
    return process.returncode, out, err


def refused(*arguments: str | Path) -> str:
    """Runs a command line that must be refused as a user's mistake; returns the one line that says why."""
    code, out, err = run(*arguments)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2, (code, out, err)
    assert "Traceback" not in err + out
    assert len(lines) == 1, err
    return lines[0]
