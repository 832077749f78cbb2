"""Joins the parameter groups that a model declares with the optimizers and rates that the config gives them.

The optimizers themselves are the files of `common/optimizers/`.
"""

from collections.abc import Mapping

import torch

from common.errors import UserError
from common.optimizers.base import Groups
from common.registry import OPTIMIZERS, near_names
from common.schemas import OptimizerConfig


def build_optimizers(
    optim: Mapping[str, OptimizerConfig], groups: Mapping[str, Groups], total_steps: int
) -> dict[str, torch.optim.Optimizer]:
    """The optimizers of a run.

    Args:
        optim: The YAML's `optim:` section, optimizer name -> settings.
        groups: What the model's `param_groups` returned, optimizer name -> group name -> parameters.
        total_steps: Updates of the whole run, > 0.

    Returns:
        Optimizer name -> optimizer, in the model's order.

    Raises:
        UserError: If the names of optimizers or of groups differ between config and model, or a parameter stands twice.
    """
    _require_same_names(list(optim), list(groups), "optim", "optimizer")
    owner: dict[int, str] = {}
    for name, members in groups.items():
        _require_same_names(list(optim[name].lr), list(members), f"optim.{name}.lr", "parameter group")
        for group, parameters in members.items():
            for parameter in parameters:
                place = f"{name}.{group}"
                if id(parameter) in owner:
                    raise UserError(
                        f"param_groups: a parameter of shape {list(parameter.shape)} stands in {owner[id(parameter)]} "
                        f"and again in {place}; name every parameter once"
                    )
                owner[id(parameter)] = place
    return {
        name: OPTIMIZERS.get(optim[name].type).build(members, optim[name], total_steps)
        for name, members in groups.items()
    }


def _require_same_names(given: list[str], needed: list[str], place: str, kind: str) -> None:
    unknown = [name for name in given if name not in needed]
    missing = [name for name in needed if name not in given]
    faults = [f"{place}.{name}: the model has no such {kind}{near_names(name, needed)}" for name in unknown]
    faults += [f"{place}.{name} is missing" for name in missing]
    if faults:
        raise UserError(f"{', '.join(faults)}; the model's are: {', '.join(needed)}")
