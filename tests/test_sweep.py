"""Sweeps: every run once, interruptions, failures, one table and curves."""

import csv
import json
import re
import signal
from pathlib import Path

import pytest
from PIL import Image

from tests.commands import ROOT, refused, run
from tests.test_runner import interrupted_at


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


def test_a_sweep_survives_interruption_and_writes_one_table(
    sweep: Path, tmp_path: Path, tiny_overrides: list[str]
) -> None:
    folder, entries = tmp_path / "sweep", settings(tiny_overrides)
    assert interrupted_at(2, signal.SIGTERM, "--config-file", sweep, *entries, seed=2)[0] == 75
    assert not (folder / "DSPH-16bits-seed2" / "results.json").exists()
    first = (folder / "DSPH-16bits-seed1" / "results.json").stat().st_mtime_ns
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
    assert row.split("|")[4].strip() == expected
    assert expected.replace("±", r"$\pm$") in (folder / "table.tex").read_text()
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


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sweep: {configs: [a.yaml], bits: [16], seeds: [1]}", "sweep.save_dir"),
        ("sweep: {configs: [], bits: [16], seeds: [1], save_dir: x}", "sweep.configs"),
        ("sweep: {configs: [a.yaml], bitz: [16], bits: [16], seeds: [1], save_dir: x}", "did you mean 'bits'"),
        ("sweep: {configs: [nothing.yaml], bits: [16], seeds: [1], save_dir: x}", "nothing.yaml"),
        ("sweep: {configs: [a.yaml], bits: [0], seeds: [1], save_dir: x}", "sweep.bits"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(text)
    assert expected in refused("--config-file", file)
