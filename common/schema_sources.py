"""Schemas of settings from source code alone, so that mistakes in a configuration do not wait for torch.

The settings of a method, data set or optimizer stand in its file, beside a class that needs torch, which takes seconds
to load. The statements that define them need only pydantic: they are executed on their own, with all that they name.
"""

import ast
import importlib
import sys
from functools import cache
from typing import Any, cast

from common.places import ROOT
from common.schemas import Section

_QUICK = sys.stdlib_module_names | {"pydantic"}  # packages that load in no time


def schema_of(module: str, name: str) -> type[Section] | None:
    """The `Config` of a class, made without importing its module.

    Args:
        module: One of the library's modules.
        name: A class at the top of it.

    Returns:
        The schema; None if only importing the module tells it, or why there is none.
    """
    try:
        return cast(type[Section], _namespace(module).config_of(name))
    except Exception:  # a broken file, say: importing it will say what is wrong, in better words
        return None


@cache
def _namespace(module: str) -> "_Namespace":
    return _Namespace(module)


class _Namespace:
    """What the names at the top of a module stand for, each defined when it is first asked for.

    Args:
        module: One of the library's modules; not a package.
    """

    def __init__(self, module: str) -> None:
        self.values: dict[str, Any] = {"__name__": module}
        self.statements: dict[str, ast.stmt] = {}
        for statement in ast.parse(ROOT.joinpath(*module.split(".")).with_suffix(".py").read_bytes()).body:
            self.statements |= dict.fromkeys(_names_bound_by(statement), statement)

    def config_of(self, name: str) -> Any:
        """What `Config` stands for in the body of a class, else of its first base, and so on."""
        statement = self.statements[name]
        if isinstance(statement, ast.ImportFrom):
            return _namespace(cast(str, statement.module)).config_of(_original(statement, name))
        if not isinstance(statement, ast.ClassDef):
            raise TypeError(f"{name} is no class")
        for inner in statement.body:
            if "Config" in _names_bound_by(inner):
                self._execute(inner)
                return self.values.pop("Config")
        return self.config_of(ast.unparse(statement.bases[0]))

    def value(self, name: str) -> Any:
        """What a name stands for.

        Raises:
            ImportError: If something has to be imported for it that takes long.
        """
        if name not in self.values:
            statement = self.statements[name]
            if isinstance(statement, ast.ImportFrom):
                self.values[name] = _imported(cast(str, statement.module), _original(statement, name))
            else:
                self._execute(statement)
        return self.values[name]

    def _execute(self, statement: ast.stmt) -> None:
        for node in ast.walk(statement):
            if isinstance(node, ast.Import) and not {alias.name.split(".")[0] for alias in node.names} <= _QUICK:
                raise ImportError(ast.unparse(node))
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                if self.statements.get(node.id, statement) is not statement:
                    self.value(node.id)
        exec(compile(ast.Module([statement], []), f"<{self.values['__name__']}>", "exec"), self.values)


def _imported(module: str, name: str) -> Any:
    if module in sys.modules or module.split(".")[0] in _QUICK:
        return getattr(importlib.import_module(module), name)
    return _namespace(module).value(name)  # another package has no such file among ours


def _original(statement: ast.ImportFrom, name: str) -> str:
    """The name in its own module of what is called `name` after an import."""
    return next(alias.name for alias in statement.names if name in (alias.asname, alias.name))


def _names_bound_by(statement: ast.stmt) -> list[str]:
    if isinstance(statement, ast.ClassDef | ast.FunctionDef):
        return [statement.name]
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return [alias.asname or alias.name for alias in statement.names]
    if not isinstance(statement, ast.Assign | ast.AnnAssign):
        return []
    targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
    return [node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)]
