"""Registry: one decorator, lazy import, case-blind uniqueness, helpful misses."""

import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.errors import UserError
from common.registry import MODELS, Registry


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A flat package with one good module and one that cannot be imported."""
    folder = tmp_path / "zoo"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "good.py").write_text(
        textwrap.dedent(
            """
            from zoo_registry import ZOO

            @ZOO.register("Lion")
            class Lion: ...
            """
        )
    )
    (folder / "broken.py").write_text("import no_such_package_anywhere\n")
    (tmp_path / "zoo_registry.py").write_text('from common.registry import Registry\nZOO = Registry("animal", "zoo")\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "zoo"
    for name in [name for name in sys.modules if name.split(".")[0] in ("zoo", "zoo_registry")]:
        del sys.modules[name]


def test_first_miss_imports_the_package(package: str) -> None:
    from zoo_registry import ZOO

    assert ZOO.get("Lion").__name__ == "Lion"
    assert ZOO.names() == ["Lion"]


def test_miss_names_near_and_all_names_and_broken_siblings(package: str) -> None:
    from zoo_registry import ZOO

    with pytest.raises(UserError) as error:
        ZOO.get("lino")
    text = str(error.value)
    assert "unknown animal 'lino'" in text and "did you mean 'Lion'" in text
    assert "zoo.broken" in text and "no_such_package_anywhere" in text
    assert "\n" not in text


def test_names_are_unique_and_names_in_paths_are_so_ignoring_case() -> None:
    registry: Registry[type] = Registry("model", "models")
    registry.register("Lion")(int)
    with pytest.raises(UserError, match="'LION' would share the folders of 'Lion'"):
        registry.register("LION")(float)
    with pytest.raises(UserError, match="'Lioness' would share the folders of 'Lion'"):
        registry.register("Lioness", folder="lion")(float)
    with pytest.raises(UserError, match="'Lion' is taken"):
        registry.register("Lion", folder="Lion-2")(float)
    registry.register("LION", folder="LION-2")(float)
    assert (registry.get("Lion"), registry.folder("Lion")) == (int, "Lion")
    assert (registry.get("LION"), registry.folder("LION")) == (float, "LION-2")


@pytest.mark.parametrize("name", ["Lion/Cub", "..", "", "Lion Cub"])
def test_names_can_stand_in_paths(name: str) -> None:
    registry: Registry[type] = Registry("model", "models")
    with pytest.raises(UserError, match="cannot stand in paths"):
        registry.register(name)
    registry.register(name, folder="Lion")(int)
    assert registry.folder(name) == "Lion"


def test_methods_that_differ_in_case_only_are_both_near() -> None:
    with pytest.raises(UserError, match="did you mean 'DNPH' or 'DNpH'"):
        MODELS.get("dnph")


def test_lookup_is_exact_about_case() -> None:
    with pytest.raises(UserError, match="did you mean 'MITH'"):
        MODELS.get("mith")
