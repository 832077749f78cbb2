"""Train, evaluate and use a cross-modal hashing method.

This file reads the command line; README.md shows the commands, `runners/commands.py` does them. Torch and all that
needs it load only then, so that help, lists and mistakes are answered at once.
"""

import argparse
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    from utils.signals import die_of_interrupts

    die_of_interrupts()

from common.errors import UserError
from common.registry import DATASETS, INDEXES, MODELS, OPTIMIZERS, RUNNERS
from utils.arguments import Parser
from utils.output import BROKEN_PIPE, say, table

_RUN = "a run"
_COMMANDS = ("evaluate", "score", "report", "index", "search", "serve", "export", "check_data", "list")
_TAKEN_BY = {  # option -> what it changes; elsewhere it would be passed over without a word
    "config_file": (_RUN, "evaluate"),
    "save_dir": (_RUN, "evaluate", "score", "index", "export", "check_data"),
    "device": (_RUN, "evaluate", "score", "index", "search", "serve"),
    "distribute": (_RUN, "evaluate"),
    "resume": (_RUN,),
    "print_config": (_RUN, "evaluate"),
    "input": ("index", "export"),
    "json": ("search",),
}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line as a namespace."""
    parser = Parser(prog="main.py", description="Train, evaluate and use a cross-modal hashing method on CLIP.")
    command = parser.add_mutually_exclusive_group()  # two at once: the second would be passed over
    parser.add_argument("--config-file", type=Path, help="YAML of the run, e.g. configs/MITH/config.yaml")
    parser.add_argument("--save-dir", help="folder of the run (run.save_dir)")
    parser.add_argument("--device", help="auto, cpu, cuda, GPU numbers such as 0,1, or cpu:2 (run.device)")
    parser.add_argument("--distribute", action="store_true", help="one process per device of --device")
    parser.add_argument("--resume", action="store_true", help="go on with the run that lies in the folder")
    command.add_argument(
        "--evaluate", type=Path, metavar="CHECKPOINT", help="evaluate a checkpoint, ours or the authors'"
    )
    command.add_argument("--score", type=Path, metavar="FILE", help="retrieval numbers of codes in a .mat or .npz file")
    command.add_argument("--report", type=Path, metavar="FOLDER", help="one HTML file about the runs of a folder")
    command.add_argument("--index", type=Path, metavar="CHECKPOINT", help="index what --input names, into --save-dir")
    parser.add_argument("--input", nargs="+", metavar="WHAT",
                        help="folders, patterns, lines (.txt), manifests (.jsonl, .csv), dataset:NAME")  # fmt: skip
    command.add_argument("--search", nargs="+", metavar=("INDEX", "QUESTION"),
                         help="search an index by texts and pictures")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="hits of --search as JSON, a line for each question")
    command.add_argument("--serve", type=Path, metavar="INDEX", help="a page and a JSON service on 127.0.0.1")
    command.add_argument("--export", type=Path, metavar="CHECKPOINT", help="image.onnx and text.onnx, into --save-dir")
    parser.add_argument("--import", dest="imports", type=Path, action="append", default=[], metavar="FILE",
                        help="Python file that registers a method, data set, ... of your own")  # fmt: skip
    command.add_argument("--check-data", metavar="NAME", help="check a data set of configs/datasets, or of any YAML")
    command.add_argument(
        "--list", action="store_true", help="list methods, runners, data sets, optimizers and index engines"
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print every value and where it came from, and the runs of a sweep"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="e.g. model.bits=64 run.epochs=10")
    options = parser.parse_intermixed_args(arguments)
    given = [name for name, value in vars(options).items() if value is not None and value is not False]
    asked = next((name for name in _COMMANDS if name in given), _RUN)
    for name in given:
        if asked not in _TAKEN_BY.get(name, (asked,)):
            *others, last = map(_shown, _TAKEN_BY[name])
            takers = f"{', '.join(others)} and {last}" if others else last
            raise UserError(f"{_shown(name)} belongs to {takers}, not to {_shown(asked)}; leave it out")
    return options


def _shown(name: str) -> str:
    """A command or option as it is written on the command line."""
    return name if name == _RUN else f"--{name.replace('_', '-')}"


def list_registered() -> str:
    """All registered names with the first line of their documentation."""
    rows = [["kind", "name", "what it is"]]
    for registry in (MODELS, RUNNERS, DATASETS, OPTIMIZERS, INDEXES):
        rows += [[registry.kind, name, what] for name, what in registry.described().items()]
        rows += [[registry.kind, module, f"could not be imported: {why}"] for module, why in registry.failed.items()]
    return table(rows)


def run(options: argparse.Namespace) -> int:
    """Does what the options ask for; returns the exit code."""
    if options.list and not options.imports:
        say(list_registered())
        return 0
    if options.config_file is not None and not options.imports:
        from common.config import load_early
        from runners.settings import overrides_of, print_config

        config = load_early(options.config_file, overrides_of(options))
        if options.print_config and config is not None:
            print_config(config)
            return 0
    from runners import commands

    return commands.execute(options, list_registered)


def main(arguments: list[str] | None = None) -> int:
    """Runs a command line, by default that of the process.

    Returns:
        The exit code: 0, 2 for the user's mistakes, 75 or 130 when the run can go on, 1 for a defect.
    """
    try:
        return run(parse_arguments(arguments))
    except (UserError, PermissionError) as error:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # every process of a group makes this mistake: one says so
            from utils import launch

            launch.meet()
            if not launch.first_to_fail():
                return 2
        if isinstance(error, PermissionError):  # wherever a file of the user's may lie
            error = UserError(f"{error.filename or 'a file'}: {error.strerror}; allow it, or name another place")
        sys.stderr.write(f"error: {error}\n")
        return 2
    except BrokenPipeError:
        return BROKEN_PIPE


if __name__ == "__main__":
    sys.exit(main())
