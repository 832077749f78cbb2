"""Every mistake of a user is one line: in settings, data, checkpoints, folders. Nothing is left behind."""

import errno
import json
import os
import pickle
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

import main
from tests.commands import ROOT, refused, run
from utils.files import FolderLock

MITH = ["--config-file", str(ROOT / "configs/MITH/coco.yaml")]


@pytest.fixture
def data(tmp_path: Path, tiny_overrides: list[str]) -> Path:
    """A copy of the tiny data set, to be broken."""
    root = next(entry for entry in tiny_overrides if entry.startswith("dataset.root=")).partition("=")[2]
    shutil.copytree(root, tmp_path / "data")
    return tmp_path / "data"


def broken(data: Path, overrides: list[str], *more: str) -> str:
    """The message for a run on broken data; nothing of the run is left behind."""
    folder = data.parent / "run"
    line = refused(*MITH, "--save-dir", folder, *overrides, f"dataset.root={data}", *more)
    assert not folder.exists() or [path.name for path in folder.rglob("*")] == []
    return line


# ---------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["model.name=MTIH"], "did you mean 'MITH'"),
        (["model.bit=16"], "did you mean 'bits'"),
        (["model.bits=x"], "model.bits"),
        (["model.bits=0"], "greater than 0"),
        (["model.bits=-16"], "greater than 0"),
        (["model.bits=4"], "model.top_k"),
        (["run.epochs=[1"], "not valid YAML"),
        (["run.batch_size=38"], "training split of tiny has 37 pairs"),
        (["dataset.split.query=50"], "dataset.split"),
        (["dataset.root=/no/such/folder"], "/no/such/folder"),
        (["dataset.image_size=64"], "dataset.image_size"),
        (["dataset.text_length=64"], "dataset.text_length"),
        (["dataset.tokens=600"], "set dataset.tokens=1024 if"),
        (["model.backbone=ViT-B/33"], "ViT-B/32"),
        (["model.backbone=/no/such/clip.pt"], "/no/such/clip.pt"),
        (["model.backbone=configs/MITH/config.yaml"], "needs a backbone itself"),
        (["--device", "97"], "GPU 97 is not there"),
        (["run.device=97"], "GPU 97 is not there"),
        (["run.device=0,0"], "named twice"),
        (["--device", "cpu", "--distribute"], "--distribute needs several devices"),
        (["optim.main.lr.body=1"], "optim.main.lr.body"),
    ],
)
def test_wrong_settings(tmp_path: Path, tiny_overrides: list[str], more: list[str], expected: str) -> None:
    line = refused(*MITH, "--save-dir", tmp_path / "run", *tiny_overrides, *more)
    assert expected in line
    assert not list((tmp_path / "run").glob("*")) if (tmp_path / "run").exists() else True


def test_yaml_syntax(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("model:\n  name: MITH\n bits: 3\n")
    line = refused("--config-file", tmp_path / "bad.yaml")
    assert "bad.yaml, line 3" in line


def test_no_config_and_unknown_options(tmp_path: Path) -> None:
    assert "--config-file" in refused("run.epochs=3")
    assert "did you mean '--config-file'" in refused("--config", "x")
    assert "did you mean '--save-dir'" in refused("--save_dir=x")
    assert "--device: expected one argument" in refused("--device")
    assert "--save-dir" in refused("--resume")
    assert "--export: not allowed with argument --index" in refused("--index", "a.pt", "--export", "b.pt")
    for asked, option, said in (
        (("--score", "a.mat"), ("--json",), "--json belongs to --search, not to --score"),
        (("--search", "a", "b"), ("--input", "c"), "--input belongs to --index and --export, not to --search"),
        (("--report", "a"), ("--save-dir", "b"), "not to --report"),
        (("--evaluate", "a.pt"), ("--resume",), "--resume belongs to a run, not to --evaluate"),
        (("--index", "a.pt"), ("--config-file", "b.yaml"), "--config-file belongs to a run and --evaluate"),
        (("--config-file", "b.yaml"), ("--input", "c"), "not to a run"),
    ):
        assert said in refused(*asked, *option)
    line = refused("--resume", "--save-dir", tmp_path)
    assert f"{tmp_path} holds no run" in line and "--config-file" in line


def test_cuda_that_is_not_there(tmp_path: Path, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "has no GPU" in refused(*MITH, "--save-dir", tmp_path / "run", *tiny_overrides, "--device", "cuda")


# ---------------------------------------------------------------------------------------------- data


def test_missing_file(data: Path, tiny_overrides: list[str]) -> None:
    (data / "label.mat").unlink()
    assert "label.mat" in broken(data, tiny_overrides)


def test_mat_without_the_key(data: Path, tiny_overrides: list[str]) -> None:
    scipy.io.savemat(data / "label.mat", {"annotations": np.ones((56, 4))})
    line = broken(data, tiny_overrides)
    assert "label.mat" in line and "annotations" in line and "category" in line


def test_truncated_mat(data: Path, tiny_overrides: list[str]) -> None:
    content = (data / "caption.mat").read_bytes()
    (data / "caption.mat").write_bytes(content[: len(content) // 2])
    assert "caption.mat" in broken(data, tiny_overrides)


def test_lengths_that_differ(data: Path, tiny_overrides: list[str]) -> None:
    scipy.io.savemat(data / "label.mat", {"category": np.ones((55, 4))})
    line = broken(data, tiny_overrides)
    assert "55" in line and "56" in line and "label.mat" in line


def test_query_without_labels(data: Path, tiny_overrides: list[str]) -> None:
    labels = scipy.io.loadmat(data / "label.mat")["category"]
    labels[np.random.RandomState(1814).permutation(56)[2]] = 0
    scipy.io.savemat(data / "label.mat", {"category": labels})
    assert "no label" in broken(data, tiny_overrides, "dataset.split.seed=1814")


def bomb(path: Path) -> None:
    Image.new("1", (20_000, 20_000)).save(path)


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda path: path.unlink(), "missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:300]), "truncated"),
        (lambda path: path.write_text("not a picture"), "not a picture"),
        (bomb, "bomb"),
    ],
    ids=["missing", "truncated", "text", "bomb"],
)
@pytest.mark.parametrize("loader", ["memory", "workers"])
def test_broken_pictures(data: Path, tiny_overrides: list[str], spoil: object, expected: str, loader: str) -> None:
    spoil(data / "images" / "7.png")  # type: ignore[operator]
    folder = data.parent / "run"
    more = [f"dataset.root={data}", f"run.loader={loader}", "run.workers=2"]
    line = refused(*MITH, "--save-dir", folder, *tiny_overrides, *more)
    assert "7.png" in line and expected in line
    assert not list(folder.rglob("*.part"))


# ---------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_overrides: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert run(*MITH, "--save-dir", folder, *tiny_overrides, "run.epochs=1")[0] == 0
    return folder


def test_checkpoint_of_another_method_or_length(trained: Path, tmp_path: Path, tiny_overrides: list[str]) -> None:
    other: list[str | Path] = ["--config-file", ROOT / "configs/DSPH/coco.yaml", "--save-dir", tmp_path / "run"]
    assert "is of MITH" in refused(*other, *tiny_overrides, "--evaluate", trained / "best.pt")
    same: list[str | Path] = [*MITH, "--save-dir", tmp_path / "run", *tiny_overrides]
    assert "32 bits" in refused(*same, "model.bits=32", "--evaluate", trained / "best.pt")


def test_checkpoint_that_cannot_be_read(trained: Path, tmp_path: Path, tiny_overrides: list[str]) -> None:
    settings: list[str | Path] = [*MITH, "--save-dir", tmp_path / "run", *tiny_overrides]
    assert "no.pt is not there" in refused(*settings, "--evaluate", tmp_path / "no.pt")
    (tmp_path / "cut.pt").write_bytes((trained / "best.pt").read_bytes()[:5000])
    assert "cut.pt" in refused(*settings, "--evaluate", tmp_path / "cut.pt")
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(os.system))
    assert "evil.pt" in refused(*settings, "--evaluate", tmp_path / "evil.pt")
    torch.save({"w": torch.ones(2)}, tmp_path / "foreign.pt")
    assert "does not fit" in refused(*settings, "--evaluate", tmp_path / "foreign.pt")
    content = torch.load(trained / "best.pt", weights_only=True)
    torch.save({**content, "meta": json.dumps({"config": {"model": None}})}, tmp_path / "nameless.pt")
    assert "does not say which method it is of" in refused(*settings, "--evaluate", tmp_path / "nameless.pt")


def test_a_checkpoint_names_no_place_and_starts_no_process(trained: Path, tmp_path: Path) -> None:
    content = torch.load(trained / "best.pt", weights_only=True)
    meta = json.loads(content["meta"])
    root, trap = meta["config"]["dataset"]["root"], str(tmp_path / "trap")
    meta["config"]["run"].update(save_dir=trap, cache_dir=trap, device="cpu:2000", distribute=True)
    meta["config"]["dataset"].update(cache=trap, root=trap)
    del meta["config"]["dataset"]["image_features"], meta["config"]["run"]["keep_checkpoints"]  # an earlier version's
    del meta["config"]["dataset"]["split"]["validation"], meta["config"]["evaluate"]["select"]
    model = tmp_path / "there" / "model.pt"
    model.parent.mkdir()
    torch.save({**content, "meta": json.dumps(meta)}, model)
    line = refused("--evaluate", model)
    assert "dataset.root is a place on the machine" in line and "configuration with --config-file" in line
    line = refused("--index", model, "--input", "dataset:tiny", "--save-dir", tmp_path / "index")
    assert "dataset.root is a place on the machine" in line and "name its YAML: --input dataset:FILE.yaml" in line
    code, _, err = run("--evaluate", model, f"dataset.root={root}")
    assert code == 0, err
    assert "run.device=auto" in err and f"dataset.root={root} (command line)" in err
    assert not Path(trap).exists()
    assert (model.parent / "evaluation-model.json").is_file()
    meta["config"]["dataset"].update(type="openmoji", root=str(tmp_path / "there"), picture_size=16)
    torch.save({**content, "meta": json.dumps(meta)}, model)
    assert "index" in refused("--evaluate", model)  # nothing is made there
    assert {path.suffix for path in model.parent.iterdir()} <= {".pt", ".json", ".npz", ".mat"}
    assert not (model.parent / "index.mat").exists()


@pytest.mark.parametrize("spoil", ["nan", "infinite", "deep", "wide", "hostile list"])
def test_checkpoints_that_mean_nothing(trained: Path, tmp_path: Path, spoil: str) -> None:
    content = torch.load(trained / "best.pt", weights_only=True)
    meta = json.loads(content["meta"])
    root, words = meta["config"]["dataset"]["root"], {"nan": "not finite", "infinite": "not finite"}
    if spoil in words:
        name = next(name for name in content["model"] if name.startswith("backbone." if spoil == "nan" else "head."))
        content["model"][name].view(-1)[0] = float("nan" if spoil == "nan" else "inf")
    elif spoil == "deep":
        content["meta"] = "[" * 100_000
        words["deep"] = "not written whole"
    elif spoil == "wide":
        meta["config"]["model"]["bits"] = 10**9
        content["meta"] = json.dumps(meta)
        words["wide"] = "model.bits"
    else:
        meta["config"]["dataset"]["labels"] = ["../../etc/labels.mat"]
        content["meta"] = json.dumps(meta)
        words["hostile list"] = "may lie anywhere"
    torch.save(content, tmp_path / "model.pt")
    assert words[spoil] in refused("--evaluate", tmp_path / "model.pt", f"dataset.root={root}")


def test_evaluating_needs_no_config_for_our_own_checkpoints(trained: Path, tmp_path: Path) -> None:
    code, out, err = run("--evaluate", trained / "best.pt", "--save-dir", tmp_path / "out")
    assert code == 0, err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "ap-best.npz", "codes-best.mat", "codes-best.npz", "evaluation-best.json"]  # fmt: skip


# ---------------------------------------------------------------------------------------------- folders


def test_a_folder_that_holds_a_run_is_not_overwritten(trained: Path, tiny_overrides: list[str]) -> None:
    before = (trained / "results.json").read_bytes()
    line = refused(*MITH, "--save-dir", trained, *tiny_overrides, "run.epochs=1")
    assert "holds a finished run" in line and "--resume" in line
    assert (trained / "results.json").read_bytes() == before


def test_resuming_under_other_settings_lists_them(trained: Path, tiny_overrides: list[str]) -> None:
    line = refused(*MITH, "--save-dir", trained, *tiny_overrides, "run.epochs=3", "model.temperature=0.1", "--resume")
    assert "run.epochs: 1 there, 3 now" in line and "model.temperature: 0.07 there, 0.1 now" in line


def test_folder_in_use(tmp_path: Path, tiny_overrides: list[str]) -> None:
    (tmp_path / "run").mkdir()
    lock = FolderLock(tmp_path / "run")
    assert lock.acquire(wait=False)
    assert "another process" in refused(*MITH, "--save-dir", tmp_path / "run", *tiny_overrides)
    lock.release()


def test_folder_that_cannot_be_written(tmp_path: Path, tiny_overrides: list[str]) -> None:
    (tmp_path / "file").write_text("")
    assert "--save-dir" in refused(*MITH, "--save-dir", tmp_path / "file" / "run", *tiny_overrides)
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(stat.S_IRUSR | stat.S_IXUSR)
    if not os.access(locked, os.W_OK):  # root may write everywhere
        assert "--save-dir" in refused(*MITH, "--save-dir", locked / "run", *tiny_overrides)


def test_a_file_that_may_not_be_read_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", "notes.yaml")

    monkeypatch.setattr(main, "run", refuse)
    assert main.main(["--list"]) == 2
    assert capsys.readouterr().err == "error: notes.yaml: Permission denied; allow it, or name another place\n"
