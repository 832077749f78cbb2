"""Several processes = one process, through the real loop, for every registered method."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from common.config import Config, build_config, load_config
from common.errors import UserError
from common.registry import MODELS
from runners.runner import Runner
from tests import tiny_data
from tests.commands import ROOT
from tests.processes import run_processes
from utils.distributed import is_main

# 20 steps; shares of 9 rows are uneven for 2 processes, and the last batch of an epoch has 1 row, fewer than processes
SCHEDULE = ["run.batch_size=9", "run.epochs=4", "evaluate.every=4"]

# Learning rates at which rounding stays rounding: UMoED's mined triplets multiply it by ten a step at its own, and Adam
# turns that of a gradient which is zero (a bias before batch normalisation) into steps.
SETTINGS = {
    "TwDH": ["optim.main.lr={backbone: 1e-6, head: 1e-4}"],
    "UMoED": ["optim.main.lr={backbone: 1e-6, head: 1e-5}", "model.layers=2", "model.feed_forward_width=128"],
}


def config_of(method: str, folder: Path, overrides: list[str]) -> Config:
    """The method's COCO settings on the tiny data, without dropout."""
    path = ROOT / "configs" / MODELS.folder(method) / "coco.yaml"
    tree = load_config(path if path.exists() else ROOT / "configs" / "MITH" / "coco.yaml").tree
    if not path.exists():  # CLIP itself, which is trained on the embedded data only
        own = load_config(path.with_name("config.yaml")).tree
        tree = {**tree, "model": own["model"], "optim": own["optim"]}
        shape = {name: getattr(tiny_data.SHAPE, name) for name in type(tiny_data.SHAPE).__dataclass_fields__}
        small = [f"model.{name}={value}" for name, value in shape.items()]
        overrides = [entry for entry in overrides if not entry.startswith("model.")]
        overrides = [*overrides, *small, f"model.bits={tiny_data.SHAPE.embed_dim}"]
    no_dropout = [f"model.{name}=0.0" for name in tree["model"] if "dropout" in name]
    settings = [*overrides, *no_dropout, *SETTINGS.get(method, []), f"run.save_dir={folder}"]
    return build_config(tree, overrides=settings)


def train(method: str, folder: Path, overrides: list[str]) -> Runner:
    runner = Runner(config_of(method, folder, overrides))
    runner.setup()
    runner.run()
    if is_main():
        runner.lock.release()
    return runner


def losses(folder: Path) -> list[float]:
    events = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [event["loss"] for event in events if event["event"] == "step"]


def driven(name: str, value: torch.Tensor) -> torch.Tensor:
    """A state's entry without biases of attention keys: softmax cancels them, so only rounding drives their Adam."""
    value = value.double()
    if name.endswith("in_proj_bias"):
        value[len(value) // 3 : 2 * len(value) // 3] = 0
    return value


def errors_against_one(
    methods: list[str], alone: str, folder: str, overrides: list[str]
) -> dict[str, dict[str, float]]:
    """Trains in this group of processes: how far every entry of the state is from that of one process, relatively."""
    found = {}
    for method in methods:
        one = torch.load(f"{alone}/{method}.pt", mmap=True)
        state = train(method, Path(folder) / method, overrides).model.state_dict()
        assert state.keys() == one.keys()
        found[method] = {
            name: float(
                (driven(name, value) - driven(name, one[name])).abs().max() / one[name].abs().max().clamp(min=1)
            )
            for name, value in state.items()
            if value.numel()
        }
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tiny_overrides: list[str]) -> Path:
    """Every method trained by one process."""
    folder = tmp_path_factory.mktemp("alone")
    for method in MODELS.names():
        runner = train(method, folder / method, [*tiny_overrides, *SCHEDULE])
        torch.save(runner.model.state_dict(), folder / f"{method}.pt")
    return folder


@pytest.mark.parametrize("count", [2, 3])
def test_processes_train_as_one(count: int, alone: Path, tiny_overrides: list[str], tmp_path: Path) -> None:
    """Losses, weights, banks and results after 20 steps, on every process."""
    methods = MODELS.names()
    found = run_processes(errors_against_one, count, methods, str(alone), str(tmp_path), [*tiny_overrides, *SCHEDULE])
    for method in methods:
        for errors in found:
            worst = max(errors[method], key=errors[method].__getitem__)
            assert errors[method][worst] <= 1e-5, (method, worst, errors[method][worst])
        assert losses(tmp_path / method) == pytest.approx(losses(alone / method), rel=1e-5, abs=1e-6), method
        reports = [json.loads((folder / method / "results.json").read_text())["best"] for folder in (alone, tmp_path)]
        assert reports[0] == reports[1], method


def test_accumulating_changes_memory_only(alone: Path, tiny_overrides: list[str], tmp_path: Path) -> None:
    train("MITH", tmp_path, [*tiny_overrides, *SCHEDULE, "run.accumulate=4"])
    assert losses(tmp_path) == pytest.approx(losses(alone / "MITH"), rel=1e-5)


def test_accumulating_without_a_clip_to_train_is_refused(tiny_overrides: list[str], tmp_path: Path) -> None:
    for method in ("CFRH", "VTPH"):
        with pytest.raises(UserError, match=f"run.accumulate is 2, but {method} trains no CLIP"):
            Runner(config_of(method, tmp_path / method, [*tiny_overrides, "run.accumulate=2"])).setup()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler on the CPU")
def test_compiling_moves_the_loss_by_rounding(alone: Path, tiny_overrides: list[str], tmp_path: Path) -> None:
    train("DSPH", tmp_path, [*tiny_overrides, *SCHEDULE, "run.compile=true"])
    assert losses(tmp_path) == pytest.approx(losses(alone / "DSPH"), rel=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-2), ("bf16", 5e-2)])
def test_a_gpu_trains_as_the_cpu(
    precision: str, tolerance: float, alone: Path, tiny_overrides: list[str], tmp_path: Path
) -> None:
    """Pictures held on the GPU, cropped and normalised there; autocast."""
    settings = [*tiny_overrides, *SCHEDULE, "run.device=cuda", f"run.precision={precision}"]
    runner = train("DSPH", tmp_path, settings)
    assert all(parameter.is_cuda and parameter.dtype == torch.float32 for parameter in runner.model.parameters())
    assert losses(tmp_path) == pytest.approx(losses(alone / "DSPH"), rel=tolerance)
