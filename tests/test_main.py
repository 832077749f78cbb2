"""The command line: what it shows, where it writes, and a method from outside. Mistakes are in test_bad_input.py."""

import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from common.config import load_config
from common.errors import UserError
from runners.commands import import_file
from tests.commands import MAIN, ROOT, finish, run, start
from tests.processes import run_processes

MITH = ["--config-file", str(ROOT / "configs/MITH/coco.yaml")]


# ---------------------------------------------------------------------------------------------- what it shows


def test_list_names_every_method_runner_and_data_set() -> None:
    code, out, _ = run("--list")
    assert code == 0
    for name in (
        "MITH",
        "DCMHT",
        "VTPH",
        "CFRH",
        "DSPH",
        "DNPH",
        "TwDH",
        "DIMCH",
        "UMoED",
        "CLIP",
        "Runner",
        "openmoji",
        "BertAdam",
    ):
        line = next(line for line in out.splitlines() if f" {name} " in f"{line} ")
        assert len(line.split()) > 4, line
    assert "could not be imported" not in out


def test_print_config_names_the_layer_of_every_value() -> None:
    code, out, _ = run(*MITH, "model.bits=64", "--print-config")
    assert code == 0
    rows = {line.split()[0]: line for line in out.splitlines() if "." in line.split()[0]}
    assert "command line" in rows["model.bits"] and "64" in rows["model.bits"]
    assert "configs/MITH/coco.yaml" in rows["model.top_k"]
    assert "configs/datasets/coco.yaml" in rows["dataset.root"]
    assert "configs/base.yaml" in rows["run.precision"]


def test_help_explains_every_option() -> None:
    done = subprocess.run([sys.executable, "main.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    for option in (
        "--config-file",
        "--save-dir",
        "--device",
        "--resume",
        "--evaluate",
        "--list",
        "--print-config",
        "--import",
    ):
        assert option in done.stdout


@pytest.mark.parametrize("command", [["--help"], ["--list"], [*MITH, "--print-config"]], ids=lambda c: c[-1])
@pytest.mark.parametrize("output", ["gone", "closed", "full"])
def test_output_that_cannot_be_written(command: list[str], output: str) -> None:
    shell = {"gone": "| true; exit ${PIPESTATUS[0]}", "closed": ">&-", "full": "> /dev/full"}[output]
    done = subprocess.run(
        ["bash", "-c", f'"$@" {shell}', "-", *MAIN, *command], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == (141 if output == "gone" else 2)
    assert len(done.stderr.splitlines()) == (0 if output == "gone" else 1), done.stderr


def test_ctrl_c_while_packages_load() -> None:
    process = start("--evaluate", "no.pt")
    while b"libtorch" not in Path(f"/proc/{process.pid}/maps").read_bytes():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, _, err = finish(process)
    assert process.returncode in (-signal.SIGINT, 130) and "Traceback" not in err


def test_another_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(ROOT / "configs/CFRH/config.yaml")
    assert Path(config.model.backbone).resolve() == ROOT / "configs/CLIP/config.yaml"
    assert Path(config.dataset.root).resolve() == ROOT / "data/openmoji"
    assert config.run_folder == Path("result/CFRH/openmoji-32bits-seed1")  # outputs lie in the working directory
    assert config.tree["dataset"]["root"] == "data/openmoji"  # what is compared and stored is what was written
    (tmp_path / "data/openmoji").mkdir(parents=True)
    own = tmp_path / "own.yaml"
    own.write_text(f"base: [{ROOT}/configs/CFRH/config.yaml]\ndataset: {{root: data/openmoji}}\n")
    assert load_config(own).dataset.root == "data/openmoji"  # beside the file that names it
    assert load_config(own, ["dataset.root=nowhere"]).dataset.root == "nowhere"


# --------------------------------------------------------------------------------------- a method from outside

TOY = """
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from common.registry import MODELS
from common.types import Batch, DataInfo, Progress, StepOutput
from models.base import HashingModel, ModelConfig, ParamGroups
from utils.distributed import gather_rows


class ToyConfig(ModelConfig):
    margin: float = Field(gt=0)


@MODELS.register("Toy")
class Toy(HashingModel):
    \"\"\"Linear codes of pixels and words.\"\"\"

    Config = ToyConfig
    fields = frozenset({"image", "bag_of_words", "labels"})
    text_fields = frozenset({"bag_of_words"})

    def __init__(self, config: ToyConfig, data: DataInfo) -> None:
        super().__init__(config, data)
        self.margin = config.margin
        channels, height, width = data.field_shapes["image"]
        self.image = nn.Linear(channels * height * width, config.bits)
        self.text = nn.Linear(data.field_shapes["bag_of_words"][0], config.bits)

    def training_step(self, batch: Batch, progress: Progress) -> StepOutput:
        image = gather_rows(self.image(batch["image"].flatten(1)).tanh())
        text = gather_rows(self.text(batch["bag_of_words"]).tanh())
        labels = gather_rows(batch["labels"])
        same = (labels @ labels.T > 0).float()
        likelihood = nn.functional.softplus(self.margin * image @ text.T) - same * self.margin * (image @ text.T)
        return StepOutput(likelihood.mean(), {"likelihood": likelihood.mean()})

    def encode_image(self, batch: Batch) -> Tensor:
        return torch.where(self.image(batch["image"].flatten(1)) >= 0, 1.0, -1.0)

    def encode_text(self, batch: Batch) -> Tensor:
        return torch.where(self.text(batch["bag_of_words"]) >= 0, 1.0, -1.0)

    def param_groups(self) -> ParamGroups:
        return {"main": {"all": list(self.parameters())}}
"""


def toy(tmp_path: Path) -> list[str]:
    (tmp_path / "toy.py").write_text(TOY)
    (tmp_path / "toy.yaml").write_text(
        textwrap.dedent(
            f"""
            base: [{ROOT}/configs/base.yaml, {ROOT}/configs/datasets/coco.yaml]
            model: {{name: Toy, bits: 16, margin: 0.5}}
            optim:
              main: {{type: SGD, lr: {{all: 0.05}}, momentum: 0.9, weight_decay: 0, nesterov: false,
                     schedule: constant}}
            """
        )
    )
    return ["--import", str(tmp_path / "toy.py"), "--config-file", str(tmp_path / "toy.yaml")]


def test_a_method_from_outside_trains(tmp_path: Path, tiny_overrides: list[str]) -> None:
    """One file and one YAML outside the tree; in a process of its own, since names are registered once."""
    settings = [entry for entry in tiny_overrides if not entry.startswith("model.")]
    own = toy(tmp_path)
    ((code, out, err),) = run_processes(run, 1, *own, "--save-dir", str(tmp_path / "run"), *settings)
    assert code == 0 and "Toy on tiny" in out, err
    ((code, out, err),) = run_processes(run, 1, *own[:2], "--list")
    assert code == 0 and "Linear codes of pixels and words." in out, err


MODULES = "model.name: the Config of Toy is no schema of a model; derive it from ModelConfig"
GROUPS = '{"main": {"all": list(self.parameters())}}'
UNTRAINED = "self.unused, self.heads = nn.Linear(2, 3), [nn.Linear(2, 3), nn.Linear(2, 3)]\n        "
REMEMBERED = """    @property
    def rememberable_fields(self):
        return frozenset({"labels"})

    def encode_image"""
BANK = "self.bank = torch.zeros(3, 16)\n        self.image"
LAZY = """if not hasattr(self, "bank"):
            self.register_buffer("bank", torch.zeros(16))
        labels = gather"""
BUFFER = 'self.register_buffer("rows", torch.ones(3, 1).expand(3, 4))\n        self.image'
EXTRA = 'def get_extra_state(self) -> dict:\n        return {"seen": 3}\n\n    def encode_image'


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("def encode_image", EXTRA, "Toy: _extra_state of its state is a dict, but a checkpoint keeps tensors alone"),
        ("    Config = ToyConfig\n", "", "model.name: Toy has no Config, the schema of its settings"),
        ("    fields = froz", "    seen = froz", "Toy lacks fields, which models/base.py asks of every method"),
        ("def encode_text", "def encode_words", "Toy lacks encode_text, which models/base.py"),
        ("1.0, -1.0)", "1.0, -1.0)[:, :8]", "Toy.encode_image returned codes of the shape [8, 8]; that of this batch"),
        ("1.0, -1.0)", "1.0, -1.5)", "Toy.encode_image returned codes other than -1 and +1"),
        ("class ToyConfig(ModelConfig)", "class ToyConfig", MODULES),
        ("(HashingModel)", "(nn.Module)", "Toy is no HashingModel; derive its class from"),
        ('frozenset({"image", "bag_of_words", "labels"})', '"image"', "Toy.fields is no set of names; write frozenset"),
        (GROUPS, "list(self.parameters())", "Toy.param_groups returns no {optimizer: {group: parameters}}"),
        ("list(self.parameters())", "self.image.weight", "Toy.param_groups: main.all is no list of parameters"),
        ("list(self.parameters())", "[self.image.weight]", "Toy.param_groups leaves out 3 trainable parameters"),
        ("1.0, -1.0)", "1.0, -1.0) > 0", "Toy.encode_image returned torch.bool; codes are a float32 tensor"),
        ("1.0, -1.0)", "1.0, -1.0).numpy()", "Toy.encode_image returned a ndarray; codes are"),
        ("    def encode_image", REMEMBERED, "Toy names rememberable_fields, so it must define remember"),
        ("labels = gather", LAZY, "Toy: bank of its state was nothing and is now [16] torch.float32, so that no"),
        ("self.image", BUFFER, "Toy: rows of its state has several places for one number"),
    ],
)
def test_mistakes_in_a_method_are_said_in_one_line(
    old: str, new: str, expected: str, tmp_path: Path, tiny_overrides: list[str]
) -> None:
    """State that no checkpoint gives back, too: before the training, not at the first use of what it gave."""
    own = toy(tmp_path)
    (tmp_path / "toy.py").write_text(TOY.replace(old, new, 1))
    settings = [entry for entry in tiny_overrides if not entry.startswith("model.")]
    ((code, _, err),) = run_processes(run, 1, *own, "--save-dir", str(tmp_path / "run"), *settings)
    assert code == 2 and f"error: {expected}" in err and "Traceback" not in err, err


def test_what_a_method_neither_trains_nor_keeps_is_named(tmp_path: Path, tiny_overrides: list[str]) -> None:
    """It may be meant so, on one process and one device."""
    own = toy(tmp_path)
    (tmp_path / "toy.py").write_text(TOY.replace("self.image", f"{UNTRAINED}{BANK}", 1))
    settings = [entry for entry in tiny_overrides if not entry.startswith("model.")]
    ((code, _, err),) = run_processes(run, 1, *own, "--save-dir", str(tmp_path / "run"), *settings, "run.epochs=1")
    assert code == 0, err
    assert "Toy: the loss does not depend on 2 trainable parameters (first: unused.weight)" in err
    assert err.count("Toy: bank is a tensor that no checkpoint keeps and no device gets; register it") == 1
    assert err.count("Toy: heads is a module that no checkpoint keeps and no device gets; register it") == 1


def test_mistakes_in_an_imported_file_are_named(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    with pytest.raises(UserError, match="no such Python file"):
        import_file(file)
    file.write_text("x = 1\nprint(undefined_name)\n")
    with pytest.raises(UserError, match=r"mine.py, line 2: NameError.*undefined_name"):
        import_file(file)
    file.write_text("x = 1\ndef broken(:\n")
    with pytest.raises(UserError, match=r"mine.py, line 2: SyntaxError: invalid syntax$"):
        import_file(file)
    file.write_text("import sys\nsys.exit(3)\n")  # a script that begins at once
    with pytest.raises(UserError, match=r"mine.py, line 2: SystemExit: 3$"):
        import_file(file)
    file.write_text("from common.registry import MODELS\n@MODELS.register\nclass Mine: ...\n")
    with pytest.raises(UserError, match=r'mine.py: a model is registered under a name: write .register\("MyName"\)'):
        import_file(file)
    file.write_text("from common.registry import MODELS\nMODELS.register('mith')(int)\n")
    with pytest.raises(UserError, match="'mith' would share the folders of 'MITH'"):
        import_file(file)
    (tmp_path / "models.py").write_text("x = 1\n")  # would stand for the package of the methods
    with pytest.raises(UserError, match=r"another module models \(.*__init__\.py\); rename the file"):
        import_file(tmp_path / "models.py")
