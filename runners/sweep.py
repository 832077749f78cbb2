"""Several runs on one data set: methods x code lengths x seeds, then one table and the curves.

A sweep is a YAML with one section, `sweep:`. Its runs are made one after another; finished ones are skipped,
interrupted ones go on, and a run that fails does not stop the others.
"""

import itertools
import logging
from pathlib import Path
from typing import Annotated

from pydantic import Field

from common.checkpoint import require_same
from common.config import FREE_KEYS, Config, Section, load_config, load_section
from common.errors import UserError
from common.places import Mark
from common.registry import RUNNERS
from common.yaml_layers import flatten
from runners.comparison import RunFolder, write_summary
from utils.distributed import barrier, is_main
from utils.output import say

logger = logging.getLogger(__name__)


class SweepConfig(Section):
    """`sweep:` section."""

    configs: Annotated[list[str], Field(min_length=1), Mark.READ]  # the YAML of every method
    bits: list[Annotated[int, Field(gt=0)]] = Field(min_length=1)  # model.bits
    seeds: list[Annotated[int, Field(ge=0)]] = Field(min_length=1)  # run.seed
    save_dir: str  # folder of the runs, the table and the curves


class Sweep:
    """The runs of a sweep.

    Args:
        path: YAML with the `sweep:` section.
        overrides: Entries `sweep.key=value` for the sweep, all others for every run.

    Attributes:
        planned: One configuration a run, in order.

    Raises:
        UserError: If any configuration is wrong, or they name several data sets.
    """

    def __init__(self, path: Path, overrides: list[str]) -> None:
        own = [entry for entry in overrides if entry.startswith("sweep.")]
        sweep = load_section(path, "sweep", SweepConfig, own)
        self.folder = Path(sweep.save_dir)
        shared = [entry for entry in overrides if entry not in own]
        shared.append(f"run.save_dir={sweep.save_dir}/{{model}}-{{bits}}bits-seed{{seed}}")
        self.planned = [
            load_config(file, [*shared, f"model.bits={bits}", f"run.seed={seed}"])
            for file, bits, seed in itertools.product(sweep.configs, sweep.bits, sweep.seeds)
        ]
        names = {config.dataset.name for config in self.planned}
        if len(names) > 1:
            raise UserError(
                f"{path}: a sweep compares on one data set, but its configs name {', '.join(sorted(names))}"
            )

    def run(self) -> None:
        """Makes every run that is not done yet, then writes and prints the summary.

        Raises:
            UserError: At the end, if runs failed.
        """
        failed: dict[Path, str] = {}
        for number, config in enumerate(self.planned, start=1):
            folder = config.run_folder
            done = _is_done(config)
            logger.info("run %d of %d: %s%s", number, len(self.planned), folder, " is done" if done else "")
            try:
                if not done:
                    runner = RUNNERS.get(config.run.runner)(config)
                    runner.setup(resume=True)
                    runner.run()
            except UserError as error:
                failed[folder] = str(error)
                logger.error("%s failed: %s", folder, error)
        if is_main():
            finished = [RunFolder(config.run_folder) for config in self.planned if config.run_folder not in failed]
            if finished:
                say(write_summary(self.folder, finished))
        barrier()
        if failed:
            raise UserError(
                f"{len(failed)} of {len(self.planned)} runs failed "
                f"({'; '.join(f'{run}: {why}' for run, why in failed.items())}); mend them and run the command again"
            )


def _is_done(config: Config) -> bool:
    """Whether the run's results are there.

    Raises:
        UserError: If they were made under other settings.
    """
    folder = config.run_folder
    if not (folder / "results.json").exists():
        return False
    theirs, ours = flatten(load_config(folder / "config.yaml").tree), flatten(config.tree)
    require_same(
        {key: value for key, value in ours.items() if key not in FREE_KEYS},
        {key: value for key, value in theirs.items() if key not in FREE_KEYS},
        f"the run in {folder}",
    )
    return True
