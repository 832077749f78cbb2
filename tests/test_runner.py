"""The loop through the command line: training, results, resuming to the last bit, stopping, several processes."""

import json
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import yaml

from common.checkpoint import Checkpoints, load
from common.config import load_config
from common.registry import MODELS
from tests.commands import ROOT, finish, refused, run, start
from tests.processes import Forked
from tests.runs import (
    arguments,
    assert_same_state,
    config,
    fails_at,
    final_state,
    interrupted_at,
    losses,
    names_in,
    wait_for_step,
)
from tests.tiny_models import small_settings

METHODS = [name for name in MODELS.names() if name != "CLIP"]  # CLIP's own codes have their own test below


def test_a_run_without_a_checkpoint_begins_anew(tmp_path: Path, tiny_overrides: list[str]) -> None:
    """What the dead attempt logged is gone; files of the user stay."""
    command = arguments("DSPH", tmp_path, [*tiny_overrides, "run.epochs=1"])
    code, _, err = fails_at(3, *command)
    assert code == 1 and "ZeroDivisionError" in err and len(losses(tmp_path)) == 3
    half, notes = tmp_path / "checkpoints" / ".step-00000004.pt.part", tmp_path / "tensorboard" / "notes.txt"
    events = tmp_path / "tensorboard" / "events.out.tfevents.1.host"
    for file in (half, notes, events):
        file.parent.mkdir(exist_ok=True)
        file.write_text("as it was")
    code, _, err = run(*command)
    assert code == 0 and f"the run in {tmp_path} ended before its first checkpoint: beginning anew" in err, err
    assert len(losses(tmp_path)) == 5
    assert not half.exists() and not events.exists() and notes.read_text() == "as it was"


@pytest.mark.parametrize("kept", ["best.pt", "results.json", "checkpoints/step-00000004.pt", "checkpoints/mine"])
def test_a_run_that_kept_something_is_not_begun_anew(kept: str, tmp_path: Path, tiny_overrides: list[str]) -> None:
    for name in ("config.yaml", "log.jsonl", kept):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("as it was")
    line = refused(*arguments("DSPH", tmp_path, tiny_overrides))
    assert "finished run: continue it with --resume" in line
    assert all((tmp_path / name).read_text() == "as it was" for name in ("config.yaml", "log.jsonl", kept))


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_a_config_that_no_run_wrote_is_not_overwritten(
    resume: list[str], tmp_path: Path, tiny_overrides: list[str]
) -> None:
    """As in a folder of `configs/`, which is named with --config-file, too."""
    (tmp_path / "config.yaml").write_text(config("DSPH").read_text().replace("../", f"{ROOT}/configs/"))
    before = (tmp_path / "config.yaml").read_text()
    file = ["--config-file", str(tmp_path / "config.yaml")]
    line = refused(*file, "--save-dir", tmp_path, *small_settings("DSPH"), *tiny_overrides, *resume)
    assert f"{tmp_path}/config.yaml was not written by a run" in line and "choose another folder" in line
    assert (tmp_path / "config.yaml").read_text() == before


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_resumes_and_evaluates(method: str, tmp_path: Path, tiny_overrides: list[str]) -> None:
    """One whole run; the same run stopped in mid-epoch and resumed; the best checkpoint evaluated: all the same."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    code, out, err = run(*arguments(method, whole, tiny_overrides))
    assert code == 0, err
    results = json.loads((whole / "results.json").read_text())
    best = results["best"]["reports"][str(results["bits"])]
    for direction in ("i2t", "t2i", "i2i", "t2t"):
        assert 0 < best[f"{direction}/mAP@all"] <= 1
        assert f"{best[f'{direction}/mAP@all']:.4f}" in out
    assert "random codes" in out and "results.json" in out
    assert len(losses(whole)) == 10

    assert interrupted_at(7, signal.SIGTERM, *arguments(method, parts, tiny_overrides))[0] == 75
    code, out, err = run(*arguments(method, parts, tiny_overrides, "--resume"))
    assert code == 0 and "going on after step 7 of 10" in err, err
    assert_same_state(final_state(whole), final_state(parts))
    assert losses(whole) == losses(parts)
    again = json.loads((parts / "results.json").read_text())
    assert {**again} == {**results}

    code, out, err = run("--evaluate", str(whole / "best.pt"), "--save-dir", str(whole))
    assert code == 0, err
    evaluated = json.loads((whole / "evaluation-best.json").read_text())
    assert evaluated["best"]["reports"] == results["best"]["reports"]
    assert_same_codes(whole / "codes-best.npz", whole / "codes-best.mat", int(results["bits"]))

    code, out, err = run(
        "--score", whole / "codes-best.mat", "score.definitions=[relevant,expected]", "score.cutoffs=[all]"
    )
    assert code == 0, err
    assert json.loads((whole / "score-codes-best.json").read_text())["reports"] == results["best"]["reports"]


def assert_same_codes(npz: Path, mat: Path, bits: int) -> None:
    with np.load(npz, allow_pickle=False) as arrays:
        matrices = scipy.io.loadmat(mat)
        for key in ("q_img", "q_txt", "r_img", "r_txt"):
            assert set(np.unique(arrays[key])) <= {-1, 1} and arrays[key].shape[-1] >= bits
            assert np.array_equal(arrays[key], matrices[key])
        assert np.array_equal(arrays["q_l"], matrices["q_l"])


def test_clip_trains_and_another_run_uses_it(tmp_path: Path, tiny_overrides: list[str]) -> None:
    """A backbone named by its config is trained once, cached, and used by both runs."""
    small = [f"model.{key}" for key in ("bits=64", "embed_dim=64", "image_size=32", "patch_size=16", "vision_width=64",
             "vision_layers=1", "text_width=64", "text_layers=1", "context_length=16", "vocabulary=1024")]  # fmt: skip
    own = [entry for entry in tiny_overrides if not entry.startswith(("model.", "run.cache_dir"))]
    recipe = tmp_path / "clip.yaml"
    write_recipe(recipe, [*own, "dataset.type=mat", *small])
    settings = [entry for entry in tiny_overrides if not entry.startswith(("model.backbone", "run.cache_dir"))]
    settings += [f"model.backbone={recipe}", f"run.cache_dir={tmp_path / 'cache'}"]
    code, _, err = run(*arguments("DCMHT", tmp_path / "first", settings))
    assert code == 0 and "training it now" in err, err
    weights = list((tmp_path / "cache" / "backbones").glob("*/weights.safetensors"))
    assert len(weights) == 1
    code, _, err = run(*arguments("DCMHT", tmp_path / "second", settings))
    assert code == 0 and "training it now" not in err, err
    assert losses(tmp_path / "first") == losses(tmp_path / "second")
    assert not list((tmp_path / "cache").rglob("step-*.pt"))


def write_recipe(path: Path, overrides: list[str]) -> None:
    """CLIP's own configuration, on the tiny data in place of openmoji."""
    tree = load_config(ROOT / "configs/CLIP/config.yaml").tree
    tree["dataset"].pop("picture_size")
    path.write_text(yaml.safe_dump(tree))
    path.write_text(load_config(path, overrides).to_yaml())


@pytest.mark.slow
def test_ctrl_c_leaves_a_resumable_checkpoint(tmp_path: Path, tiny_overrides: list[str]) -> None:
    process = start(*arguments("DCMHT", tmp_path / "run", tiny_overrides, "run.epochs=500"))
    wait_for_step(tmp_path / "run", 8, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in err and "Traceback" not in err
    checkpoint = load(Checkpoints(tmp_path / "run" / "checkpoints", 1).paths()[-1])
    assert checkpoint.meta["state"]["step"] == len(losses(tmp_path / "run"))


@pytest.mark.slow
def test_sigkill_at_any_moment_changes_nothing(tmp_path: Path, tiny_overrides: list[str]) -> None:
    """Killed again and again, checkpoint writing included, and resumed each time: the undisturbed run's weights."""
    settings = [*tiny_overrides, "run.checkpoint_every=1", "run.epochs=3"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run(*arguments("MITH", whole, settings))[0] == 0
    generator = np.random.default_rng(1)
    for attempt in range(5):
        process = Forked(run, *arguments("MITH", killed, settings, "--resume"))
        wait_for_step(killed, 1 + 3 * attempt, process)
        time.sleep(float(generator.uniform(0, 0.1)))
        process.kill()
        process.join()
    code, _, err = run(*arguments("MITH", killed, settings, "--resume"))
    assert code == 0, err
    assert_same_state(final_state(whole), final_state(killed))
    assert losses(whole) == losses(killed)
    assert names_in(whole) == names_in(killed)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["distribute", "torchrun"])
def test_two_processes_give_the_results_of_one(launcher: str, tmp_path: Path, tiny_overrides: list[str]) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert run(*arguments("DSPH", one, tiny_overrides))[0] == 0
    if launcher == "distribute":
        code, out, err = finish(start(*arguments("DSPH", two, tiny_overrides, "--distribute", "--device", "cpu:2")))
    else:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [*torchrun, str(ROOT / "main.py")]
        code, out, err = finish(start(*arguments("DSPH", two, tiny_overrides), command=command))
    assert code == 0, err
    reports = [json.loads((folder / "results.json").read_text()) for folder in (one, two)]
    for name, value in reports[0]["best"]["reports"]["16"].items():
        assert round(value, 4) == round(reports[1]["best"]["reports"]["16"][name], 4), name
    np.testing.assert_allclose(losses(one), losses(two), rtol=1e-5)
    assert out.count("random codes") == 1


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, tiny_overrides: list[str]) -> None:
    settings = [*tiny_overrides, "optim.main.lr.head=1e30", "optim.main.lr.backbone=1e30", "run.epochs=5"]
    code, _, err = run(*arguments("MITH", tmp_path / "run", settings))
    assert code == 2 and "Traceback" not in err
    line = next(line for line in err.splitlines() if line.startswith("error: "))
    assert "not finite at step" in line and "contrast" in line and "last good checkpoint" in line


def test_results_do_not_depend_on_loader_workers(tmp_path: Path, tiny_overrides: list[str]) -> None:
    for name, extra in (("memory", ()), ("workers", ("run.loader=workers", "run.workers=2"))):
        assert run(*arguments("DCMHT", tmp_path / name, tiny_overrides, *extra))[0] == 0
    assert losses(tmp_path / "memory") == losses(tmp_path / "workers")


def test_bf16_moves_the_loss_little(tmp_path: Path, tiny_overrides: list[str]) -> None:
    assert run(*arguments("MITH", tmp_path / "full", tiny_overrides))[0] == 0
    code, _, err = run(*arguments("MITH", tmp_path / "half", tiny_overrides, "run.precision=bf16"))
    assert code == 0, err
    full, half = np.array(losses(tmp_path / "full")), np.array(losses(tmp_path / "half"))
    assert not np.array_equal(full, half)
    np.testing.assert_allclose(half, full, rtol=0.03)
