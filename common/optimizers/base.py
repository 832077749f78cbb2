"""What optimizers share: groups of parameters, schedules of the learning rate, clipping.

Rates follow the number of updates, never the number of processes.
"""

import math
from typing import Any, Literal

import torch
from pydantic import Field
from torch.nn import Parameter

from common.schemas import OptimizerConfig

Groups = dict[str, list[Parameter]]
Schedule = Literal["constant", "warmup_constant", "warmup_linear", "warmup_cosine"]


def scheduled_factor(schedule: Schedule, progress: float, warmup: float) -> float:
    """Factor of the learning rate after a fraction of all updates.

    The factor rises from 0 as progress / warmup, then follows the schedule's curve over the *whole* of [0, 1], not over
    what warm-up left: `warmup_cosine` drops from 1 to 0.976 where a warm-up of 0.1 ends.

    Args:
        schedule: `constant` (1, without warm-up), `warmup_constant` (1), `warmup_linear` ((1 - x) / (1 - w)) or
            `warmup_cosine` ((1 + cos(pi x)) / 2).
        progress: x, updates made / all updates. A run ends at 1; whoever goes on sees the cosine rise again, as the
            authors' code does.
        warmup: w, fraction of all updates that warm-up takes, in [0, 1).

    Returns:
        Factor in [0, 1].

    Source:
        BertAdam of pytorch-pretrained-BERT.
    """
    if schedule == "constant":
        return 1.0
    if progress < warmup:
        return progress / warmup
    if schedule == "warmup_linear":
        return max((1.0 - progress) / (1.0 - warmup), 0.0)
    if schedule == "warmup_cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0


class ScheduledConfig(OptimizerConfig):
    """Settings of an optimizer whose rate warms up."""

    schedule: Schedule  # shape of the learning rate over the run, see scheduled_factor
    warmup: float = Field(ge=0, lt=1)  # fraction of all updates over which the rate rises from 0; constant ignores it


def torch_groups(groups: Groups, config: OptimizerConfig) -> list[dict[str, Any]]:
    """The groups as torch takes them, each with its rate of the config."""
    return [{"name": name, "params": parameters, "lr": config.lr[name]} for name, parameters in groups.items()]


def require_steps(total_steps: int) -> None:
    """Refuses a run without updates.

    Raises:
        ValueError: As said.
    """
    if total_steps <= 0:
        raise ValueError(f"total_steps must be positive, not {total_steps}")


def clip_together(optimizer: torch.optim.Optimizer, key: str) -> None:
    """Clips all gradients by their norm as if they were one tensor's, if the value under `key` is above 0."""
    norm = optimizer.param_groups[0][key]  # the same in all groups
    if norm > 0:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, norm)
