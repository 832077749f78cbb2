"""Several processes = one process, through the real loop, for every registered method."""

import functools
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from common.config import Config, build_config, load_config
from common.errors import UserError
from common.registry import MODELS
from common.types import Batch
from runners.runner import Runner
from tests import tiny_data
from tests.commands import ROOT
from tests.processes import run_processes
from tests.runs import losses
from tests.tiny_models import small_settings
from utils.distributed import is_main
from utils.precision import float32_products

# 10 steps; shares of 9 rows are uneven for 2 processes, and the last batch of an epoch has 1 row, fewer than processes
SCHEDULE = ["run.batch_size=9", "run.epochs=2", "evaluate.every=2"]

# Learning rates at which rounding stays rounding: UMoED's mined triplets multiply it by ten a step at its own, and Adam
# turns that of a gradient which is zero (a bias before batch normalisation) into steps.
SETTINGS = {
    "TwDH": ["optim.main.lr={backbone: 1e-6, head: 1e-4}"],
    "UMoED": ["optim.main.lr={backbone: 1e-6, head: 1e-5}"],
}


def config_of(method: str, folder: Path, overrides: list[str], dropout: float = 0.3) -> Config:
    """The method's COCO settings on the tiny data, with dropout wherever the method has it."""
    path = ROOT / "configs" / MODELS.folder(method) / "coco.yaml"
    tree = load_config(path if path.exists() else ROOT / "configs" / "MITH" / "coco.yaml").tree
    if not path.exists():  # CLIP itself, which is trained on the embedded data only
        own = load_config(path.with_name("config.yaml")).tree
        tree = {**tree, "model": own["model"], "optim": own["optim"]}
        overrides = [entry for entry in overrides if not entry.startswith("model.")]
        overrides = [*overrides, f"model.vocabulary={tiny_data.SHAPE.vocabulary}"]
    dropouts = [f"model.{name}={dropout}" for name in tree["model"] if "dropout" in name]
    settings = [*small_settings(method), *overrides, *dropouts, *SETTINGS.get(method, []), f"run.save_dir={folder}"]
    return build_config(tree, overrides=settings)


def train(method: str, folder: Path, overrides: list[str], dropout: float = 0.3) -> Runner:
    runner = Runner(config_of(method, folder, overrides, dropout))
    runner.setup()
    runner.run()
    if is_main():
        assert runner.lock is not None
        runner.lock.release()
    return runner


def driven(name: str, value: torch.Tensor) -> torch.Tensor:
    """A state's entry without biases of attention keys: softmax cancels them, so only rounding drives their Adam."""
    value = value.double()
    if name.endswith("in_proj_bias"):
        value[len(value) // 3 : 2 * len(value) // 3] = 0
    return value


def errors_against_one(method: str, alone: str, folder: str, overrides: list[str]) -> dict[str, float]:
    """Trains in this group of processes: how far every entry of the state is from that of one process, relatively."""
    one = torch.load(f"{alone}/state.pt", mmap=True)
    state = train(method, Path(folder), overrides).model.state_dict()
    assert state.keys() == one.keys()
    return {
        name: float((driven(name, value) - driven(name, one[name])).abs().max() / one[name].abs().max().clamp(min=1))
        for name, value in state.items()
        if value.numel()
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tiny_overrides: list[str]) -> Callable[..., Path]:
    """Folder of the run of a method by one process."""

    @functools.cache
    def trained(method: str, dropout: float = 0.3) -> Path:
        folder = tmp_path_factory.mktemp("alone")
        runner = train(method, folder, [*tiny_overrides, *SCHEDULE], dropout)
        torch.save(runner.model.state_dict(), folder / "state.pt")
        return folder

    return trained


# Their heads are those of DSPH, or their token sets those of UMoED: what gathers rows is tested there.
KIN = {"DDBH", "DNPH", "DNpH", "DNcH", "DAGtH", "DDWSH", "DIMCH"}


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=pytest.mark.slow) if name in KIN else name for name in MODELS.names()]
)
@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_processes_train_as_one(
    count: int, method: str, alone: Callable[..., Path], tiny_overrides: list[str], tmp_path: Path
) -> None:
    """Losses, weights, banks and results after 10 steps, on every process."""
    one, overrides = alone(method), [*tiny_overrides, *SCHEDULE]
    for errors in run_processes(errors_against_one, count, method, str(one), str(tmp_path), overrides):
        worst = max(errors, key=errors.__getitem__)
        assert errors[worst] <= 1e-5, (worst, errors[worst])
    assert losses(tmp_path) == pytest.approx(losses(one), rel=1e-5, abs=1e-6)
    best = [json.loads((folder / "results.json").read_text())["best"] for folder in (one, tmp_path)]
    assert best[0]["reports"] == best[1]["reports"]
    for bits, seen in best[0]["codes"].items():
        assert seen == pytest.approx(best[1]["codes"][bits], rel=1e-5)


def test_accumulating_changes_memory_only(
    alone: Callable[..., Path], tiny_overrides: list[str], tmp_path: Path
) -> None:
    train("MITH", tmp_path, [*tiny_overrides, *SCHEDULE, "run.accumulate=4"])
    assert losses(tmp_path) == pytest.approx(losses(alone("MITH")), rel=1e-5)


def test_recomputing_changes_no_bit(alone: Callable[..., Path], tiny_overrides: list[str], tmp_path: Path) -> None:
    """With dropout, tokens and pooled features; to rounding over several processes, as without."""
    overrides, one = [*tiny_overrides, *SCHEDULE, "run.recompute=true"], alone("MITH")
    state = train("MITH", tmp_path / "one", overrides).model.state_dict()
    assert_same_bits(state, torch.load(one / "state.pt"))
    assert losses(tmp_path / "one") == losses(one)
    for errors in run_processes(errors_against_one, 2, "MITH", str(one), str(tmp_path / "two"), overrides):
        assert max(errors.values()) <= 1e-5


def assert_same_bits(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize("setting", ["run.accumulate=2", "run.recompute=true"])
def test_sparing_memory_of_a_clip_that_is_not_trained_is_refused(
    setting: str, tiny_overrides: list[str], tmp_path: Path
) -> None:
    key, value = setting.split("=")
    for method in ("CFRH", "VTPH"):
        with pytest.raises(UserError, match=f"{key} is {value}, but {method} trains no CLIP"):
            Runner(config_of(method, tmp_path / method, [*tiny_overrides, setting])).setup()


def test_matmul_holds_for_training_steps_alone(
    tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward; codes and what runs afterwards in this process are computed in float32."""
    seen: dict[str, set[tuple[str, bool]]] = {"forward": set(), "backward": set(), "codes": set()}

    def look(when: str) -> None:
        seen[when].add((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))

    def encode(batch: Batch) -> torch.Tensor:
        look("codes")
        return codes(batch)

    runner = Runner(config_of("DSPH", tmp_path, [*tiny_overrides, *SCHEDULE, "run.epochs=1", "run.matmul=high"]))
    runner.setup()
    runner.model.register_forward_hook(lambda *_: look("forward"))
    next(p for p in runner.model.parameters() if p.requires_grad).register_hook(lambda _: look("backward"))
    codes = runner.model.encode_image
    monkeypatch.setattr(runner.model, "encode_image", encode)
    runner.run()
    float32 = ("highest", False)
    assert seen == {"forward": {("high", True)}, "backward": {("high", True)}, "codes": {float32}}
    with pytest.raises(ZeroDivisionError), float32_products("high"):
        _ = 1 / 0
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == float32


def test_texts_of_other_tokens_than_a_clip_to_train_are_refused(tiny_overrides: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"dataset\.tokens is 600, but the CLIP of model: has a vocabulary of 1024"):
        Runner(config_of("CLIP", tmp_path, [*tiny_overrides, "dataset.tokens=600"])).setup()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler on the CPU")
def test_compiling_moves_the_loss_by_rounding(
    alone: Callable[..., Path], tiny_overrides: list[str], tmp_path: Path
) -> None:
    """Without dropout: compiled code draws in its own way."""
    train("DSPH", tmp_path, [*tiny_overrides, *SCHEDULE, "run.compile=true"], dropout=0.0)
    assert losses(tmp_path) == pytest.approx(losses(alone("DSPH", dropout=0.0)), rel=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-2), ("bf16", 5e-2)])
def test_a_gpu_trains_as_the_cpu(
    precision: str, tolerance: float, alone: Callable[..., Path], tiny_overrides: list[str], tmp_path: Path
) -> None:
    """Pictures held on the GPU, cropped and normalised there; autocast. No dropout: a GPU draws other numbers."""
    settings = [*tiny_overrides, *SCHEDULE, "run.device=cuda", f"run.precision={precision}"]
    runner = train("DSPH", tmp_path, settings, dropout=0.0)
    assert all(parameter.is_cuda and parameter.dtype == torch.float32 for parameter in runner.model.parameters())
    assert losses(tmp_path) == pytest.approx(losses(alone("DSPH", dropout=0.0)), rel=tolerance)
