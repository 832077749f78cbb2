"""YAML as layers: reading, merging parents and overrides, and where every value came from.

A file names its parents in `base: [..]` (beside the file, or in the repository); sections merge, scalars and lists
replace, and so does a `dataset:` section of another `type`. `key=value` of the command line comes last. What the values
mean stands in `common/config.py`.
"""

import os
import re
import stat
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any, cast

import yaml

from common.errors import UserError
from common.places import COMMAND_LINE, locate

Tree = dict[str, Any]
_LONGEST = 1 << 18  # characters of a YAML file
_MOST_NODES = 100_000  # values of a YAML file, those that aliases repeat counted each time
_DEEPEST = 32  # mappings inside each other


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain scalars (1e-5 is a number, `no` is a word), no key twice, no node inside itself."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.deep_construct = True  # whole nodes at once, so that one that refers to itself is noticed

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in keys:
                raise yaml.MarkedYAMLError(problem=f"key {key!r} stands twice", problem_mark=key_node.start_mark)
            if isinstance(key, Hashable):  # others are refused below
                keys.add(key)
        return cast(dict[Any, Any], super().construct_mapping(node, deep))

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """No merge keys, which copy mappings into each other: a file's parents are what it builds on."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"^(true|false)$", "tf"),
    ("int", r"^[-+]?[0-9]+$", "-+0123456789"),
    ("float", r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$", "-+.0123456789"),
    ("null", r"^(null|~|)$", ["n", "~", ""]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    digits = str(loader.construct_scalar(node))
    if len(digits) > 40 or int(digits).bit_length() > 63:
        shown = digits if len(digits) <= 40 else f"{digits[:10]}... ({len(digits)} characters)"
        raise yaml.MarkedYAMLError(problem=f"{shown} does not fit into 64 bits", problem_mark=node.start_mark)
    return int(digits)  # YAML 1.1 would read 010 as eight


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def read_yaml(text: str, source: str) -> Any:
    """Parses one YAML document.

    Raises:
        UserError: On a syntax error or a key that stands twice, with line and column.
    """
    if len(text) > _LONGEST:
        raise UserError(f"{source}: {len(text)} characters are no configuration; at most {_LONGEST} are read")
    try:
        value = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{source}{where}: not valid YAML: {error.problem or error.context}") from None
    except RecursionError:
        raise UserError(f"{source}: not valid YAML: nested too deeply") from None
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None
    check_values(value, source)
    return value


def check_values(value: Any, source: str) -> None:
    """Refuses values that no setting can have: too many, too deep, or words that no path can hold.

    Args:
        value: Nested mappings and lists; parts may stand in several places, as YAML's aliases make them.
        source: Where they were read, for the message.

    Raises:
        UserError: With the first thing that is wrong.
    """
    sizes: dict[int, int] = {}  # of mappings and lists that were counted: each once, however often it stands

    def size(node: Any, depth: int) -> int:
        if isinstance(node, str) and ("\0" in node or any("\ud800" <= letter <= "\udfff" for letter in node)):
            raise UserError(f"{source}: {node!r} holds a character that no name can have; remove it")
        if not isinstance(node, dict | list):
            return 1
        if depth > _DEEPEST:
            raise UserError(f"{source}: nested more than {_DEEPEST} levels deep; no setting lies so deep")
        if id(node) not in sizes:
            parts = [*node, *node.values()] if isinstance(node, dict) else node
            sizes[id(node)] = 1 + sum(size(part, depth + 1) for part in parts)
        if sizes[id(node)] > _MOST_NODES:
            raise UserError(f"{source}: its aliases (*name) stand for more than {_MOST_NODES} values; write them out")
        return sizes[id(node)]

    size(value, 1)


def read_layers(path: Path, origins: dict[str, str], below: tuple[Path, ...]) -> Tree:
    """The tree of a file merged over its parents; fills `origins`.

    Args:
        path: The file.
        origins: Dotted key -> the file that its value comes from.
        below: The files whose parents are being read, resolved.

    Raises:
        UserError: If a file cannot be read, is not valid, or names itself among its parents.
    """
    if path.resolve() in below:
        raise UserError(f"{path}: its `base:` leads back to itself; remove one of the references")
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
            raise UserError(f"config file {path} is no regular file; name a YAML file")
        with path.open(encoding="utf-8") as file:
            text = file.read(_LONGEST + 1)
    except OSError as error:
        asked_by = (
            f", named in `base:` of {below[-1]}; it may lie beside that file, in the repository or here"
            if below
            else "; --config-file names a YAML file such as configs/MITH/config.yaml"
        )
        raise UserError(f"config file {path} cannot be read ({error.strerror}){asked_by}") from None
    except UnicodeDecodeError:
        raise UserError(f"config file {path} is not UTF-8 text; save it as UTF-8") from None
    tree = read_yaml(text, str(path))
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in _keys(tree)):
        raise UserError(f"{path}: must be a mapping of words to values")
    parents = tree.pop("base", [])
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise UserError(f"{path}: `base` must be a list of paths, e.g. base: [../base.yaml], not {parents!r}")
    merged: Tree = {}
    for parent in parents:
        own: dict[str, str] = {}
        layer = read_layers(_found(parent, path), own, (*below, path.resolve()))
        _replace_other_kind(merged, layer, origins)
        origins.update(own)
        _merge(merged, layer)
    _replace_other_kind(merged, tree, origins)
    for key in _leaves(tree):
        for old in [o for o in origins if key.startswith(o + ".") or o.startswith(key + ".")]:
            del origins[old]
        origins[key] = str(path)
    _merge(merged, tree)
    return merged


def _found(parent: str, path: Path) -> Path:
    """Where a parent of a file lies."""
    beside = Path(os.path.normpath(path.parent / parent))
    return beside if beside.exists() else Path(locate(parent, str(path)))


def _replace_other_kind(merged: Tree, layer: Tree, origins: dict[str, str]) -> None:
    """Removes the data set of the layers below where a file names one of another type: its settings are others."""
    below, above = merged.get("dataset"), layer.get("dataset")
    if (
        isinstance(below, dict)
        and isinstance(above, dict)
        and above.get("type", below.get("type")) != below.get("type")
    ):
        del merged["dataset"]
        for key in [key for key in origins if key.startswith("dataset.")]:
            del origins[key]


def apply_overrides(tree: Tree, origins: dict[str, str], overrides: list[str]) -> Tree:
    """A copy of the tree with `section.key=value` entries in place; fills `origins`.

    Raises:
        UserError: If an entry has not that form.
    """
    merged: Tree = {}
    _merge(merged, tree)
    for entry in overrides:
        key, equals, text = entry.partition("=")
        if not equals or key.count(".") >= _DEEPEST or not re.fullmatch(r"[\w-]+(\.[\w-]+)+", key):
            raise UserError(
                f"{_short(entry)} on the command line: overrides have the form section.key=value, e.g. model.bits=64"
            )
        value = read_yaml(text, f"{_short(entry)} on the command line")
        layer: Tree = {}
        node = layer
        *path, last = key.split(".")
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
        _merge(merged, layer)
        for old in [o for o in origins if o.startswith(key + ".")]:
            del origins[old]
        origins[key] = COMMAND_LINE
    return merged


def _short(entry: str) -> str:
    return repr(entry if len(entry) <= 80 else f"{entry[:77]}...")


def layered(below: Tree, above: Tree) -> Tree:
    """Two trees as one; what is above has the last word."""
    tree: Tree = {}
    for layer in (below, above):
        _merge(tree, layer)
    return tree


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
