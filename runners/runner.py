"""The one loop: train, evaluate, save, resume.

What is done with a batch stands in `train_epoch`; what a method does with it stands in `models/<method>.py`.
"""

import dataclasses
import functools
import logging
import time
from contextlib import closing
from typing import Any, cast

import torch

from common import checkpoint
from common.config import Config
from common.optim import build_optimizers, restore_optimizers
from common.registry import RUNNERS
from common.state_writer import StateWriter
from common.types import Progress, StepOutput
from models.base import HashingModel
from runners import diagnostics, encoding
from runners.contract import form_of_state, require_form, require_gradients, trained_groups, warn_of_loose_state
from runners.evaluation import Evaluator, save_codes
from runners.results import results_table, summarise
from runners.resuming import RunState, check_resumable, claim_folder, newest_checkpoint, state_of
from runners.selection import KEYS, out_of_patience, reported, watched_splits
from runners.setup import autocast, build_model, open_dataset, spare_memory, training_loader
from runners.steps import StepLog, require_finite_loss, updates
from utils.distributed import Votes, barrier, data_parallel, is_main
from utils.files import write_json, write_text
from utils.launch import pick_device
from utils.logging import Record
from utils.output import say
from utils.precision import float32_products
from utils.progress import progress
from utils.seeding import seed_torch
from utils.signals import Interrupted, StopRequest

logger = logging.getLogger(__name__)


@RUNNERS.register("Runner")
class Runner:
    """Trains one method on one data set, evaluates it, and keeps all that is needed to go on.

    Args:
        config: The checked configuration.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.folder = config.run_folder
        self.checkpoints = checkpoint.Checkpoints(self.folder / "checkpoints", config.run.keep_checkpoints)
        self.state = RunState()

    def setup(self, resume: bool = False) -> None:
        """Opens the data, builds the model and the optimizers, and goes back to the newest checkpoint if asked to.

        Args:
            resume: Go on with the run that lies in the folder.

        Raises:
            UserError: For anything that the user can mend.
        """
        run = self.config.run
        self.device = pick_device(run.device, run.distribute)
        self.lock = claim_folder(self.folder, resume)
        loaded = newest_checkpoint(self.checkpoints) if resume else None
        if resume and loaded is None:
            logger.info("no checkpoint in %s yet: starting at the beginning", self.checkpoints.folder)
        self.dataset = open_dataset(self.config)
        self.watched = watched_splits(self.config, self.dataset)
        if loaded is not None:
            check_resumable(loaded, self.config, self.dataset)
        self.model = build_model(self.config, self.dataset, loaded, self.device, training=True)
        self.evaluator = Evaluator(self.config, self.dataset, self.model, self.device)
        self.train_loader = training_loader(self.config, self.dataset, self.model, self.device)
        self.steps = run.epochs * len(self.train_loader)
        groups, self.form = trained_groups(self.model), form_of_state(self.model)
        warn_of_loose_state(self.model)
        spare_memory(self.model, run)
        self.optimizers = build_optimizers(self.config.optim, groups, self.steps)
        if loaded is not None:
            self.state = state_of(loaded, self.steps)
            restore_optimizers(self.optimizers, loaded.optimizers, f"checkpoint {loaded.path}")
            logger.info("going on after step %d of %d from %s", self.state.step, self.steps, loaded.path)
        self.begun = self.state.step
        self.module = self._wrap(self.model)
        self.votes = Votes()
        self.computing = functools.partial(autocast, run.precision, self.device)

    def run(self) -> None:
        """Trains to the last epoch, evaluating on the way; prints and writes the results.

        Raises:
            Interrupted: After Ctrl-C or SIGTERM, once a resumable checkpoint is written.
            UserError: If the loss is not finite.
        """
        with StopRequest() as self.stop, closing(self.train_loader):
            self.record = None
            if is_main():
                self.record = Record(self.folder, upto=self.state.step)
                write_text(self.folder / "config.yaml", self.config.to_yaml())
            self.step_log = StepLog(self.config.run.log_every)
            self.saved_at = time.monotonic()
            with (
                progress(
                    total=self.steps, initial=self.state.step, desc=self.config.model.name, unit="step"
                ) as self.bar,
                StateWriter() as self.writer,
            ):
                try:
                    if self.state.step == 0:
                        self.state.untrained = diagnostics.report_untrained(
                            self.evaluator, self.watched[0], self.record, self._stop_between_batches
                        )
                    while True:
                        if self._evaluation_is_due():
                            self.evaluate_epoch()
                        if self.state.step == self.steps or out_of_patience(self.state.history, self.config):
                            break
                        with float32_products(self.config.run.matmul):
                            self.train_epoch()
                except Exception:
                    self._log_steps()  # a loss that was not finite explains what failed after it
                    raise
            self._finish()

    def train_epoch(self) -> None:
        """Trains from where the run stands to the end of the epoch."""
        self.model.train()
        epoch, done = divmod(self.state.step, len(self.train_loader))
        for batch in self.train_loader.epoch(epoch, start=done):
            position = Progress(epoch, self.config.run.epochs, self.state.step, len(self.train_loader))
            seed_torch(self.config.run.seed, self.state.step)
            with self.computing():
                output: StepOutput = self.module(batch, position)
            self.step_log.add(self.state.step, updates(output, self.optimizers, self.computing))
            if self.state.step == self.begun:  # in the next step, several processes would wait for what does not come
                require_gradients(self.model)
            if self.step_log.is_due:
                self._log_steps()
            self.state.step += 1
            self.bar.update()
            self._save_if_due()

    def evaluate_epoch(self) -> None:
        """Evaluates the present weights; keeps them and their codes if they are the best so far."""
        found = self.evaluator.evaluate(self._stop_between_batches, self.watched)
        epoch = self.state.step // len(self.train_loader)
        self.state.history.append({"epoch": epoch, **found.entry})
        best = reported(self.state.history, self.config) is self.state.history[-1]
        if self.record is not None:  # the first process
            if best:
                save = functools.partial(checkpoint.save, self.folder / "best.pt", self._meta(epoch=epoch))
                self.writer.begin(save, self.model.state_dict())
                if "query" in self.watched:
                    save_codes(self.folder, "best", found, self.model.code_lengths)
        diagnostics.report(self.state.step, self.state.history, found, self.evaluator, self.record, best)
        barrier()

    def _wrap(self, model: HashingModel) -> torch.nn.Module:
        """The model as a step calls it: over all processes, and compiled, where the config says so."""
        module = data_parallel(model, model.loss_reaches_all)
        return cast(torch.nn.Module, torch.compile(module)) if self.config.run.compile else module

    def _log_steps(self) -> None:
        """Records losses and terms of the steps that wait; stops the run if one is not finite.

        Nothing that a step changed may be saved before.
        """
        for step, values in self.step_log.read():
            require_finite_loss(step, values, self.checkpoints.paths())
            if self.record is not None:
                self.record.write("step", step + 1, values)  # counted when it is taken
            self.bar.set_postfix_str(f"loss {values['loss']:.4f}", refresh=False)

    def _save_if_due(self) -> None:
        """Saves at the end of an epoch, at `run.checkpoint_every`, and before an asked-for stop."""
        every = self.config.run.checkpoint_every
        minutes = None if isinstance(every, int) else int(every.removesuffix("m"))
        waited = minutes is not None and time.monotonic() - self.saved_at >= 60 * minutes
        stopped, late = self.votes.ask(self.stop.requested, waited)  # clocks of processes differ
        due = late or (isinstance(every, int) and self.state.step % every == 0)
        if due or stopped or self.state.step % len(self.train_loader) == 0:
            self._log_steps()
            self._save()
        if stopped:
            self.writer.wait()
            barrier()  # the others must not end while the first process writes
            raise Interrupted(self.stop.signal, self.state.step, self.folder)

    def _save(self) -> None:
        require_form(self.model, self.form)
        if is_main():
            states = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
            meta = self._meta(state=dataclasses.asdict(self.state))
            save = functools.partial(self.checkpoints.save, self.state.step, meta)
            self.writer.begin(save, self.model.state_dict(), states)
        self.saved_at = time.monotonic()

    def _meta(self, **position: Any) -> dict[str, Any]:
        """What a checkpoint says of itself, and where the run stood."""
        described = {"config": self.config.tree, encoding.KEY: encoding.describe(self.config, self.model, self.dataset)}
        return {**described, "split": self.dataset.splits.fingerprint, **position}

    def _evaluation_is_due(self) -> bool:
        epoch, rest = divmod(self.state.step, len(self.train_loader))
        done = self.state.history[-1]["epoch"] if self.state.history else 0
        due = epoch % self.config.evaluate.every == 0 or self.state.step == self.steps
        return rest == 0 and epoch > done and due

    def _stop_between_batches(self) -> None:
        """An evaluation is done again when a run goes on, so nothing is lost by leaving it."""
        if self.stop.requested:
            raise Interrupted(self.stop.signal, self.state.step, self.folder)

    def _finish(self) -> None:
        """Prints and writes what the run found."""
        best = reported(self.state.history, self.config)
        found = None
        if KEYS["query"] not in best:
            found = self.evaluator.evaluate_saved(self.folder / "best.pt", self._stop_between_batches)
            best[KEYS["query"]] = found.reports["query"]
        if self.record is not None:  # the first process
            self.record.close()
            if found is not None:
                save_codes(self.folder, "best", found, self.model.code_lengths)
            results = summarise(self.config, self.model, self.dataset, self.state.history, best, self.state.untrained)
            write_json(self.folder / "results.json", results)
            say(results_table(results))
            files = "results.json, best.pt, codes-best.npz, codes-best.mat, ap-best.npz, log.jsonl, config.yaml"
            say(f"written to {self.folder}: {files}")
        if self.lock is not None:
            self.lock.release()
        barrier()
