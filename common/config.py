"""Configuration: YAML layers -> overrides -> strict schemas, with the origin of every value.

A file names its parents in `base: [..]` (paths relative to the file); sections merge, scalars and lists replace;
`key=value` of the command line comes last. Values live in YAML only; types, meaning and ranges live in the schemas
only.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from common.errors import UserError
from common.registry import DATASETS, MODELS, OPTIMIZERS, RUNNERS, near_names

SECTIONS = ("model", "dataset", "optim", "run", "evaluate")
Tree = dict[str, Any]

# Keys that change where or how fast a run computes, but not what: they may differ when a run goes on.
FREE_KEYS = frozenset(
    f"run.{key}"
    for key in ("save_dir", "cache_dir", "device", "distribute", "workers", "checkpoint_every", "keep_checkpoints")
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


class RunConfig(Section):
    """`run:` section. `configs/base.yaml` is the commented reference page of its values."""

    runner: str  # registered name of the loop
    save_dir: str  # folder of the run; {model}, {dataset}, {bits} and {seed} are filled in
    cache_dir: str  # downloaded weights, trained backbones, hash centres: costly to make, safe to delete
    # auto, cpu, cpu:2 (two processes), cuda, or GPU numbers
    device: Annotated[
        str,
        BeforeValidator(lambda value: str(value) if type(value) is int else value),  # `device: 0` is a number in YAML
        _of_form(r"auto|cpu(:[1-9]\d*)?|cuda|\d+(,\d+)*", "auto, cpu, cuda, GPU numbers such as 0,1, or cpu:2"),
    ]
    distribute: bool  # one process per device of `device`
    seed: int = Field(ge=0, lt=2**32)  # weights, order, augmentation, dropout (the split has its own seed)
    epochs: int = Field(gt=0)
    batch_size: int = Field(gt=0)  # pairs of the global batch, over all processes
    accumulate: int = Field(gt=0)  # parts in which CLIP computes a batch, to save memory
    precision: Literal["float32", "bf16"]  # bf16: autocast; codes and losses stay float32
    compile: bool  # torch.compile
    loader: Literal["memory", "workers"]  # pictures held as uint8 on the device, or read by worker processes
    workers: int = Field(ge=0)  # worker processes of the loader `workers`
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
        try:
            return Path(self.run.save_dir.format(**names))
        except (LookupError, ValueError, AttributeError, TypeError):
            known = ", ".join("{" + name + "}" for name in names)
            raise UserError(f"run.save_dir: {self.run.save_dir!r} may hold no placeholder but {known}") from None

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
    tree = _read_layers(Path(path), origins, ())
    return build_config(tree, origins, overrides)


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
    tree = _apply_overrides(tree, origins, overrides or [])
    errors: list[str] = [
        f"{key}: unknown section{near_names(key, list(SECTIONS))}{_place(key, origins)}"
        for key in tree
        if key not in SECTIONS
    ]
    checked: dict[str, Any] = {}
    for section in SECTIONS:
        value = tree.get(section)
        if not isinstance(value, dict):
            missing = "is missing" if section not in tree else "must be a mapping of keys to values"
            errors.append(
                f"{section}: this section {missing}; configs/base.yaml and configs/MITH/config.yaml show its form"
            )
            continue
        checked[section] = _check_section(section, value, origins, errors)
    if errors:
        raise UserError(_joined(errors))
    return Config(tree=tree, origins=origins, **checked)


SectionT = TypeVar("SectionT", bound=Section)


def load_section(path: str | Path, name: str, schema: type[SectionT], overrides: list[str]) -> SectionT:
    """Reads a YAML file that consists of one section of its own.

    Args:
        path: The YAML file.
        name: The section's name.
        schema: What it must hold.
        overrides: Entries `name.key=value`.

    Returns:
        The checked section.

    Raises:
        UserError: As `load_config`.
    """
    origins: dict[str, str] = {}
    tree = _apply_overrides(_read_layers(Path(path), origins, ()), origins, overrides)
    errors = [f"{key}: unknown section beside {name}{_place(key, origins)}" for key in tree if key != name]
    section = _validate(schema, tree.get(name, {}), name, origins, errors)
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
    tree = _apply_overrides(_read_layers(Path(path), origins, ()), origins, overrides)
    errors: list[str] = []
    section = _check_section("dataset", tree.get("dataset", {}), origins, errors)
    if errors:
        raise UserError(_joined(errors))
    return section


def has_section(path: str | Path, name: str) -> bool:
    """Whether a YAML file, or a parent of it, has a section of that name."""
    return name in _read_layers(Path(path), {}, ())


def _joined(errors: list[str]) -> str:
    return errors[0] if len(errors) == 1 else "the configuration is not valid:\n  " + "\n  ".join(errors)


def _check_section(section: str, value: Tree, origins: Mapping[str, str], errors: list[str]) -> Any:
    if section == "run":
        run = _validate(RunConfig, value, section, origins, errors)
        if run is not None:
            _registered(RUNNERS.get, run.runner, "run.runner", origins, errors)
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
    return _validate(cls.Config, value, place, origins, errors) if cls is not None else None


def _registered(get: Callable[[str], Any], name: str, place: str, origins: Mapping[str, str], errors: list[str]) -> Any:
    try:
        return get(name)
    except UserError as error:
        errors.append(f"{place}: {error}{_place(place, origins)}")
        return None


def _validate(schema: type[Section], value: Tree, place: str, origins: Mapping[str, str], errors: list[str]) -> Any:
    try:
        return schema.model_validate(value)
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


# ---------------------------------------------------------------------------------------------- YAML layers


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain scalars (1e-5 is a number, `no` is a word), no key twice, no node inside itself."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.deep_construct = True  # whole nodes at once, so that one that refers to itself is noticed

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for number, key in enumerate(keys):
            if key in keys[:number]:
                mark = node.value[number][0].start_mark
                raise yaml.MarkedYAMLError(problem=f"key {key!r} stands twice", problem_mark=mark)
        return cast(dict[Any, Any], super().construct_mapping(node, deep))


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"^(true|false)$", "tf"),
    ("int", r"^[-+]?[0-9]+$", "-+0123456789"),
    ("float", r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$", "-+.0123456789"),
    ("null", r"^(null|~|)$", ["n", "~", ""]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    value = int(loader.construct_scalar(node))  # YAML 1.1 would read 010 as eight
    if value.bit_length() > 63:
        raise yaml.MarkedYAMLError(problem=f"{value} does not fit into 64 bits", problem_mark=node.start_mark)
    return value


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def read_yaml(text: str, source: str) -> Any:
    """Parses one YAML document.

    Raises:
        UserError: On a syntax error or a key that stands twice, with line and column.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{source}{where}: not valid YAML: {error.problem or error.context}") from None
    except RecursionError:
        raise UserError(f"{source}: not valid YAML: nested too deeply") from None
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None


def _read_layers(path: Path, origins: dict[str, str], below: tuple[Path, ...]) -> Tree:
    """The tree of a file merged over its parents; fills `origins`."""
    if path.resolve() in below:
        raise UserError(f"{path}: its `base:` leads back to itself; remove one of the references")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        asked_by = (
            f", named in `base:` of {below[-1]}"
            if below
            else "; --config-file names a YAML file such as configs/MITH/config.yaml"
        )
        raise UserError(f"config file {path} cannot be read ({error.strerror}){asked_by}") from None
    except UnicodeDecodeError:
        raise UserError(f"config file {path} is not UTF-8 text; save it as UTF-8") from None
    tree = read_yaml(text, str(path))
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in _keys(tree)):
        raise UserError(f"{path}: must be a mapping of words to values, with the sections {', '.join(SECTIONS)}")
    parents = tree.pop("base", [])
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise UserError(f"{path}: `base` must be a list of paths, e.g. base: [../base.yaml], not {parents!r}")
    merged: Tree = {}
    for parent in parents:
        _merge(merged, _read_layers(Path(os.path.normpath(path.parent / parent)), origins, (*below, path.resolve())))
    for key in _leaves(tree):
        for old in [o for o in origins if key.startswith(o + ".") or o.startswith(key + ".")]:
            del origins[old]
        origins[key] = str(path)
    _merge(merged, tree)
    return merged


def _apply_overrides(tree: Tree, origins: dict[str, str], overrides: list[str]) -> Tree:
    merged: Tree = {}
    _merge(merged, tree)
    for entry in overrides:
        key, equals, text = entry.partition("=")
        if not equals or not re.fullmatch(r"[\w-]+(\.[\w-]+)+", key):
            raise UserError(
                f"{entry!r} on the command line: overrides have the form section.key=value, e.g. model.bits=64"
            )
        value = read_yaml(text, f"{entry!r} on the command line")
        layer: Tree = {}
        node = layer
        *path, last = key.split(".")
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
        _merge(merged, layer)
        for old in [o for o in origins if o.startswith(key + ".")]:
            del origins[old]
        origins[key] = "command line"
    return merged


def _merge(into: Tree, layer: Tree) -> None:
    """Merges `layer` over `into`: mappings merge, everything else replaces. `layer` is not aliased."""
    for key, value in layer.items():
        if isinstance(value, dict):
            if not isinstance(into.get(key), dict):
                into[key] = {}
            _merge(into[key], value)
        else:
            into[key] = list(value) if isinstance(value, list) else value


def _keys(tree: Tree) -> Iterator[Any]:
    for key, value in tree.items():
        yield key
        if isinstance(value, dict):
            yield from _keys(value)


def _leaves(tree: Tree, prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def flatten(tree: Tree) -> dict[str, Any]:
    """Nested dict -> `{"section.key": value}`, in order."""
    flat: dict[str, Any] = {}
    for key in _leaves(tree):
        node: Any = tree
        for part in key.split("."):
            node = node[part]
        flat[key] = node
    return flat
