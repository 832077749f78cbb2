"""Names in a config -> classes.

A decorator is the one registration:

    @MODELS.register("MITH")
    class MITH(HashingModel): ...

A module of the registry's flat package is imported when its name is first asked for, so a new method is one new file
and no edited one.
"""

import ast
import difflib
import importlib
import pkgutil
import re
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from common.errors import UserError

T = TypeVar("T")


def near_names(name: str, known: list[str]) -> str:
    """`; did you mean 'a' or 'b'?` for names of `known` close to `name`, case ignored; empty if none is close."""
    folded: dict[str, list[str]] = {}
    for candidate in known:
        folded.setdefault(candidate.casefold(), []).append(candidate)
    matches = difflib.get_close_matches(name.casefold(), list(folded), n=2, cutoff=0.6)
    near = [candidate for match in matches for candidate in folded[match]]
    return f"; did you mean {' or '.join(repr(match) for match in near)}?" if near else ""


class _Source(NamedTuple):
    """Where a name is registered: module, class, and the first line of the class's documentation."""

    module: str
    name: str
    doc: str


class Registry(Generic[T]):
    """Classes of one kind by name, and the name that each has in paths.

    DNPH and DNpH are two different methods, so case tells names apart. Some file systems do not see it, so names in
    paths are unique ignoring case.

    Args:
        kind: What the names stand for, for messages: "model", "runner", ...
        package: Flat package whose modules register such classes.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self.package = package
        self._classes: dict[str, T] = {}
        self._folders: dict[str, str] = {}  # name -> its name in paths
        self._failed: dict[str, str] = {}  # module -> why it could not be imported
        self._scanned = False

    def register(self, name: str, folder: str | None = None) -> Callable[[T], T]:
        """Decorator that registers a class.

        Args:
            name: In configs.
            folder: In paths; needed where another name differs from `name` in case only. None: `name`.

        Raises:
            UserError: If the name is taken, or the name in paths, also if that differs in case only, or if paths cannot
                have it.
        """
        if not isinstance(name, str):  # @MODELS.register without a name would register nothing
            raise UserError(f'a {self.kind} is registered under a name: write .register("MyName")')
        in_paths = name if folder is None else folder
        if not re.fullmatch(r"[\w+-][\w.+-]*", in_paths):
            raise UserError(
                f"{self.kind} name {in_paths!r} cannot stand in paths; take letters, digits, '-', '_', '+' and '.', or "
                "register it with a folder of its own"
            )

        def decorate(cls: T) -> T:
            if not getattr(cls, "__module__", "").startswith(f"{self.package}."):
                self._scan()  # a name from outside must not take one of the library's
            for taken, other in self._classes.items():
                place = getattr(other, "__module__", "?")
                if taken == name:
                    raise UserError(f"{self.kind} name {name!r} is taken by {place}; choose another name")
                if self._folders[taken].casefold() == in_paths.casefold():
                    raise UserError(
                        f"{self.kind} {name!r} would share the folders of {taken!r} of {place}, since some file "
                        "systems do not see case; choose another name, or register it with a folder of its own"
                    )
            self._classes[name], self._folders[name] = cls, in_paths
            return cls

        return decorate

    def get(self, name: str) -> T:
        """The class registered under `name`.

        Raises:
            UserError: If there is none; lists near names, all names, and modules that could not be imported.
        """
        if name not in self._classes and name in self._sources:
            self._import(self._sources[name].module)  # alone: the others may need packages that load for seconds
        if name not in self._classes:
            self._scan()
        if name not in self._classes:
            failed = "".join(f"; {module} could not be imported: {why}" for module, why in self._failed.items())
            raise self._unknown(name, self.names(), failed)
        return self._classes[name]

    def folder(self, name: str) -> str:
        """What the class registered under `name` is called in paths.

        Raises:
            UserError: As `get`.
        """
        self.get(name)
        return self._folders[name]

    def names(self) -> list[str]:
        """All registered names, sorted; imports the package."""
        self._scan()
        return sorted(self._classes, key=lambda name: (name.casefold(), name))

    def described(self) -> dict[str, str]:
        """Every registered name with the first line of its documentation, sorted; nothing is imported."""
        found = {name: source.doc for name, source in self._sources.items()}
        found |= {name: (getattr(cls, "__doc__", None) or "").split("\n")[0] for name, cls in self._classes.items()}
        return dict(sorted(found.items(), key=lambda item: (item[0].casefold(), item[0])))

    def source(self, name: str) -> tuple[str, str]:
        """Module and class that `described` has a name from, without importing anything.

        Raises:
            UserError: As `get`.
        """
        known = self.described()
        if name not in known:
            raise self._unknown(name, list(known))
        if name in self._sources:
            return self._sources[name][:2]
        cls: Any = self._classes[name]
        return cls.__module__, cls.__name__

    def _unknown(self, name: str, known: list[str], failed: str = "") -> UserError:
        near = near_names(name, known)
        return UserError(
            f"unknown {self.kind} {name!r}{near or ';'} {'R' if near else 'r'}egistered: {', '.join(known)}{failed}; "
            "one of your own is there once its file is imported (--import FILE)"
        )

    @cached_property
    def _sources(self) -> dict[str, "_Source"]:
        """Name -> where the package registers it.

        Read from the source, since a list of names should not wait for torch: a decorator with a literal name, such as
        `@MODELS.register("MITH")`, is the registration.
        """
        found: dict[str, _Source] = {}
        for path in sorted(Path(__file__).parent.parent.joinpath(*self.package.split(".")).glob("*.py")):
            module = f"{self.package}.{path.stem}"
            try:
                body = ast.parse(path.read_bytes()).body
            except (SyntaxError, ValueError) as error:  # one broken sibling must not hide the others
                self._failed[module] = f"{type(error).__name__}: {error}"
                continue
            for node in body:
                if not isinstance(node, ast.ClassDef):
                    continue
                for call in node.decorator_list:
                    if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.args:
                        name = call.args[0]
                        ours = call.func.attr == "register" and globals().get(ast.unparse(call.func.value)) is self
                        if ours and isinstance(name, ast.Constant):
                            doc = (ast.get_docstring(node) or "").split("\n")[0]
                            found[str(name.value)] = _Source(module, node.name, doc)
        return found

    @property
    def failed(self) -> dict[str, str]:
        """Modules of the package that could not be imported, and why."""
        return dict(self._failed)

    def _scan(self) -> None:
        if self._scanned:
            return
        self._scanned = True
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__, f"{self.package}."):
            self._import(module.name)

    def _import(self, module: str) -> None:
        """Imports a module of the package; remembers why it could not be, since it must not hide its siblings."""
        try:
            importlib.import_module(module)
        except UserError:
            raise
        except Exception as error:
            self._failed[module] = f"{type(error).__name__}: {error}"


MODELS: Registry[Any] = Registry("model", "models")
RUNNERS: Registry[Any] = Registry("runner", "runners")
DATASETS: Registry[Any] = Registry("dataset", "dataset")
OPTIMIZERS: Registry[Any] = Registry("optimizer", "common.optimizers")
INDEXES: Registry[Any] = Registry("index engine", "runners.search.engines")
