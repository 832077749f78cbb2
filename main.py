"""Train or evaluate a cross-modal hashing method.

This file parses the command line, builds the runner and runs it; README.md shows the commands.
"""

import argparse
import importlib.util
import json
import signal
import sys
import traceback
from pathlib import Path
from typing import NoReturn

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while packages load, which takes seconds: no traceback

from common.checkpoint import load
from common.config import Config, build_config, flatten, has_section, load_config
from common.errors import UserError
from common.registry import DATASETS, MODELS, RUNNERS, near_names
from dataset.check import check_data
from runners.evaluation import evaluate_file
from runners.sweep import Sweep
from utils import launch
from utils.logging import say, setup_logging, table
from utils.signals import Interrupted


class _Parser(argparse.ArgumentParser):
    """Reports mistakes as all others are, with near names for options that do not exist."""

    def error(self, message: str) -> NoReturn:
        wrong = message.removeprefix("unrecognized arguments: ").split("=")[0].split(" ")[0]
        near = near_names(wrong, [option for action in self._actions for option in action.option_strings])
        raise UserError(f"{message}{near or ';'} --help explains every option")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line as a namespace."""
    parser = _Parser(
        prog="main.py", description="Train or evaluate a cross-modal hashing method on CLIP.", allow_abbrev=False
    )
    parser.add_argument("--config-file", type=Path, help="YAML of the run, e.g. configs/MITH/config.yaml")
    parser.add_argument("--save-dir", help="folder of the run (run.save_dir)")
    parser.add_argument("--device", help="auto, cpu, cuda, GPU numbers such as 0,1, or cpu:2 (run.device)")
    parser.add_argument("--distribute", action="store_true", help="one process per device of --device")
    parser.add_argument("--resume", action="store_true", help="go on with the run that lies in the folder")
    parser.add_argument(
        "--evaluate", type=Path, metavar="CHECKPOINT", help="evaluate a checkpoint, ours or the authors'"
    )
    parser.add_argument("--import", dest="imports", type=Path, action="append", default=[], metavar="FILE",
                        help="Python file that registers a method, runner or data set of your own")  # fmt: skip
    parser.add_argument("--check-data", metavar="NAME", help="check a data set of configs/datasets, or of any YAML")
    parser.add_argument("--list", action="store_true", help="list methods, runners and data sets")
    parser.add_argument("--print-config", action="store_true", help="print every value and where it came from")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="e.g. model.bits=64 run.epochs=10")
    return parser.parse_intermixed_args(arguments)


def import_file(path: Path) -> None:
    """Runs a user's Python file, so that its decorators register what it defines."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise UserError(f"--import {path}: there is no such Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise
    except Exception as error:
        line = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f"--import {path}: {type(error).__name__}: {error} ({line.filename}, line {line.lineno})"
        ) from None


def overrides_of(options: argparse.Namespace) -> list[str]:
    """All `section.key=value` entries; the flags are short names of some, and come last."""
    flags = {
        "save_dir": options.save_dir,
        "device": options.device,
        "distribute": options.distribute or None,
    }
    return options.overrides + [f"run.{key}={json.dumps(value)}" for key, value in flags.items() if value is not None]


def read_config(options: argparse.Namespace) -> Config:
    """The configuration that the options ask for; that of the run or of the checkpoint where no file is named."""
    overrides = overrides_of(options)
    if options.config_file is not None:
        return load_config(options.config_file, overrides)
    if options.resume and options.save_dir is not None:
        file = Path(options.save_dir) / "config.yaml"
        if not file.is_file():
            raise UserError(
                f"{options.save_dir} holds no run to go on with (no config.yaml); start it with --config-file"
            )
        return load_config(file, overrides)
    if options.evaluate is not None:
        checkpoint = load(options.evaluate)
        if checkpoint.is_ours:
            return build_config(checkpoint.meta["config"], overrides=overrides)
    or_folder = ", or the folder of the run with --save-dir" if options.resume else ""
    raise UserError(
        f"no configuration: name one with --config-file, e.g. --config-file configs/MITH/config.yaml{or_folder}"
    )


def list_registered() -> str:
    """All registered names with the first line of their documentation."""
    rows = [["kind", "name", "what it is"]]
    for registry in (MODELS, RUNNERS, DATASETS):
        rows += [[registry.kind, name, (registry.get(name).__doc__ or "").split("\n")[0]] for name in registry.names()]
        rows += [[registry.kind, module, f"could not be imported: {why}"] for module, why in registry.failed.items()]
    return table(rows)


def run(options: argparse.Namespace) -> int:
    """Does what the options ask for; returns the exit code."""
    for path in options.imports:
        import_file(path)
    if options.list:
        say(list_registered())
        return 0
    if options.check_data is not None:
        check_data(options.check_data, options.overrides, None if options.save_dir is None else Path(options.save_dir))
        return 0
    sweep = None
    if options.config_file is not None and has_section(options.config_file, "sweep"):
        sweep = Sweep(options.config_file, overrides_of(options))
    config = sweep.planned[0] if sweep is not None else read_config(options)
    if options.print_config:
        rows = [[key, str(value), config.origins.get(key, "")] for key, value in flatten(config.tree).items()]
        say(table([["key", "value", "from"], *rows]))
        return 0
    if config.run.distribute and not launch.in_group():
        return launch.launch(launch.count_processes(config.run.device))
    if launch.in_group():
        launch.join(config.run.device)
    if sweep is not None:
        sweep.run()
    elif options.evaluate is not None:
        evaluate_file(config, options.evaluate)
    else:
        runner = RUNNERS.get(config.run.runner)(config)
        runner.setup(resume=options.resume or launch.restarted())
        runner.run()
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Runs a command line, by default that of the process.

    Returns:
        The exit code: 0, 2 for the user's mistakes, 75 or 130 when the run can go on, 1 for a defect.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    setup_logging()
    try:
        launch.meet()
        return run(parse_arguments(arguments))
    except UserError as error:
        if launch.first_to_fail():
            sys.stderr.write(f"error: {error}\n")
        return 2
    except Interrupted as stop:
        if launch.first_to_fail():
            sys.stderr.write(f"{stop}\n")
        return stop.exit_code
    except KeyboardInterrupt:
        if launch.first_to_fail():
            sys.stderr.write("interrupted before training began; run the same command again\n")
        return 130
    except Exception as error:
        if "DataLoader worker" in str(error):  # torch notices a killed worker wherever the main process stands
            sys.stderr.write("error: a loader process was killed, probably for lack of memory; lower run.workers\n")
            return 2
        if launch.first_to_fail():
            if launch.lost_peer(error):
                sys.stderr.write("error: another process of the group is gone; go on with --resume\n")
            else:
                traceback.print_exc()
        return 1
    finally:
        launch.leave()


if __name__ == "__main__":
    sys.exit(main())
