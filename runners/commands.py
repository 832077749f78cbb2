"""What the command line can ask for, one function each, and how every one of them ends."""

import argparse
import importlib.util
import sys
import traceback
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path

import torch

from common.checkpoint import load
from common.checkpoint_config import checkpoint_config, stored_config
from common.config import Config, has_section, load_config
from common.errors import UserError
from common.registry import RUNNERS
from runners.settings import overrides_of, print_config
from utils import launch
from utils.logging import setup_logging
from utils.output import say
from utils.signals import Interrupted, heed_interrupts


def execute(options: argparse.Namespace, list_registered: Callable[[], str]) -> int:
    """Does what the options ask for, and says in one line why it ended early.

    Args:
        options: The command line, see `main.py`.
        list_registered: Makes the answer of `--list`, once the user's files are imported.

    Returns:
        The exit code: 0, 2 for the user's mistakes, 75 or 130 when the run can go on, 1 for a defect.

    Raises:
        BrokenPipeError: If nobody reads standard output any more.
    """
    heed_interrupts()
    setup_logging()
    try:
        launch.meet()
        for path in options.imports:
            import_file(path)
        if options.list:
            say(list_registered())
            return 0
        return _do(options)
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
    except BrokenPipeError:
        raise
    except Exception as error:
        if "DataLoader worker" in str(error):  # torch notices a killed worker wherever the main process stands
            sys.stderr.write("error: a loader process was killed, probably for lack of memory; lower run.workers\n")
            return 2
        if launch.first_to_fail():
            if launch.lost_peer(error):
                sys.stderr.write("error: another process of the group is gone; go on with --resume\n")
            elif _is_out_of_memory(error):
                what = " ".join(str(error).split())[:200]
                sys.stderr.write(
                    f"error: not enough memory ({what or type(error).__name__}); lower run.batch_size or "
                    "evaluate.batch_size, set run.recompute=true, raise run.accumulate, or set run.loader=workers\n"
                )
                return 2
            else:
                traceback.print_exc()
        return 1
    finally:
        launch.leave()


def _is_out_of_memory(error: Exception) -> bool:
    """Whether memory, of the machine or of the GPU, did not suffice."""
    words = ("can't allocate memory", "out of memory", "Unable to allocate", "Storage size calculation overflowed")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(word in str(error) for word in words)


def _do(options: argparse.Namespace) -> int:
    """Each command imports what it needs: reading a configuration should not wait for plots and compilers."""
    if options.check_data is not None:
        from dataset.check import check_data

        check_data(options.check_data, options.overrides, None if options.save_dir is None else Path(options.save_dir))
        return 0
    if options.score is not None:
        from runners.scoring import score_file

        score_file(options.score, options.overrides, options.device or "auto", options.save_dir)
        return 0
    if options.report is not None:
        from runners.report.page import write_report

        if options.overrides:
            raise UserError(f"{options.overrides[0]}: --report shows runs as they were made; leave it out")
        write_report(options.report)
        return 0
    if options.index is not None or options.search is not None or options.serve is not None:
        from runners.search import commands

        commands.execute(options)
        return 0
    if options.export is not None:
        from runners.exporting import export_command

        export_command(options.export, options.save_dir, options.input or [], options.overrides)
        return 0
    sweep = None
    if options.config_file is not None and has_section(options.config_file, "sweep"):
        from runners.sweep import Sweep

        if options.evaluate is not None:
            raise UserError(
                f"{options.config_file} is a sweep, and --evaluate takes the configuration of one run; leave "
                "--config-file out, or name that of the checkpoint's method"
            )
        sweep = Sweep(options.config_file, overrides_of(options), options.imports)
    config = sweep.planned[0] if sweep is not None else read_config(options)
    if options.print_config:
        if sweep is not None:
            say(f"{sweep.list_runs()}\n\nrun 1, value by value:")
        print_config(config)
        return 0
    if config.run.distribute and not launch.in_group():
        return launch.launch(launch.count_processes(config.run.device))
    if launch.in_group():
        launch.join(config.run.device)
    if sweep is not None:
        sweep.run()
    elif options.evaluate is not None:
        from runners.evaluation import evaluate_file

        evaluate_file(config, options.evaluate)
    else:
        runner = RUNNERS.get(config.run.runner)(config)
        runner.setup(resume=options.resume or launch.restarted())
        runner.run()
    return 0


def import_file(path: Path) -> None:
    """Runs a user's Python file, so that its decorators register what it defines.

    Raises:
        UserError: If there is no such file, it fails, or it would hide a module of its name.
    """
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise UserError(f"--import {path}: there is no such Python file")
    known = PathFinder.find_spec(path.stem)
    if known is not None and known.origin is not None and Path(known.origin).resolve() != path.resolve():
        raise UserError(f"--import {path}: there is another module {path.stem} ({known.origin}); rename the file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except UserError as error:
        raise UserError(f"--import {path}: {error}") from None
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == spec.origin]
        what = str(error)
        if isinstance(error, SyntaxError) and error.filename == spec.origin:  # it does not run at all
            lines, what = [error.lineno], error.msg
        where = f", line {lines[-1]}" if lines else ""  # none of a file that is not text
        raise UserError(f"--import {path}{where}: {type(error).__name__}: {what}") from None


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
        return stored_config(file, overrides)
    if options.evaluate is not None:
        checkpoint = load(options.evaluate)
        if checkpoint.is_ours:
            return checkpoint_config(checkpoint.config, options.evaluate, overrides)
    or_folder = ", or the folder of the run with --save-dir" if options.resume else ""
    raise UserError(
        f"no configuration: name one with --config-file, e.g. --config-file configs/MITH/config.yaml{or_folder}"
    )
