"""Progress bars where nobody watches: a log file gets whole lines, and few of them."""

import logging
import time

import pytest

from utils.logging import setup_logging
from utils.progress import progress


@pytest.fixture(autouse=True)
def _same_handlers_afterwards():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_passing_work_leaves_no_line_in_a_log_file(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging()
    for number in progress(range(3), desc="passing", unit="thing", leave=False):
        logging.getLogger("somebody").info("line %d", number)
    assert capsys.readouterr().err == "line 0\nline 1\nline 2\n"


def test_short_work_leaves_its_begin_and_end(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging()
    for number in progress(range(3), desc="short", unit="thing"):
        logging.getLogger("somebody").info("line %d", number)
    first, *lines, last = capsys.readouterr().err.splitlines()
    assert lines == ["line 0", "line 1", "line 2"]
    assert first.startswith("short:   0%") and last.startswith("short: 100%") and "thing/s" in last


def test_long_work_has_lines_of_its_own(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    setup_logging()
    begin = time.time()
    clock = iter(range(1000))
    bar = progress(total=4, desc="long", unit="thing", leave=False)
    monkeypatch.setattr(bar, "_time", lambda: begin + 20 * next(clock))
    for number in range(4):
        bar.update()
        logging.getLogger("somebody").info("line %d", number)
    bar.close()
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("line")] == [f"line {number}" for number in range(4)]
    states = [line for line in lines if line.startswith("long: ")]
    assert len(lines) == 4 + len(states) and len(states) >= 2
    assert all("thing/s" in state or "s/thing" in state for state in states)
