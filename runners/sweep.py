"""Several runs on one data set: methods x code lengths x seeds and whatever else, then one table and the curves.

A sweep is a YAML with one section, `sweep:`. Finished runs are skipped, interrupted ones go on, and a run that fails
does not stop the others (with `--distribute` it does: its other processes may wait for the one that failed). Any number
of processes may work on one sweep: a run belongs to whoever locks its folder, and is free again when that process ends,
however it does. On several machines their file system must pass locks on.

A finished run keeps no checkpoints: they are three times its weights each, and nobody goes on from them.
"""

import itertools
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.checkpoint import Checkpoints, require_same
from common.checkpoint_config import stored_config
from common.config import Config, load_config, load_sweep
from common.errors import UserError
from common.places import ROOT
from common.registry import RUNNERS
from common.schemas import FREE_KEYS
from common.yaml_layers import flatten
from runners.comparison import RunFolder
from runners.resuming import BusyError, FinishedError
from runners.tables import write_summary
from utils.distributed import barrier, from_main, is_main, world_size
from utils.files import FolderLock, in_turn, make_folder
from utils.launch import devices, in_group
from utils.output import say, table
from utils.progress import progress
from utils.signals import Interrupted, StopRequest, end_with_parent

logger = logging.getLogger(__name__)
_PATIENCE = 2.0  # seconds between looks at runs that others are making


class Sweep:
    """The runs of a sweep.

    Args:
        path: YAML with the `sweep:` section.
        overrides: Entries `sweep.key=value` for the sweep, all others for every run.
        imports: The user's Python files, for the processes that `sweep.parallel` starts.

    Attributes:
        planned: One configuration a run, in order.

    Raises:
        UserError: If any configuration is wrong, or they name several data sets.
    """

    def __init__(self, path: Path, overrides: list[str], imports: Sequence[Path] = ()) -> None:
        sweep, shared = load_sweep(path, overrides)
        self.folder, self.parallel, self._summary = Path(sweep.save_dir), sweep.parallel, sweep.summary
        self._command = ["--config-file", str(path), *(f"--import={file}" for file in imports), *overrides]
        self.planned: list[Config] = []
        taken = {
            "model.bits": "bits",
            "run.seed": "seeds",
            "dataset.split.seed": "split_seeds",
            "run.save_dir": "save_dir",
        }
        for key in sweep.grid:
            if key in taken:
                raise UserError(f"{path}: sweep.grid names {key}, which sweep.{taken[key]} sets; name its values there")
            if key in FREE_KEYS:
                raise UserError(f"{path}: sweep.grid names {key}, which changes no result; leave it out")
        splits = [[]] if sweep.split_seeds is None else [[f"dataset.split.seed={seed}"] for seed in sweep.split_seeds]
        choices = [[(key, value) for value in values] for key, values in sweep.grid.items()]
        for file, chosen, bits, split, seed in itertools.product(
            sweep.configs, itertools.product(*choices), sweep.bits, splits, sweep.seeds
        ):
            name = "".join(f"-{re.sub(r'[^A-Za-z0-9._=-]+', '_', f'{key}={_short(value)}')}" for key, value in chosen)
            name += "".join(f"-split{entry.partition('=')[2]}" for entry in split)
            entries = [f"{key}={_written(value)}" for key, value in chosen]
            entries += [*split, f"model.bits={bits}", f"run.seed={seed}"]
            entries.append(f"run.save_dir={sweep.save_dir}/{{model}}-{{bits}}bits-seed{{seed}}{name}")
            self.planned.append(load_config(file, [*shared, *entries]))
        self._require_comparable(path)

    def _require_comparable(self, path: Path) -> None:
        names = {config.dataset.name for config in self.planned}
        if len(names) > 1:
            raise UserError(
                f"{path}: a sweep compares on one data set, but its configs name {', '.join(sorted(names))}"
            )
        folders = [config.run_folder for config in self.planned]
        twice = next((folder for folder in folders if folders.count(folder) > 1), None)
        if twice is not None:
            raise UserError(f"{path}: two runs of the sweep would lie in {twice}; name every value once")
        if self.parallel > 1 and (in_group() or self.planned[0].run.distribute):
            raise UserError(
                "sweep.parallel starts processes of one device each; leave --distribute out, or parallel at 1"
            )

    def list_runs(self) -> str:
        """A table of all runs, in order, and where each stands."""
        rows = [["run", "folder", "state"]]
        for number, config in enumerate(self.planned, start=1):
            folder = config.run_folder
            begun = "begun" if _checkpoints(config).paths() else "not begun"
            rows.append([str(number), str(folder), "done" if _has_results(config) else begun])
        return table(rows)

    def run(self) -> None:
        """Makes every run that is not done yet, then writes and prints the summary.

        Raises:
            UserError: At the end, if runs failed.
            Interrupted: After Ctrl-C or SIGTERM.
        """
        failed = self._work_in_processes() if self.parallel > 1 else self._work()
        if is_main() and self._summary:
            finished = [RunFolder(config.run_folder) for config in self.planned if config.run_folder not in failed]
            if finished:
                with in_turn(self.folder, "sweep.save_dir"):  # processes that share a sweep end at the same time
                    say(write_summary(self.folder, finished))
        barrier()
        if failed:
            raise UserError(
                f"{len(failed)} of {len(self.planned)} runs failed "
                f"({'; '.join(f'{run}: {why}' for run, why in failed.items())}); mend them and run the command again"
            )

    def _work(self) -> dict[Path, str]:
        """Makes the runs that nobody else makes, waits for the others; returns why runs failed."""
        failed: dict[Path, str] = {}
        left = list(self.planned)
        while left:
            busy: list[Config] = []
            for config in left:
                folder, number = config.run_folder, self.planned.index(config) + 1
                try:
                    if from_main(int(_is_done(config))):
                        logger.info("run %d of %d: %s is done", number, len(self.planned), folder)
                        _remove_checkpoints(config)
                        continue
                    logger.info("run %d of %d: %s", number, len(self.planned), folder)
                    runner = RUNNERS.get(config.run.runner)(config)
                    runner.setup(resume=True)
                    runner.run()
                    _remove_checkpoints(config)
                except (BusyError, FinishedError):  # finished, that is, since we looked
                    logger.info("run %d of %d: another process is working on it", number, len(self.planned))
                    busy.append(config)
                except UserError as error:
                    if world_size() > 1:  # the others may wait for this process in the middle of the run
                        raise
                    failed[folder] = str(error)
                    logger.error("%s failed: %s", folder, error)
            left = busy
            if busy:
                time.sleep(_PATIENCE)
        return failed

    def _work_in_processes(self) -> dict[Path, str]:
        """Starts processes that share the runs, each on one device; returns which runs have no results in the end."""
        make_folder(self.folder, "sweep.save_dir")
        found = devices(self.planned[0].run.device)
        names = [str(device.index) if device.type == "cuda" else device.type for device in found]
        cores = len(os.sched_getaffinity(0))
        environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, cores // self.parallel))}
        processes = []
        with StopRequest() as stop:
            for number in range(self.parallel):
                device = names[number % len(names)]
                entries = ["sweep.parallel=1", "sweep.summary=false", f"run.device={device}"]
                with open(self.folder / f"process-{number + 1}.log", "wb") as log:
                    processes.append(
                        subprocess.Popen(
                            [sys.executable, str(ROOT / "main.py"), *self._command, *entries],
                            env=environment,
                            stdout=log,
                            stderr=log,
                            start_new_session=True,  # Ctrl-C reaches them once, through this process
                            preexec_fn=end_with_parent,
                        )
                    )
            logger.info("%d processes at work; their logs are %s", self.parallel, self.folder / "process-*.log")
            self._wait(processes, stop)
        return {
            config.run_folder: f"no results; {self.folder / 'process-1.log'} and its neighbours say why"
            for config in self.planned
            if not _is_done(config)
        }

    def _wait(self, processes: list["subprocess.Popen[bytes]"], stop: StopRequest) -> None:
        """Until all processes have ended; passes a signal on to them."""
        passed_on = False
        with progress(total=len(self.planned), desc="sweep", unit="run") as bar:
            while any(process.poll() is None for process in processes):
                if stop.requested and not passed_on:
                    passed_on = True
                    for process in processes:
                        process.send_signal(signal.SIGTERM)
                bar.update(sum(_has_results(config) for config in self.planned) - bar.n)
                time.sleep(0.2)
            bar.update(sum(_has_results(config) for config in self.planned) - bar.n)
        if passed_on:
            stopped = Interrupted(stop.signal, 0, self.folder)
            stopped.args = (f"stopped; run the same command again to go on with the sweep in {self.folder}",)
            raise stopped


def _short(value: Any) -> str:
    """A value of a grid as the folder shows it."""
    return value if isinstance(value, str) else json.dumps(value)


def _written(value: Any) -> str:
    """A value of a grid as it stands on a command line."""
    return json.dumps(value)


def _has_results(config: Config) -> bool:
    return (config.run_folder / "results.json").exists()


def _remove_checkpoints(config: Config) -> None:
    """Removes a finished run's checkpoints, unless somebody is working in its folder."""
    checkpoints = _checkpoints(config)
    if not is_main() or not checkpoints.paths():
        return
    try:
        lock = FolderLock(config.run_folder)
        if lock.acquire(wait=False):
            checkpoints.remove()
        lock.release()
    except (OSError, UserError) as error:  # the run is whole nevertheless
        logger.warning("the checkpoints of the finished run %s stay there: %s", config.run_folder, error)


def _checkpoints(config: Config) -> Checkpoints:
    return Checkpoints(config.run_folder / "checkpoints", config.run.keep_checkpoints)


def _is_done(config: Config) -> bool:
    """Whether the run's results are there.

    Raises:
        UserError: If they were made under other settings.
    """
    folder = config.run_folder
    if not _has_results(config):
        return False
    theirs, ours = flatten(stored_config(folder / "config.yaml").tree), flatten(config.tree)
    require_same(
        {key: value for key, value in ours.items() if key not in FREE_KEYS},
        {key: value for key, value in theirs.items() if key not in FREE_KEYS},
        f"the run in {folder}",
    )
    return True
