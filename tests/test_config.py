"""Configuration: layers, origins, overrides, and every error a user can make."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.config import SECTIONS, build_config, load_config, load_early
from common.errors import UserError
from common.registry import DATASETS, MODELS, OPTIMIZERS, Registry
from common.schema_sources import schema_of
from common.yaml_layers import flatten, read_yaml

ROOT = Path(__file__).parent.parent
MITH = ROOT / "configs" / "MITH" / "config.yaml"


def method_configs() -> list[Path]:
    return sorted(path for path in (ROOT / "configs").glob("*/*.yaml") if path.parent.name != "datasets")


@pytest.mark.parametrize("path", method_configs(), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_shipped_config_is_valid_and_short(path: Path) -> None:
    config = load_config(path)
    assert MODELS.folder(config.model.name) == path.parent.name
    assert len(path.read_text().splitlines()) <= 45
    assert set(config.origins) == set(flatten(config.tree))


def test_later_layers_win_and_origins_are_kept(tmp_path: Path) -> None:
    child = tmp_path / "child.yaml"
    child.write_text(f"base: [{MITH}]\nrun: {{epochs: 3}}\n")
    config = load_config(child, ["model.bits=64", "run.seed=7"])
    assert (config.run.epochs, config.model.bits, config.run.seed) == (3, 64, 7)
    assert config.origins["run.epochs"] == str(child)
    assert config.origins["model.bits"] == config.origins["run.seed"] == "command line"
    assert config.origins["run.precision"].endswith("configs/base.yaml")


def test_parents_are_found_beside_the_file_or_in_the_repository(tmp_path: Path) -> None:
    child = tmp_path / "child.yaml"
    child.write_text("base: [configs/MITH/coco.yaml]\nrun: {epochs: 3}\n")
    assert load_config(child).dataset.name == "coco"
    (tmp_path / "configs/MITH").mkdir(parents=True)
    (tmp_path / "configs/MITH/coco.yaml").write_text(f"base: [{MITH}]\ndataset: {{name: mine}}\n")
    assert load_config(child).dataset.name == "mine"


def test_resolved_yaml_alone_reproduces_the_config(tmp_path: Path) -> None:
    config = load_config(MITH, ["run.epochs=2"])
    alone = tmp_path / "alone.yaml"
    alone.write_text(config.to_yaml())
    again = load_config(alone)
    assert again.tree == config.tree and again.model == config.model and again.optim == config.optim


def test_lists_replace_and_sections_merge(tmp_path: Path) -> None:
    child = tmp_path / "child.yaml"
    child.write_text(f"base: [{MITH}]\nevaluate: {{cutoffs: [50]}}\n")
    config = load_config(child)
    assert config.evaluate.cutoffs == [50]
    assert config.evaluate.definitions == load_config(MITH).evaluate.definitions


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1.0e-5", 1e-5),
        ("-3", -3),
        ("010", 10),
        ("true", True),
        ("no", "no"),
        ("off", "off"),
        ("~", None),
    ],
)
def test_plain_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    read = read_yaml(f"key: {text}", "a test")["key"]
    assert read == value and type(read) is type(value)


def test_scientific_notation_is_a_number_everywhere() -> None:
    assert load_config(MITH, ["optim.main.lr.head=1e-5"]).optim["main"].lr["head"] == 1e-5


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.name=MIHT"], ["unknown model 'MIHT'", "did you mean 'MITH'"]),
        (["model.bitz=16"], ["model.bitz: unknown key", "did you mean 'bits'"]),
        (["model.bits=sixteen"], ["model.bits", "'sixteen'"]),
        (["model.bits=0"], ["model.bits", "greater than 0"]),
        (["model.bits=16.5"], ["model.bits", "16.5"]),
        (["run.distribute=yes"], ["run.distribute", "'yes'"]),
        (["run.seed=true"], ["run.seed", "True"]),
        (["run.device=gpu"], ["run.device", "'gpu'"]),
        (["run.runner=Runer"], ["unknown runner 'Runer'", "did you mean 'Runner'"]),
        (["dataset.type=matt"], ["unknown dataset 'matt'", "did you mean 'mat'? Registered: "]),
        (["dataset.type=pickle"], ["unknown dataset 'pickle'; registered: "]),
        (["optim.main.type=RMSprop"], ["unknown optimizer 'RMSprop'"]),
        (["optim.main.lr.head=-1"], ["optim.main.lr.head"]),
        (["runs.seed=1"], ["runs: unknown section", "did you mean 'run'"]),
        (["run.checkpoint_every=soon"], ["run.checkpoint_every", "'soon'", "integer or", 'minutes such as "10m"']),
        (["run.device=cuda:0"], ["run.device", "GPU numbers such as 0,1", "'cuda:0'"]),
        (["run.compile=yes"], ["run.compile", "true or false", "'yes'"]),
        (["run.save_dir=''"], ["run.save_dir", "at least 1 character"]),
        (["run.cache_dir=''"], ["run.cache_dir", "at least 1 character"]),
        (["dataset.root=''"], ["dataset.root", "at least 1 character"]),
        (["evaluate.cutoffs=[0]"], ["evaluate.cutoffs.0", "'all' or", "greater than 0"]),
        ([f"model.bits={10**20}"], ["model.bits", "64 bits"]),
        (["evaluate.cutoffs=[]"], ["evaluate.cutoffs"]),
        (["epochs=3"], ["section.key=value"]),
        (["run.epochs"], ["section.key=value"]),
        (["run.epochs=[1"], ["not valid YAML"]),
    ],
)
def test_mistakes_are_named(overrides: list[str], expected: list[str]) -> None:
    with pytest.raises(UserError) as error:
        load_config(MITH, overrides)
    for part in expected:
        assert part in str(error.value)


def test_all_mistakes_are_reported_at_once() -> None:
    with pytest.raises(UserError) as error:
        load_config(MITH, ["model.bitz=16", "run.epochs=none", "dataset.split.sed=1", "optim.main.lr=3"])
    for key in ("model.bitz", "run.epochs", "dataset.split.sed", "optim.main.lr"):
        assert f"{key}: " in str(error.value)
    assert "(command line)" in str(error.value)


def test_missing_keys_and_sections_are_named(tmp_path: Path) -> None:
    tree = load_config(MITH).tree
    for key in list(flatten(tree)):
        section, *path = key.split(".")
        broken = copy.deepcopy(tree)
        node = broken[section]
        for part in path[:-1]:
            node = node[part]
        del node[path[-1]]
        with pytest.raises(UserError):  # no value has a default in code
            _require_groups(build_config(broken), key)
    file = tmp_path / "broken.yaml"
    file.write_text(yaml.safe_dump({name: tree[name] for name in SECTIONS if name != "optim"}))
    with pytest.raises(UserError, match="optim: this section is missing"):
        load_config(file)


def _require_groups(config: object, key: str) -> None:
    """A learning rate that is missing is found when the optimizers meet the model's groups."""
    if ".lr." in key:
        raise UserError(f"{key} is checked against the model's groups")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("run: [", "line 1"),
        ("run: {seed: 1}\nrun: {seed: 2}\n", "'run' stands twice"),
        ("- a\n- b\n", "must be a mapping"),
        ("base: ../base.yaml\n", "`base` must be a list"),
        ("base: [nothing.yaml]\n", "nothing.yaml cannot be read"),
        ("base: [self.yaml]\n", "leads back to itself"),
        ("run: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
        ("run: &run {epochs: 3, again: *run}\n", "not valid YAML: found unconstructable recursive node"),
        ("run: " + "[" * 3000, "nested too deeply"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "self.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=expected.replace("[", r"\[")) as error:
        load_config(file)
    assert "self.yaml" in str(error.value)


def test_missing_file_is_named() -> None:
    with pytest.raises(UserError, match="configs/NONE.yaml cannot be read"):
        load_config("configs/NONE.yaml")


def test_run_folder_fills_placeholders_and_refuses_others() -> None:
    assert str(load_config(MITH, ["run.seed=3"]).run_folder).endswith("seed3")
    for text in ("{bots}", "{model.name}", "{bits[0]}", "{0}", "{", "{bits:zz}"):
        with pytest.raises(UserError, match="placeholder"):
            _ = load_config(MITH, [f"run.save_dir='result/{text}'"]).run_folder


@pytest.mark.parametrize(
    "text",
    [
        "a: &a {x: 1, y: 2}\n"
        + "".join(
            f"{n}: &{n} {{l: *{p}, r: *{p}}}\n"
            for p, n in zip("abcdefghijklmnopqrst", "bcdefghijklmnopqrstu", strict=True)
        ),
        "a: &a {x: 1}\nb: {? !!merge << : [*a, *a]}\n",
        "a: " + "[" * 50 + "]" * 50,
        "a: " + "7" * 5000,
        'a: "x\\0y"',
        'a: "\\ud800"',
        "a: " + "x" * 300_000,
    ],
    ids=["laughs", "merge key", "deep", "long number", "NUL", "surrogate", "long file"],
)
def test_yaml_that_no_setting_needs(text: str) -> None:
    try:
        read_yaml(text, "a test")
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 300
    else:
        assert "merge" in text  # read as a word, not merged


@pytest.mark.parametrize(
    "folder", ["{model.__class__.__mro__}", "{model!r}", "{model:>9}", "{0}", "{}", "{other}", "{"]
)
def test_a_folder_has_bare_placeholders_only(folder: str) -> None:
    with pytest.raises(UserError, match="may hold no placeholder but {model}, {dataset}, {bits}, {seed}"):
        load_config(ROOT / "configs/MITH/config.yaml", [f"run.save_dir='{folder}'"])
    assert load_config(ROOT / "configs/MITH/config.yaml", ["run.save_dir='a{{b}}'"]).run_folder == Path("a{b}")


def test_a_pipe_is_no_configuration(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(UserError, match="no regular file"):
        load_config(tmp_path / "pipe.yaml")


@pytest.mark.parametrize("registry", [MODELS, DATASETS, OPTIMIZERS], ids=lambda registry: str(registry.kind))
def test_schemas_from_source_are_those_of_the_classes(registry: Registry[Any]) -> None:
    for name in registry.names():
        module, cls = registry.source(name)
        if module.startswith(f"{registry.package}."):
            schema, own = schema_of(module, cls), registry.get(name).Config
            assert schema is not None, f"settings of {name} need more than pydantic, so mistakes in them wait for torch"
            assert schema is not own and schema.model_json_schema() == own.model_json_schema()
            assert [repr(field) for field in schema.model_fields.values()] == [
                repr(field) for field in own.model_fields.values()
            ]


def test_what_is_read_without_torch_is_what_is_read_with_it() -> None:
    paths = sorted((ROOT / "configs").glob("[A-Z]*/*.yaml"))
    assert len(paths) > 30
    for path in paths:
        early, full = load_early(path, ["run.seed=7"]), load_config(path, ["run.seed=7"])
        assert early is not None, path
        assert (early.tree, early.origins, early.found) == (full.tree, full.origins, full.found), path
        assert early.model.model_dump() == full.model.model_dump(), path


@pytest.mark.parametrize(
    ("config", "wrong"),
    [
        ("TwDH/config.yaml", ["dataset.split.query=-1", "model.bits=x", "model.short_bits=[16,16]", "optim.main.b1=2"]),
        ("sweep.yaml", ["sweep.seedz=3"]),
        ("sweep.yaml", ["model.bitz=3", "run.epochs=0"]),
    ],
)
def test_mistakes_do_not_wait_for_torch(config: str, wrong: list[str]) -> None:
    code = """
import sys
from pathlib import Path
from common.config import load_early
from common.errors import UserError
try:
    load_early(Path("configs", sys.argv[1]), sys.argv[2:])
except UserError as error:
    print(error)
print({"torch", "numpy"} & set(sys.modules) or "nothing")
"""
    command = [sys.executable, "-c", code, config, *wrong]
    *message, loaded = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=True).stdout.splitlines()
    assert loaded == "nothing"
    named = [line.strip().removeprefix("the configuration is not valid:").split(": ")[0] for line in message]
    assert sorted(filter(None, named)) == [entry.split("=")[0] for entry in wrong]
