"""The pages name only what is there: files, options of commands, configuration keys, names of the code."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.schemas import FREE_KEYS
from common.yaml_layers import flatten, read_yaml
from main import parse_arguments

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"), *ROOT.glob("[a-z]*/README.md")]
)
HOUSE = ("common", "configs", "data", "dataset", "models", "runners", "tests", "utils", "benchmarks")
SOURCES = {
    path: path.read_text(encoding="utf-8")
    for path in [ROOT / "main.py", *(path for name in HOUSE for path in (ROOT / name).rglob("*.py"))]
}
TEXT = "\n".join(SOURCES.values())
YAML = {path: path.read_text(encoding="utf-8") for path in sorted((ROOT / "configs").rglob("*.yaml"))}
SECTIONS = ("model", "dataset", "optim", "run", "evaluate", "sweep", "search")
INVENTED = ("my_method", "MyMethod", "/downloads", "/shared", "/data/", "/fast")  # of examples
WRITTEN = ("result/", "cache/", "data/openmoji", "checkpoints/", "tensorboard/", "log.jsonl")  # appear when run


def code_of(page: Path) -> Iterator[str]:
    """What a page marks as code: indented and fenced lines, and words in backticks."""
    text = page.read_text(encoding="utf-8")
    for fence in re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S):
        yield from fence.replace("\\\n", " ").splitlines()
    rest = re.sub(r"^```\w*\n.*?^```", "", text, flags=re.M | re.S)
    yield from re.findall(r"^    (\S.*)$", rest.replace("\\\n", " "), re.M)
    yield from re.findall(r"`([^`\n]+)`", rest)


def options_of(script: str) -> set[str]:
    """Options that a script of the repository defines, itself or by what the preparation scripts share."""
    shared = [text for path, text in SOURCES.items() if path.parent.name == "data"]
    return set(re.findall(r'"(--[\w-]+)"', "\n".join([SOURCES[ROOT / script], *shared])))


FOLDERS = "|".join((*HOUSE, "docs"))
FILE = rf"[\w<>{{}},*./-]+\.(?:py|md|yaml|txt|sh|toml)\b|\b(?:{FOLDERS})/[\w<>{{}},*./-]+"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_exist(page: Path) -> None:
    for code in code_of(page):
        for name in re.findall(FILE, code):
            if any(part in name for part in (*INVENTED, *WRITTEN)) or re.search(r"[<>{},*]", name):
                continue
            places = (ROOT, page.parent, *(path for path in ROOT.iterdir() if path.is_dir()))
            known = any((place / name.rstrip("/.")).exists() for place in places) or f'"{name}"' in TEXT
            assert known or Path(name).name in TEXT, f"{page.name}: {name} in {code!r}"
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_options_exist(page: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        shown: list[str] = []
        patch.setattr("utils.arguments.say", shown.append)
        with pytest.raises(SystemExit):
            parse_arguments(["--help"])
    own = set(re.findall(r"--[\w-]+", shown[0]))
    for code in code_of(page):
        for script, rest in re.findall(r"((?:\w+/)?\w+\.py|-m benchmarks\.\w+)((?: [^#|]*)?)", code):
            script = script.replace("-m benchmarks.", "benchmarks/") + ("" if script.endswith(".py") else ".py")
            if ROOT / script in SOURCES:
                allowed = own if script == "main.py" else options_of(script)
                assert set(re.findall(r"(?<=\s)--[\w-]+", rest)) <= allowed, f"{page.name}: {code!r}"
        if re.fullmatch(r"--[\w-]+", code):
            assert f'"{code}"' in TEXT or code in own, f"{page.name}: {code}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_configuration_keys_exist(page: Path) -> None:
    trees = [read_yaml(text, path.name) for path, text in YAML.items()]
    known = {key for tree in trees for key in flatten({k: v for k, v in tree.items() if k != "base"})}
    prefixes = {".".join(key.split(".")[:count]) for key in known for count in range(1, 9)}
    for code in code_of(page):
        for key in re.findall(rf"\b(?:{'|'.join(SECTIONS)})\.[a-z_]+(?:\.[\w*]+)*", code):
            if re.search(r"\.(py|md|yaml|sh|npz|pth?|mat|jsonl|db)$", key) or "*" in key or f"{key}(" in code:
                continue
            attribute = re.search(rf"\b{key.split('.')[1]}: ", TEXT)  # a field of a schema that no YAML of ours sets
            module = (ROOT / f"{key.replace('.', '/')}.py").exists()
            assert key in prefixes or attribute or module, f"{page.name}: {key} in {code!r}"


def test_the_keys_that_may_differ_when_a_run_goes_on_are_listed() -> None:
    (told,) = re.findall(r"Free are (.*?)\.\n", (ROOT / "docs/distributed.md").read_text(encoding="utf-8"), re.S)
    assert {f"run.{key.removeprefix('run.')}" for key in re.findall(r"`([\w.]+)`", told)} == FREE_KEYS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_names_of_the_code_exist(page: Path) -> None:
    everything = TEXT + "\n".join(YAML.values()) + (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for code in code_of(page):
        if re.fullmatch(r"[A-Za-z]\w*(?:_\w+|[a-z][A-Z]\w*)(?:\(\))?", code) and code not in INVENTED:
            assert re.search(rf"\b{code.removesuffix('()')}\b", everything), f"{page.name}: {code}"
