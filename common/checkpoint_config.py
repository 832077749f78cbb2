"""The configuration that a checkpoint holds, without the machine on which it was made."""

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import get_origin

from common.config import DATASET_CONFIGS, Config, build_config
from common.errors import UserError
from common.places import CHECKPOINT, ROOT, Mark, locate, marks_of
from common.registry import DATASETS
from common.schemas import EvaluateConfig, RunConfig, Section
from common.yaml_layers import Tree, apply_overrides, check_values, flatten, read_layers

logger = logging.getLogger(__name__)
BASE = ROOT / "configs/base.yaml"


def checkpoint_config(
    tree: Tree, path: Path, overrides: list[str], elsewhere: str = "give the run's configuration with --config-file"
) -> Config:
    """The configuration that a checkpoint of this library holds, without what belongs to the machine it was made on.

    Results go beside the checkpoint. Devices, folders and processes are those of `configs/base.yaml`, the places of a
    known data set those of its YAML, unless the command line says otherwise. Only where data are read a path of the
    checkpoint may serve, if it is there; nothing is written or made where a checkpoint says.

    Args:
        tree: The stored configuration.
        path: The checkpoint.
        overrides: Entries `section.key=value`.
        elsewhere: What else the user can do where a place is not known, for the message.

    Raises:
        UserError: As `load_config`; if a place of the data is neither known nor given.
    """
    check_values(tree, f"checkpoint {path}")
    origins = dict.fromkeys(flatten(tree), CHECKPOINT)
    own = with_younger_settings(tree, origins)
    _take_places(own, "run", RunConfig, BASE, origins)
    _take_places(own, "evaluate", EvaluateConfig, BASE, origins)
    beside = str(path.resolve().parent).replace("{", "{{").replace("}", "}}")
    own["run"]["save_dir"], origins["run.save_dir"] = beside, "beside the checkpoint"
    kind, name = own["dataset"].get("type"), own["dataset"].get("name")
    if isinstance(kind, str) and isinstance(name, str):
        _take_places(own, "dataset", DATASETS.get(kind).Config, _yaml_of_data(name), origins)
    own = apply_overrides(own, origins, overrides)
    for key, value in flatten(own).items():
        if value is _NOT_TAKEN:
            raise UserError(
                f"{key} is a place on the machine on which {path} was made, so it is not taken from there; name it "
                f"with {key}=..., or {elsewhere}"
            )
    config = build_config(own, origins)
    places = {f"{section}.{key}" for section in ("run", "dataset") for key in _places(getattr(config, section))}
    said = [f"{key}={value} ({origins[key]})" for key, value in flatten(own).items() if key in places]
    logger.info("settings of %s, with these places and processes: %s", path, ", ".join(said))
    return config


def stored_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a run from the `config.yaml` in its folder, of this version or an earlier one.

    Args:
        path: The file.
        overrides: Entries `section.key=value`.

    Raises:
        UserError: As `load_config`.
    """
    origins: dict[str, str] = {}
    tree = with_younger_settings(read_layers(path, origins, ()), origins)
    return build_config(tree, origins, list(overrides))


def with_younger_settings(tree: Tree, origins: dict[str, str] | None = None) -> Tree:
    """A stored configuration with the settings that later versions added.

    They get the values of the YAML files of the library, which do what versions without these settings did.

    Args:
        tree: The stored configuration; it stays as it is.
        origins: Where values came from, by dotted key; what is added is noted there.

    Returns:
        The configuration; its sections `run`, `evaluate` and `dataset` are there.
    """
    origins = {} if origins is None else origins
    own = apply_overrides(tree, origins, [])
    for section in ("run", "evaluate", "dataset"):
        own[section] = own[section] if isinstance(own.get(section), dict) else {}
    _add_younger(own, "run", RunConfig, BASE, origins)
    _add_younger(own, "evaluate", EvaluateConfig, BASE, origins)
    data = own["dataset"]
    if isinstance(data.get("type"), str) and isinstance(data.get("name"), str):
        _add_younger(own, "dataset", DATASETS.get(data["type"]).Config, _yaml_of_data(data["name"]), origins)
    if isinstance(data.get("split"), dict):
        data["split"].setdefault("validation", 0)
    data.setdefault("tokens", 49408)
    return own


def _add_younger(tree: Tree, section: str, schema: type[Section], file: Path, origins: dict[str, str]) -> None:
    given = _section_of(file, section)
    for key, field in schema.model_fields.items():
        if key not in tree[section] and (key in given or get_origin(field.annotation) is list):
            tree[section][key] = given.get(key, [])
            origins[f"{section}.{key}"] = str(file)


def _yaml_of_data(name: str) -> Path:
    """Where the YAML of a known data set lies, if it is one."""
    return DATASET_CONFIGS / f"{re.sub(r'[^A-Za-z0-9_-]', '', name)}.yaml"


def _section_of(file: Path, section: str) -> Tree:
    found: Tree = read_layers(file, {}, ()).get(section, {}) if file.is_file() else {}
    return found


_NOT_TAKEN = "\0 of another machine"  # no setting can have this value


def _take_places(tree: Tree, section: str, schema: type[Section], file: Path, origins: dict[str, str]) -> None:
    """Replaces what belongs to the machine by the values of a YAML file; null stays null.

    A path that is only read stays, too, where it leads to something and that of the YAML file does not.
    """
    given = _section_of(file, section)
    for key, field in schema.model_fields.items():
        stored, marks = tree[section].get(key), marks_of(field)
        if Mark.OF_MACHINE not in marks or stored is None:
            continue
        here = given.get(key)
        there = isinstance(here, str) and Path(locate(here, str(file))).exists()
        if Mark.READ in marks and not there and isinstance(stored, str) and Path(stored).exists():
            continue
        tree[section][key] = here if key in given or Mark.READ not in marks else _NOT_TAKEN
        origins[f"{section}.{key}"] = str(file)
    for key, value in tree[section].items():
        for name in value if isinstance(value, list) else []:
            if isinstance(name, str) and (Path(name).is_absolute() or ".." in Path(name).parts):
                raise UserError(f"{section}.{key} of a checkpoint names {name!r}, which may lie anywhere; refused")


def _places(section: Section) -> list[str]:
    """The settings of a section that belong to the machine and are not null."""
    fields = type(section).model_fields.items()
    return [key for key, field in fields if Mark.OF_MACHINE in marks_of(field) and getattr(section, key) is not None]
