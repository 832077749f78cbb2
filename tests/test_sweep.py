"""Sweeps: every run once, interruptions, failures, one table and curves."""

import csv
import json
import re
import signal
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from common.significance import paired_test
from runners import sweep as sweep_module
from runners.runner import Runner
from runners.sweep import Sweep
from tests.commands import ROOT, refused, run, start
from tests.processes import run_processes
from tests.runs import interrupted_at
from utils.distributed import barrier, rank


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two methods, two lengths, two seeds."""
    file = tmp_path / "sweep.yaml"
    file.write_text(
        f"sweep:\n  configs: [{ROOT}/configs/DSPH/coco.yaml, {ROOT}/configs/DCMHT/coco.yaml]\n"
        f"  bits: [16, 32]\n  seeds: [1, 2]\n  save_dir: {tmp_path / 'sweep'}\n"
    )
    return file


def settings(tiny_overrides: list[str]) -> list[str]:
    return [entry for entry in tiny_overrides if not entry.startswith(("model.bits", "run.epochs"))] + ["run.epochs=1"]


def precisions(folder: Path) -> np.ndarray:
    """Average precisions of every query of a run with 32 bits, texts asking for pictures."""
    with np.load(folder / "ap-best.npz", allow_pickle=False) as arrays:
        return np.asarray(arrays["32/t2i/mAP@all"])


def test_a_sweep_survives_interruption_and_writes_one_table(
    sweep: Path, tmp_path: Path, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, entries = tmp_path / "sweep", settings(tiny_overrides)
    assert interrupted_at(2, signal.SIGTERM, "--config-file", sweep, *entries, seed=2)[0] == 75
    assert not (folder / "DSPH-16bits-seed2" / "results.json").exists()
    first = (folder / "DSPH-16bits-seed1" / "results.json").stat().st_mtime_ns
    code, out, err = run("--config-file", sweep, *entries, "--print-config")
    assert code == 0 and "run 1, value by value" in out, err
    listed = [(line.split()[0], Path(line.split()[1]).name, line.split(None, 2)[2]) for line in out.splitlines()[2:10]]
    assert listed[:3] == [("1", "DSPH-16bits-seed1", "done"), ("2", "DSPH-16bits-seed2", "begun"),
                          ("3", "DSPH-32bits-seed1", "not begun")]  # fmt: skip
    assert listed[7] == ("8", "DCMHT-32bits-seed2", "not begun")
    code, out, err = run("--config-file", sweep, *entries)
    assert code == 0, err
    assert "is done" in err and (folder / "DSPH-16bits-seed1" / "results.json").stat().st_mtime_ns == first

    results = {path.parent.name: json.loads(path.read_text()) for path in sorted(folder.glob("*/results.json"))}
    assert len(results) == 8
    values = [results[f"DCMHT-32bits-seed{seed}"]["best"]["reports"]["32"]["t2i/mAP@all"] for seed in (1, 2)]
    centre, spread = sum(values) / 2, abs(values[0] - values[1]) / 2**0.5
    expected = f"{centre:.4f} ± {spread:.4f}"
    table = (folder / "table.md").read_text()
    row = next(line for line in table.splitlines() if line.startswith("| T→I | DCMHT"))
    assert row.split("|")[4].strip(" *~") == expected
    tex = (folder / "table.tex").read_text()
    assert expected.replace("±", r"$\pm$") in tex and r"\toprule" in tex and tex.count(r"\textbf{") == 4 * 2
    with open(folder / "summary.csv", newline="") as file:
        found = next(row for row in csv.DictReader(file) if (row["metric"], row["direction"], row["bits"], row["model"])
                     == ("mAP@all", "t2i", "32", "DCMHT"))  # fmt: skip
    half = 12.7062047 * spread / 2**0.5  # Student's t with one degree of freedom
    assert [float(found[name]) for name in ("mean", "std", "low95", "high95")] == pytest.approx(
        [centre, spread, centre - half, centre + half]
    )
    both = [np.mean([precisions(folder / f"{model}-32bits-seed{seed}") for seed in (1, 2)], axis=0)
            for model in ("DSPH", "DCMHT")]  # fmt: skip
    if float(found["p_against_best"]) < 1:  # the other one is the best
        assert float(found["p_against_best"]) == pytest.approx(paired_test(*both), abs=1e-4)
    assert np.nanmean(precisions(folder / "DCMHT-32bits-seed1")) == pytest.approx(values[0], abs=1e-12)
    assert "8 queries" in table and "mAP@all" in table and "random codes" in out
    with open(folder / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["model"], row["bits"], row["seed"]) for row in rows} == {
        (model, bits, seed) for model in ("DSPH", "DCMHT") for bits in ("16", "32") for seed in ("1", "2")
    }
    found = next(r for r in rows if (r["model"], r["bits"], r["seed"], r["direction"], r["metric"])
                 == ("DCMHT", "32", "1", "t2i", "mAP@all"))  # fmt: skip
    assert float(found["value"]) == values[0]
    pictures = sorted(path.name for path in folder.glob("*.png"))
    assert len(pictures) == 10
    for name in pictures:
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 300

    looks, is_done = iter([False]), sweep_module._is_done
    monkeypatch.setattr(sweep_module, "_is_done", lambda config: next(looks, True) and is_done(config))
    code, out, err = run("--config-file", sweep, *entries, "sweep.summary=false")  # finished since we looked
    assert code == 0 and "another process is working on it" in err, err
    assert (folder / "DSPH-16bits-seed1" / "results.json").stat().st_mtime_ns == first

    assert not [*folder.glob("*/checkpoints/*")]  # nobody goes on from a finished run; and nobody makes it again:
    own = [*entries, "model.bits=16", "run.seed=1", "--resume", f"--save-dir={folder / 'DSPH-16bits-seed1'}"]
    assert "a finished run and no checkpoint" in refused("--config-file", ROOT / "configs/DSPH/coco.yaml", *own)
    (folder / "DSPH-16bits-seed1" / "results.json").write_text("{")
    line = refused("--config-file", sweep, *entries)
    assert "DSPH-16bits-seed1/results.json is missing or damaged" in line and "make the run again" in line
    line = refused("--config-file", sweep, *entries, "evaluate.batch_size=4")
    assert "evaluate.batch_size: 16 there, 4 now" in line


def test_one_failing_run_does_not_stop_the_others(sweep: Path, tmp_path: Path, tiny_overrides: list[str]) -> None:
    entries = [*settings(tiny_overrides), "sweep.bits=[16]", "sweep.seeds=[1]"]
    sweep.write_text(sweep.read_text().replace("DCMHT", "MITH"))
    entries += ["sweep.bits=[4, 16]"]
    assert "model.top_k" in refused("--config-file", sweep, *entries)  # wrong before the first run: nothing is run
    assert not (tmp_path / "sweep").exists()
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "DSPH-16bits-seed1").write_text("a file where a folder should be")
    line = refused("--config-file", sweep, *entries, "sweep.bits=[16]")
    assert "1 of 2 runs failed" in line and "DSPH-16bits-seed1" in line
    assert re.search(r"\| I→T \| MITH \| 0\.\d{4} \|", (tmp_path / "sweep" / "table.md").read_text())


def failed_on_one(file: Path, entries: list[str]) -> str:
    """How a sweep ends whose runs fail on the second process alone, as of a picture that only it reads."""

    def setup(runner: Runner, resume: bool) -> None:
        if rank() == 1:
            raise UserError("7.png is truncated")
        barrier()

    with mock.patch.object(Runner, "setup", setup):
        try:
            Sweep(file, entries).run()
        except (UserError, RuntimeError) as error:
            return str(error)
    return "nothing was noticed"


def test_a_run_that_fails_on_one_process_ends_the_sweep_of_all(sweep: Path, tiny_overrides: list[str]) -> None:
    """The others wait for that process in the middle of the run: no next run can begin."""
    ends = run_processes(failed_on_one, 2, sweep, settings(tiny_overrides))
    assert ends[1] == "7.png is truncated" and "peer" in ends[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sweep:", "sweep: this section must be a mapping of keys to values"),
        ("sweep: {configs: [a.yaml], bits: [16], seeds: [1]}", "sweep.save_dir"),
        ("sweep: {configs: [], bits: [16], seeds: [1], save_dir: x}", "sweep.configs"),
        ("sweep: {configs: [a.yaml], bitz: [16], bits: [16], seeds: [1], save_dir: x}", "did you mean 'bits'"),
        ("sweep: {configs: [nothing.yaml], bits: [16], seeds: [1], save_dir: x}", "nothing.yaml"),
        ("sweep: {configs: [a.yaml], bits: [0], seeds: [1], save_dir: x}", "sweep.bits"),
        ("sweep: {configs: [a.yaml], bits: [16], seeds: [1], save_dir: x, parallel: 0}", "sweep.parallel"),
        ("sweep: {configs: [a.yaml], bits: [16], seeds: [1], save_dir: x, grid: {run.epochs: []}}", "sweep.grid"),
        ("sweep: {configs: [a.yaml], bits: [16], seeds: [1], save_dir: x, split_seeds: []}", "sweep.split_seeds"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(text)
    assert expected in refused("--config-file", file)


def test_a_checkpoint_is_not_evaluated_by_a_sweep(sweep: Path) -> None:
    assert "is a sweep, and --evaluate takes" in refused("--config-file", sweep, "--evaluate", "best.pt")


def test_grid_and_split_seeds_make_runs_and_rows(sweep: Path, tmp_path: Path, tiny_overrides: list[str]) -> None:
    entries = [*settings(tiny_overrides), f"sweep.configs=[{ROOT}/configs/DSPH/coco.yaml]", "sweep.bits=[16]"]
    entries += ["sweep.seeds=[1]", "sweep.split_seeds=[1, 2]", "sweep.grid={optim.main.lr.head: [0.001, 0.0001]}"]
    code, out, err = run("--config-file", sweep, *entries)
    assert code == 0, err
    folder = tmp_path / "sweep"
    found = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("*/results.json")}
    assert sorted(found) == [
        f"DSPH-16bits-seed1-optim.main.lr.head={rate}-split{split}" for rate in ("0.0001", "0.001") for split in (1, 2)
    ]
    assert len({results["split"]["fingerprint"] for results in found.values()}) == 2
    for rate in ("0.001", "0.0001"):
        assert re.search(rf"I→T +DSPH \(optim\.main\.lr\.head={rate}\) +0\.\d{{4}} ± 0\.\d{{4}}", out)
    assert run("--report", folder)[0] == 0
    page = (folder / "report.html").read_text()
    assert "shows runs as they were made" in refused("--report", folder, "run.seed=2")
    for rate in ("0.001", "0.0001"):  # the page has the rows of the table
        assert re.search(
            rf"<td[^>]*>DSPH \(optim\.main\.lr\.head={rate}\)</td><td[^>]*>16</td><td>1; 2 splits</td>", page
        )
    line = refused("--config-file", sweep, *entries, "sweep.grid={run.workers: [0, 1]}")
    assert "sweep.grid names run.workers, which changes no result" in line
    line = refused("--config-file", sweep, *entries, "sweep.grid={optim.main.lr.heat: [1]}")
    assert "optim.main.lr" in line and "heat" in line
    line = refused("--config-file", sweep, *entries, "sweep.grid={run.seed: [5, 6]}")
    assert "sweep.grid names run.seed, which sweep.seeds sets" in line
    assert "two runs of the sweep would lie in" in refused("--config-file", sweep, *entries, "sweep.seeds=[1, 1]")


def test_methods_without_a_query_in_common_are_not_compared(
    sweep: Path, tmp_path: Path, tiny_overrides: list[str]
) -> None:
    """DCMHT's and MITH's settings name different splits of COCO; nothing is said of what was not tested."""
    sweep.write_text(sweep.read_text().replace("DSPH", "MITH"))
    code, out, err = run("--config-file", sweep, *settings(tiny_overrides), "sweep.bits=[16]", "sweep.seeds=[1]")
    assert code == 0, err
    rows = [line for line in out.splitlines() if re.match("I→T|T→I", line)]
    assert sum(row.endswith("*") for row in rows) == 2 and sum(row.endswith("?") for row in rows) == 2, rows
    assert "? not compared: no query in common" in out


def made(folder: Path) -> dict[str, list[int]]:
    """How often each step of each run stands in its log."""
    counts = {}
    for log in folder.glob("*/log.jsonl"):
        steps = [json.loads(line) for line in log.read_text().splitlines()]
        counts[log.parent.name] = [step["step"] for step in steps if step["event"] == "step"]
    return counts


@pytest.mark.slow
def test_two_processes_share_a_sweep_and_both_are_killed(
    sweep: Path, tmp_path: Path, tiny_overrides: list[str]
) -> None:
    """Three methods, three seeds: no run is made twice, and the summary is that of a sweep left alone."""
    methods = ", ".join(str(ROOT / "configs" / method / "coco.yaml") for method in ("DSPH", "DCMHT", "DNcH"))
    entries = [*settings(tiny_overrides), "run.epochs=3", f"sweep.configs=[{methods}]", "sweep.bits=[32]"]
    entries.append("sweep.seeds=[1, 2, 3]")
    both = [start("--config-file", sweep, *entries) for _ in range(2)]
    for process, runs in zip(both, (2, 5), strict=True):
        while len(made(tmp_path / "sweep")) < runs:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.kill()
        process.communicate()
    assert len(list((tmp_path / "sweep").glob("*/results.json"))) < 9
    code, _, err = run("--config-file", sweep, *entries)
    assert code == 0, err
    steps = made(tmp_path / "sweep")
    assert len(steps) == 9 and all(numbers == list(range(1, 16)) for numbers in steps.values())
    alone = tmp_path / "alone"
    code, _, err = run("--config-file", sweep, *entries, f"sweep.save_dir={alone}")
    assert code == 0, err
    for name in ("table.csv", "summary.csv", "table.md"):
        assert (alone / name).read_text() == (tmp_path / "sweep" / name).read_text()


@pytest.mark.slow
def test_runs_at_once(sweep: Path, tmp_path: Path, tiny_overrides: list[str]) -> None:
    code, out, err = run("--config-file", sweep, *settings(tiny_overrides), "sweep.parallel=2", "sweep.bits=[16]")
    assert code == 0, err
    assert len(list((tmp_path / "sweep").glob("*/results.json"))) == 4 and "random codes" in out
    logs = [(tmp_path / "sweep" / f"process-{number}.log").read_text() for number in (1, 2)]
    assert not any("table.md" in log for log in logs) and "table.md" in out  # the summary is written once
    assert all("is done" in log or "another process is working on it" in log for log in logs)
