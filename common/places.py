"""Settings that name places: which belong to the machine, and where a path that is read is looked for."""

import os
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from pydantic.fields import FieldInfo

ROOT = Path(__file__).resolve().parent.parent  # of the repository
COMMAND_LINE = "command line"  # as the origin of a value
CHECKPOINT = "the checkpoint"  # the same


class Mark(Enum):
    """What a setting is beside its value, as the metadata of its annotation."""

    OF_MACHINE = "a place or processes: of the machine, not of the experiment, so that a checkpoint's is never obeyed"
    READ = "a path that is read: in a YAML file, relative to the file, the repository, or the working directory"


DataPath = Annotated[str, Mark.OF_MACHINE, Mark.READ]


def marks_of(field: FieldInfo) -> list[Any]:
    """Metadata of a field's annotation, also of the one beside None."""
    inner = [part for part in get_args(field.annotation) if get_origin(part) is Annotated]
    return [*field.metadata, *(mark for part in inner for mark in get_args(part)[1:])]


def locate(path: str, origin: str) -> str:
    """A path that a setting names, as it is found from the working directory.

    Args:
        path: As it was written.
        origin: The YAML file that names it, or the command line.

    Returns:
        Of a relative path in a YAML file, the first that is there: beside the file, in the repository, in the working
        directory. If none is: for the repository's own files, where it would be in the repository; else as written.
    """
    if Path(path).is_absolute() or origin == COMMAND_LINE:
        return path
    file = Path(origin).resolve()
    for folder in (file.parent, ROOT, Path.cwd()):
        if (folder / path).exists():
            return _short(folder / path)
    own = file.is_relative_to(ROOT / "configs") and (ROOT / Path(path).parts[0]).is_dir()
    return _short(ROOT / path) if own else path


def _short(path: Path) -> str:
    """A path relative to the working directory where it lies in there."""
    path, here = Path(os.path.normpath(path)), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
