"""The preparation scripts of the benchmark data sets, on sources in small."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from data import (
    make_coco,
    make_iaprtc12,
    make_mirflickr25k,
    make_nuswide,
    make_wiki,
    preparation,
)
from data.preparation import REPORT
from data.source_files import JOURNAL
from tests import miniatures

SCRIPTS = {
    "mirflickr25k": make_mirflickr25k,
    "nuswide": make_nuswide,
    "coco": make_coco,
    "wiki": make_wiki,
    "iaprtc12": make_iaprtc12,
}
WRITTEN = {"index.mat", "caption.mat", "label.mat", "labels.txt", REPORT, JOURNAL}
REPOSITORY = Path(__file__).parents[1]
MAIN = '\nif __name__ == "__main__":\n'
ALL = sorted(path.name for path in (REPOSITORY / "data").glob("*.py") if MAIN in path.read_text())


def source_of(name: str, folder: Path) -> Path:
    """Makes the source of a data set below a folder."""
    make: Callable[[Path], Path] = getattr(miniatures, name)
    return make(folder / "source")


def prepare(name: str, source: Path, root: Path, *more: str) -> int:
    """Runs a script with further options; returns its exit code."""
    script: ModuleType = SCRIPTS[name]
    arguments = ["--source", str(source), "--root", str(root), *more]
    return preparation.run(name, name, script.PROTOCOLS, script.collect, arguments)


def contents(root: Path) -> dict[str, bytes]:
    """Files of a folder that are no pictures."""
    return {path.name: path.read_bytes() for path in root.iterdir() if not path.is_symlink()}
