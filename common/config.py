"""Configuration: from a YAML file to checked settings, or to one message with all that is wrong.

How YAML files are read and merged stands in `common/yaml_layers.py`, what every section may hold in `common/schemas.py`
and in the `Config` of each method, data set and optimizer. Values live in YAML only; types, meaning and ranges live in
the schemas only.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from pydantic import ValidationError

from common.errors import UserError
from common.places import COMMAND_LINE, ROOT, Mark, locate, marks_of
from common.registry import DATASETS, MODELS, OPTIMIZERS, RUNNERS, Registry, near_names
from common.schema_sources import schema_of
from common.schemas import EvaluateConfig, RunConfig, Section, SweepConfig
from common.yaml_layers import Tree, apply_overrides, layered, read_layers

SECTIONS = ("model", "dataset", "optim", "run", "evaluate")
DATASET_CONFIGS = ROOT / "configs/datasets"
SWEEP_DEFAULTS = ROOT / "configs/sweep_base.yaml"


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


def load_early(path: Path, overrides: list[str]) -> Config | None:
    """`load_config` without torch, which takes seconds to load.

    Returns:
        The checked configuration; None where only a class itself can tell whether it is right, and for a sweep.

    Raises:
        UserError: With all mistakes that can be told.
    """
    if has_section(path, "sweep"):
        sweep, shared = load_sweep(path, overrides)
        load_early(Path(sweep.configs[0]), shared)  # all runs share most of what they are
        return None
    origins: dict[str, str] = {}
    config = build_config(read_layers(path, origins, ()), origins, overrides, _schema_in_source)
    checked = (config.model, config.dataset, *config.optim.values())
    return None if any(section is None for section in checked) else config


def build_config(
    tree: Tree,
    origins: Mapping[str, str] | None = None,
    overrides: list[str] | None = None,
    find: Callable[[Registry[Any], str], Any] | None = None,
) -> Config:
    """Checks a nested dict against the schemas of the sections and of the registered classes that it names.

    Args:
        tree: The sections, as nested dicts.
        origins: Dotted key -> where its value came from, for messages.
        overrides: Entries `section.key=value`, as in `load_config`.
        find: Gives the schema of a registered name; a section without one is None. By default that of its class.

    Raises:
        UserError: As `load_config`.
    """
    origins = dict(origins or {})
    tree = apply_overrides(tree, origins, overrides or [])
    errors = _wrong_sections(tree, origins)
    checked = {
        section: _check_section(section, tree[section], origins, errors, find or _schema_of_class)
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


def load_sweep(path: Path, overrides: list[str]) -> tuple[SweepConfig, list[str]]:
    """Reads the YAML file of a sweep.

    Args:
        path: The YAML file.
        overrides: Entries `sweep.key=value` for the sweep, all others for every run.

    Returns:
        The `sweep:` section, and the entries for every run.

    Raises:
        UserError: As `load_config`.
    """
    own = [entry for entry in overrides if entry.startswith("sweep.")]
    sweep = load_section(path, "sweep", SweepConfig, own, defaults=SWEEP_DEFAULTS)
    return sweep, [entry for entry in overrides if entry not in own]


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


def _schema_of_class(registry: Registry[Any], name: str) -> Any:
    """The schema of a registered class's settings.

    Raises:
        UserError: If there is no such class, or it has none.
    """
    schema = getattr(registry.get(name), "Config", None)
    if schema is None:
        raise UserError(f"{name} has no Config, the schema of its settings; give its class one")
    if not (isinstance(schema, type) and issubclass(schema, Section) and {"name", "type"} & schema.model_fields.keys()):
        raise UserError(
            f"the Config of {name} is no schema of a {registry.kind}; derive it from ModelConfig, ClipModelConfig, "
            "DatasetConfig or OptimizerConfig"
        )
    return schema


def _schema_in_source(registry: Registry[Any], name: str) -> Any:
    """`_schema_of_class` without importing the class; None where only that tells.

    Raises:
        UserError: If there is no such class.
    """
    return schema_of(*registry.source(name))


def _check_section(
    section: str,
    value: Tree,
    origins: Mapping[str, str],
    errors: list[str],
    find: Callable[[Registry[Any], str], Any] = _schema_of_class,
) -> Any:
    if section == "run":
        run = _validate(RunConfig, value, section, origins, errors)
        if run is not None:
            _found_for(RUNNERS.source, run.runner, "run.runner", origins, errors)  # loading it takes long
        return run
    if section == "evaluate":
        return _validate(EvaluateConfig, value, section, origins, errors)
    if section == "optim":
        find_optimizer = partial(find, OPTIMIZERS)
        return {
            name: _by_name(find_optimizer, entry, "type", f"optim.{name}", origins, errors)
            for name, entry in value.items()
        }
    if section == "model":
        return _by_name(partial(find, MODELS), value, "name", section, origins, errors)
    return _by_name(partial(find, DATASETS), value, "type", section, origins, errors)


def _by_name(
    find: Callable[[str], Any], value: Any, key: str, place: str, origins: Mapping[str, str], errors: list[str]
) -> Any:
    """Validates a section by the schema that is found for the registered class that its `key` names."""
    if not isinstance(value, dict) or not isinstance(value.get(key), str):
        errors.append(f"{place}.{key}: missing; it names the registered class whose settings these are")
        return None
    schema = _found_for(find, value[key], f"{place}.{key}", origins, errors)
    return _validate(schema, value, place, origins, errors) if schema is not None else None


def _found_for(find: Callable[[str], Any], name: str, place: str, origins: Mapping[str, str], errors: list[str]) -> Any:
    try:
        return find(name)
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
                text = text.replace("a valid dictionary", "a mapping of names to values")
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
