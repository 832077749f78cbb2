"""Rules of the house that a machine can check: who imports whom, what is documented, what no code may contain."""

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.registry import MODELS
from runners.runner import Runner

ROOT = Path(__file__).parent.parent
PACKAGES = ("common", "dataset", "models", "runners", "utils", "data")
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
METHOD_FILES = {Path(inspect.getfile(MODELS.get(name))).stem for name in MODELS.names()}
FORBIDDEN = {  # package -> packages that it must not import
    "common": {"models", "runners", "dataset", "data"},
    "utils": {"models", "runners", "dataset", "data"},
    "models": {"runners", "dataset", "data"},
    "dataset": {"models", "runners"},
    "data": {"runners"},
}


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    for module in imported(ast.parse(path.read_text())):
        assert module.split(".")[0] not in FORBIDDEN.get(package, set()), module
        if package == "models" and path.stem in METHOD_FILES and module.startswith("models."):
            assert module.split(".")[1] not in METHOD_FILES, f"a method imports the method {module}"


def public_functions(tree: ast.Module | ast.ClassDef) -> Iterator[ast.FunctionDef]:
    """Functions and methods whose own name and whose class's name are public."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            if isinstance(node, ast.ClassDef):
                yield from public_functions(node)
            else:
                yield node


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_shapes_are_documented(path: Path) -> None:
    """Every public function that takes or returns tensors says their shapes in brackets, or that they are scalars."""
    for node in public_functions(ast.parse(path.read_text())):
        annotations = [argument.annotation for argument in node.args.args] + [node.returns]
        texts = [ast.unparse(annotation) for annotation in annotations if annotation is not None]
        if any(text in ("Tensor", "Tensor | None") or text.startswith("tuple[Tensor") for text in texts):
            doc = ast.get_docstring(node) or ""
            assert "[" in doc or "calar" in doc or "As `" in doc, f"{path}:{node.lineno} {node.name}"


@pytest.mark.parametrize("path", [*FILES, ROOT / "main.py"], ids=lambda path: str(path.relative_to(ROOT)))
def test_no_asserts_no_config_defaults_no_unsafe_loading(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        assert not isinstance(node, ast.Assert), f"{path}:{node.lineno} assert"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            receiver = ast.unparse(node.func.value)
            assert not (node.func.attr == "get" and receiver.endswith(("config", "cfg"))), f"{path}:{node.lineno}"
            if receiver == "torch" and node.func.attr == "load":
                assert "weights_only=True" in ast.unparse(node), f"{path}:{node.lineno}"
            if receiver in ("np", "numpy") and node.func.attr == "load":
                assert "allow_pickle=False" in ast.unparse(node), f"{path}:{node.lineno}"
            assert receiver != "pickle" or node.func.attr not in ("load", "loads"), f"{path}:{node.lineno}"


def test_the_loop_stays_readable() -> None:
    assert len(Path(inspect.getfile(Runner)).read_text().splitlines()) <= 250
    assert len(inspect.getsource(Runner.train_epoch).splitlines()) <= 25
