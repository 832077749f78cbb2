"""What comes after a training step's loss: backward passes, updates, and the log of it."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from common.errors import UserError
from common.types import Stage, StepOutput
from utils.distributed import average_gradients


def updates(
    output: StepOutput,
    optimizers: Mapping[str, Optimizer],
    computing: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Iterator[tuple[str, StepOutput]]:
    """Takes a step: backward pass and update of its loss by all optimizers, then of each stage by the stage's.

    A parameter without a gradient is not updated. A stage whose loss has no graph, as without a triplet, changes
    nothing.

    Args:
        output: What the training step returned.
        optimizers: Of the run, by name.
        computing: Context in which the losses of stages are computed.

    Yields:
        Name, and loss with terms, of every pass, `loss` first, when its gradients are there and not used yet.

    Raises:
        UserError: If a loss or a term is no number, or the first loss has no graph.
    """
    _require_numbers("loss", output)
    if not output.loss.requires_grad:
        raise UserError("the loss of a training step depends on no trainable parameter; look for detach() or no_grad()")
    for optimizer in optimizers.values():
        optimizer.zero_grad(set_to_none=True)
    try:
        output.loss.backward()
    except RuntimeError as error:
        if "backward through the graph a second time" not in str(error):
            raise
        raise UserError(
            "the loss of a training step depends on an earlier step's graph; detach() what is kept from step to step"
        ) from None
    yield "loss", output
    for optimizer in optimizers.values():
        optimizer.step()
    for stage in output.stages:
        chosen = [optimizers[name] for name in stage.optimizers]
        parameters = [p for optimizer in chosen for group in optimizer.param_groups for p in group["params"]]
        with computing():
            found = stage.compute()
        _require_numbers(stage.name, found)
        if found.loss.requires_grad:
            # Not by backward(), which would run the hooks of DistributedDataParallel: it waits for the loss's alone.
            gradients = torch.autograd.grad(found.loss, parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            average_gradients(parameters)
        yield stage.name, found
        if found.loss.requires_grad:
            for optimizer in chosen:
                optimizer.step()


def _require_numbers(name: str, output: StepOutput) -> None:
    """Refuses what torch would refuse in words that do not name it."""
    if not isinstance(output, StepOutput):
        raise UserError(f"the {name} of a training step is a {type(output).__name__}; return StepOutput(loss, terms)")
    if not isinstance(output.terms, Mapping):
        raise UserError(f"the terms beside the {name} of a training step are no dict; give name -> scalar")
    if not all(isinstance(stage, Stage) for stage in output.stages):
        raise UserError(f"the stages beside the {name} of a training step are no Stages; see common/types.py")
    for what, value in {**output.terms, name: output.loss}.items():
        if not isinstance(value, Tensor) or value.numel() != 1:
            kind = f"of the shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise UserError(f"{what} of a training step is {kind}; a loss or a term is one number, as mean() gives it")
        if value.is_complex():
            raise UserError(f"{what} of a training step is complex; take its real part or its magnitude")


class StepLog:
    """Losses and terms of steps, which stay on the device until they are read together: that waits for the last step.

    Args:
        every: `run.log_every`, steps after which it is time to read them.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self._waiting: list[tuple[int, tuple[str, ...], Tensor]] = []

    @property
    def is_due(self) -> bool:
        """Whether as many steps wait as should be read together."""
        return len(self._waiting) >= self._every

    def add(self, step: int, passes: Iterable[tuple[str, StepOutput]]) -> None:
        """Takes what the passes of a step gave: the loss of each under its name, and its terms."""
        values: dict[str, Tensor] = {}
        for name, output in passes:
            found = {name: output.loss} | {term: value for term, value in output.terms.items() if term != name}
            if not values.keys().isdisjoint(found):
                twice = ", ".join(sorted(values.keys() & found.keys()))
                raise UserError(f"two passes of a training step have values called {twice}; give each its own name")
            values |= found
        together = torch.stack([value.detach().float().reshape(()) for value in values.values()])
        self._waiting.append((step, tuple(values), together))

    def read(self) -> list[tuple[int, dict[str, float]]]:
        """The steps that wait and their values by name, in order; then none waits."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return []
        numbers = iter(torch.cat([values for _, _, values in waiting]).tolist())
        return [(step, {name: next(numbers) for name in names}) for step, names, _ in waiting]


def require_finite_loss(step: int, values: Mapping[str, float], checkpoints: Sequence[Path]) -> None:
    """Refuses losses and terms that are not finite.

    Args:
        step: Number of the step, from 0.
        values: Its losses and terms by name.
        checkpoints: Those kept, the newest last.

    Raises:
        UserError: If one is not finite.
    """
    if not all(math.isfinite(value) for value in values.values()):
        terms = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        raise UserError(
            f"the loss is not finite at step {step} ({terms}); last good checkpoint: "
            f"{checkpoints[-1] if checkpoints else 'none yet'}; lower optim.*.lr, or set run.precision=float32, and "
            "start anew"
        )
