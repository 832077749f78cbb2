"""Configuration: the schemas of the sections, and one message with all that is wrong.

How YAML files are read and merged stands in `common/yaml_layers.py`. Values live in YAML only; types, meaning and
ranges live in the schemas only.
"""

import logging
import re
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from common.errors import UserError
from common.places import ROOT, Mark, locate, marks_of
from common.registry import DATASETS, MODELS, OPTIMIZERS, RUNNERS, near_names
from common.yaml_layers import COMMAND_LINE, Tree, apply_overrides, layered, read_layers

logger = logging.getLogger(__name__)
SECTIONS = ("model", "dataset", "optim", "run", "evaluate")

# Keys that change where or how fast a run computes, but not what: they may differ when a run goes on.
FREE_KEYS = frozenset(
    f"run.{key}"
    for key in (
        "save_dir",
        "cache_dir",
        "device",
        "distribute",
        "recompute",
        "workers",
        "log_every",
        "checkpoint_every",
        "keep_checkpoints",
    )
)


class Section(BaseModel):
    """Base of all schemas: frozen, unknown keys refused, no conversion between types, no NaN, no empty words."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, str_min_length=1, protected_namespaces=()
    )


class DatasetConfig(Section):
    """The part of the `dataset:` section that every data set has."""

    name: str  # for messages, result folders and tables
    type: str  # registered name of the class that reads it


class OptimizerConfig(Section):
    """The part of an entry of the `optim:` section that every optimizer has."""

    type: str  # registered name of the optimizer
    lr: dict[str, Annotated[float, Field(ge=0)]]  # learning rate of every parameter group, by the model's group names


def _of_form(pattern: str, form: str) -> AfterValidator:
    """Refuses words that do not match a pattern, naming their form in words."""

    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(f"Input should be {form}")
        return value

    return AfterValidator(check)


DATASET_CONFIGS = ROOT / "configs/datasets"
PLACEHOLDERS = ("model", "dataset", "bits", "seed")  # of run.save_dir


def _with_placeholders(value: str) -> str:
    """Refuses a folder with anything in braces but the bare placeholders."""
    known = ", ".join("{" + name + "}" for name in PLACEHOLDERS)
    try:
        parts = list(string.Formatter().parse(value))
    except ValueError:
        raise ValueError(f"may hold no placeholder but {known}") from None
    if any(name is not None and (name not in PLACEHOLDERS or form or change) for _, name, form, change in parts):
        raise ValueError(f"may hold no placeholder but {known}")
    return value


class RunConfig(Section):
    """`run:` section. `configs/base.yaml` is the commented reference page of its values."""

    runner: str  # registered name of the loop
    # folder of the run; {model}, {dataset}, {bits} and {seed} are filled in
    save_dir: Annotated[str, AfterValidator(_with_placeholders), Mark.OF_MACHINE]
    # downloaded weights, trained backbones, hash centres: costly to make, safe to delete
    cache_dir: Annotated[str, Mark.OF_MACHINE]
    # auto, cpu, cpu:2 (two processes), cuda, or GPU numbers
    device: Annotated[
        str,
        BeforeValidator(lambda value: str(value) if type(value) is int else value),  # `device: 0` is a number in YAML
        _of_form(
            r"auto|cpu(:[1-9]\d{0,5})?|cuda|\d{1,5}(,\d{1,5})*", "auto, cpu, cuda, GPU numbers such as 0,1, or cpu:2"
        ),
        Mark.OF_MACHINE,
    ]
    distribute: Annotated[bool, Mark.OF_MACHINE]  # one process per device of `device`
    seed: int = Field(ge=0, lt=2**32)  # weights, order, augmentation, dropout (the split has its own seed)
    epochs: int = Field(gt=0)
    patience: Annotated[int, Field(gt=0)] | None  # evaluations without gain after which a run ends; null: it never does
    batch_size: int = Field(gt=0)  # pairs of the global batch, over all processes
    accumulate: int = Field(gt=0)  # parts in which CLIP computes a batch, to save memory
    recompute: bool  # CLIP's blocks are computed again in backward, to save memory
    precision: Literal["float32", "bf16"]  # bf16: autocast; codes and losses stay float32
    matmul: Literal["highest", "high"]  # of float32 in training steps; high: TF32 where the GPU has it
    compile: bool  # torch.compile
    log_every: int = Field(gt=0)  # steps after which their losses are read back, checked and logged together
    loader: Literal["memory", "workers"]  # pictures held as uint8 on the device, or read by worker processes
    workers: Annotated[int, Field(ge=0, le=1024), Mark.OF_MACHINE]  # worker processes of the loader `workers`
    # steps, or minutes as in "10m"
    checkpoint_every: Annotated[int, Field(gt=0)] | Annotated[str, _of_form(r"[1-9]\d*m", 'minutes such as "10m"')]
    keep_checkpoints: int = Field(gt=0)  # newest resumable checkpoints kept


class EvaluateConfig(Section):
    """`evaluate:` section."""

    every: int = Field(gt=0)  # epochs between evaluations; the last epoch is always evaluated
    batch_size: int = Field(gt=0)  # rows encoded at a time
    # k of mAP@k; the first is the headline
    cutoffs: list[Literal["all"] | Annotated[int, Field(gt=0)]] = Field(min_length=1)
    # see README, "How results are defined"
    definitions: list[Literal["relevant", "top", "expected"]] = Field(min_length=1)
    caption: Literal["random", "first"]  # of several captions: a seeded random one (as the papers), or the first
    pairs: bool  # also recall@k and median rank of a query's own partner, within the split that asks
    select: Literal["query", "validation", "last"]  # which epoch is reported: the best on that split, or the last


@dataclass(frozen=True)
class Config:
    """A checked configuration.

    Attributes:
        model: `model:` section, of the class that the method declares.
        dataset: `dataset:` section, of the class that the data set declares.
        optim: `optim:` section: optimizer name -> its settings.
        run: `run:` section.
        evaluate: `evaluate:` section.
        tree: The same as plain nested dicts, as it would stand in one YAML file.
        origins: Dotted key -> the file, or "command line", that its value came from.
    """

    model: Any
    dataset: Any
    optim: dict[str, Any]
    run: RunConfig
    evaluate: EvaluateConfig
    tree: Tree
    origins: dict[str, str]

    @property
    def run_folder(self) -> Path:
        """`run.save_dir` with {model}, {dataset}, {bits} and {seed} filled in."""
        model = MODELS.folder(self.model.name)
        names = {"model": model, "dataset": self.dataset.name, "bits": self.model.bits, "seed": self.run.seed}
        return Path(self.run.save_dir.format(**names))

    @property
    def found(self) -> dict[str, Any]:
        """Dotted key -> value of the paths that are read, as they were found from the working directory."""
        sections = {"model": self.model, "dataset": self.dataset}
        return {
            f"{name}.{key}": getattr(section, key)
            for name, section in sections.items()
            for key, field in type(section).model_fields.items()
            if Mark.READ in marks_of(field)
        }

    def to_yaml(self) -> str:
        """One YAML text that alone reproduces this configuration."""
        return yaml.safe_dump(self.tree, sort_keys=False, allow_unicode=True)


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Reads a YAML file with its parents, applies `key=value` overrides and checks everything.

    Args:
        path: The YAML file.
        overrides: Entries `section.key=value`; the value is read as YAML.

    Returns:
        The checked configuration.

    Raises:
        UserError: One message with every unknown, missing or ill-typed key, near names, and where each came from.
    """
    origins: dict[str, str] = {}
    tree = read_layers(Path(path), origins, ())
    return build_config(tree, origins, overrides)


def check_early(path: Path, overrides: list[str]) -> None:
    """Finds the mistakes in a configuration that can be told without torch, which takes seconds to load.

    Whether a section of a method, data set or optimizer is right, `load_config` tells.

    Raises:
        UserError: With all that was found.
    """
    origins: dict[str, str] = {}
    tree = apply_overrides(read_layers(path, origins, ()), origins, overrides)
    if "sweep" in tree:
        return
    errors = _wrong_sections(tree, origins)
    for section, schema in (("run", RunConfig), ("evaluate", EvaluateConfig)):
        if isinstance(tree.get(section), dict):
            _validate(schema, tree[section], section, origins, errors)
    for registry, section, key in (
        (MODELS, "model", "name"),
        (DATASETS, "dataset", "type"),
        (RUNNERS, "run", "runner"),
    ):
        name = tree[section].get(key) if isinstance(tree.get(section), dict) else None
        if isinstance(name, str):
            _registered(registry.require_described, name, f"{section}.{key}", origins, errors)
    if errors:
        raise UserError(_joined(errors))


def build_config(tree: Tree, origins: Mapping[str, str] | None = None, overrides: list[str] | None = None) -> Config:
    """Checks a nested dict against the schemas of the sections and of the registered classes that it names.

    Args:
        tree: The sections, as nested dicts.
        origins: Dotted key -> where its value came from, for messages.
        overrides: Entries `section.key=value`, as in `load_config`.

    Raises:
        UserError: As `load_config`.
    """
    origins = dict(origins or {})
    tree = apply_overrides(tree, origins, overrides or [])
    errors = _wrong_sections(tree, origins)
    checked = {
        section: _check_section(section, tree[section], origins, errors)
        for section in SECTIONS
        if isinstance(tree.get(section), dict)
    }
    if errors:
        raise UserError(_joined(errors))
    return Config(tree=tree, origins=origins, **checked)


SectionT = TypeVar("SectionT", bound=Section)


def load_section(
    path: str | Path, name: str, schema: type[SectionT], overrides: list[str], defaults: Path | None = None
) -> SectionT:
    """Reads a YAML file that consists of one section of its own.

    Args:
        path: The YAML file.
        name: The section's name.
        schema: What it must hold.
        overrides: Entries `name.key=value`.
        defaults: A YAML file of what the first one may leave out.

    Returns:
        The checked section.

    Raises:
        UserError: As `load_config`.
    """
    origins: dict[str, str] = {}
    below = {} if defaults is None else read_layers(defaults, origins, ())
    tree = apply_overrides(layered(below, read_layers(Path(path), origins, ())), origins, overrides)
    errors = [f"{key}: unknown section beside {name}{_place(key, origins)}" for key in tree if key != name]
    given, section = tree.get(name, {}), None
    if isinstance(given, dict):
        section = _validate(schema, given, name, origins, errors)
    else:
        errors.append(f"{name}: this section must be a mapping of keys to values{_place(name, origins)}")
    if errors:
        raise UserError(_joined(errors))
    return cast(SectionT, section)


def load_dataset(path: str | Path, overrides: list[str]) -> Any:
    """Reads the `dataset:` section of a YAML file, with or without the other sections.

    Args:
        path: The YAML file, e.g. configs/datasets/coco.yaml.
        overrides: Entries `dataset.key=value`.

    Returns:
        The checked section, of the class that the data set declares.

    Raises:
        UserError: As `load_config`.
    """
    others = [entry for entry in overrides if not entry.startswith("dataset.")]
    if others:
        raise UserError(f"{others[0]!r} on the command line: only dataset.key=value has a meaning here; leave it out")
    origins: dict[str, str] = {}
    tree = apply_overrides(read_layers(Path(path), origins, ()), origins, overrides)
    errors: list[str] = []
    section = _check_section("dataset", tree.get("dataset", {}), origins, errors)
    if errors:
        raise UserError(_joined(errors))
    return section


def dataset_file(name: str, option: str) -> Path:
    """The YAML file of a data set.

    Args:
        name: Name of a file in configs/datasets, or the path of any YAML file with a `dataset:` section.
        option: What stands before the name on the command line, for the message.

    Raises:
        UserError: If it is neither.
    """
    known = sorted(path.stem for path in DATASET_CONFIGS.glob("*.yaml"))
    if name in known:
        return DATASET_CONFIGS / f"{name}.yaml"
    if Path(name).suffix in (".yaml", ".yml"):
        return Path(name)
    raise UserError(
        f"{option}{name}: neither a YAML file nor one of {', '.join(known)}"
        + (near_names(name, known) or "; name one of these")
    )


def check_model(value: Any, place: str) -> Any:
    """The `model:` section that a file other than a YAML holds.

    Args:
        value: The section.
        place: The file, for messages.

    Returns:
        The checked section, of the class that the method declares.

    Raises:
        UserError: As `load_config`.
    """
    errors: list[str] = []
    section = _check_section("model", value, {}, errors)
    if errors:
        raise UserError(f"{place}: {_joined(errors)}")
    return section


def has_section(path: str | Path, name: str) -> bool:
    """Whether a YAML file, or a parent of it, has a section of that name."""
    return name in read_layers(Path(path), {}, ())


def _wrong_sections(tree: Tree, origins: Mapping[str, str]) -> list[str]:
    """One line for every section that is unknown, missing, or no mapping."""
    errors = [
        f"{key}: unknown section{near_names(key, list(SECTIONS))}{_place(key, origins)}"
        for key in tree
        if key not in SECTIONS
    ]
    for section in SECTIONS:
        if not isinstance(tree.get(section), dict):
            missing = "is missing" if section not in tree else "must be a mapping of keys to values"
            errors.append(
                f"{section}: this section {missing}; configs/base.yaml and configs/MITH/config.yaml show its form"
            )
    return errors


def _joined(errors: list[str]) -> str:
    return errors[0] if len(errors) == 1 else "the configuration is not valid:\n  " + "\n  ".join(errors)


def _check_section(section: str, value: Tree, origins: Mapping[str, str], errors: list[str]) -> Any:
    if section == "run":
        run = _validate(RunConfig, value, section, origins, errors)
        if run is not None:
            _registered(RUNNERS.require_described, run.runner, "run.runner", origins, errors)  # loading it takes long
        return run
    if section == "evaluate":
        return _validate(EvaluateConfig, value, section, origins, errors)
    if section == "optim":
        return {
            name: _by_name(OPTIMIZERS.get, entry, "type", f"optim.{name}", origins, errors)
            for name, entry in value.items()
        }
    if section == "model":
        return _by_name(MODELS.get, value, "name", section, origins, errors)
    return _by_name(DATASETS.get, value, "type", section, origins, errors)


def _by_name(
    get: Callable[[str], Any], value: Any, key: str, place: str, origins: Mapping[str, str], errors: list[str]
) -> Any:
    """Validates a section whose schema is the `Config` of the registered class that its `key` names."""
    if not isinstance(value, dict) or not isinstance(value.get(key), str):
        errors.append(f"{place}.{key}: missing; it names the registered class whose settings these are")
        return None
    cls = _registered(get, value[key], f"{place}.{key}", origins, errors)
    if cls is not None and not hasattr(cls, "Config"):
        errors.append(f"{place}.{key}: {value[key]} has no Config, the schema of its settings; give its class one")
        return None
    return _validate(cls.Config, value, place, origins, errors) if cls is not None else None


def _registered(get: Callable[[str], Any], name: str, place: str, origins: Mapping[str, str], errors: list[str]) -> Any:
    try:
        return get(name)
    except UserError as error:
        errors.append(f"{place}: {error}{_place(place, origins)}")
        return None


def _validate(schema: type[Section], value: Tree, place: str, origins: Mapping[str, str], errors: list[str]) -> Any:
    try:
        return schema.model_validate(_found(schema, value, place, origins))
    except ValidationError as error:
        wanted: dict[str, list[str]] = {}  # what a value should be; of a union, every member says so
        given: dict[str, Any] = {}
        for item in error.errors():
            key = f"{place}." + ".".join(str(part) for part in item["loc"] if not _is_union_tag(part, item))
            if item["type"] == "extra_forbidden":
                name = str(item["loc"][-1])
                errors.append(f"{key}: unknown key{near_names(name, list(schema.model_fields))}{_place(key, origins)}")
            elif item["type"] == "missing":
                way_out = "every value stands in YAML, see the config this one derives from"
                errors.append(f"{key}: missing; {way_out}{_place(key, origins)}")
            else:
                text = item["msg"].removeprefix("Value error, ").replace("valid boolean", "boolean, true or false")
                others = wanted.setdefault(key, [])
                others.append(text.removeprefix("Input should be ") if others else text)
                given[key] = item["input"]
        errors += [f"{key}: {' or '.join(w)}, not {given[key]!r}{_place(key, origins)}" for key, w in wanted.items()]
        return None


def _found(schema: type[Section], value: Tree, place: str, origins: Mapping[str, str]) -> Tree:
    """The section with the paths that are read as they are found from the working directory."""
    found = dict(value)
    for key, field in schema.model_fields.items():
        if Mark.READ in marks_of(field):
            origin, given = origins.get(f"{place}.{key}", COMMAND_LINE), found.get(key)
            if isinstance(given, str):
                found[key] = locate(given, origin)
            elif isinstance(given, list):
                found[key] = [locate(path, origin) if isinstance(path, str) else path for path in given]
    return found


def _is_union_tag(part: int | str, item: Mapping[str, Any]) -> bool:
    """Pydantic names the member of a union it tried (`int`, `constrained-str`, `literal[...]`) as if it were a key."""
    return (
        isinstance(part, str)
        and item["loc"][-1] == part
        and bool(re.match(r"^(int|constrained-\w+|literal\[.*|function-after.*)$", part))
    )


def _place(key: str, origins: Mapping[str, str]) -> str:
    """` (file)` that a key, or the nearest key above or below it, came from; empty if unknown."""
    while key:
        for candidate, origin in origins.items():
            if candidate == key or candidate.startswith(key + "."):
                return f" ({origin})"
        key = key.rpartition(".")[0]
    return ""
