"""Joins the parameter groups that a model declares with the optimizers and rates that the config gives them.

The optimizers themselves are the files of `common/optimizers/`.
"""

from collections.abc import Mapping
from typing import Any

import torch

from common.errors import UserError
from common.optimizers.base import Groups
from common.registry import OPTIMIZERS, near_names
from common.schemas import OptimizerConfig
from common.tensor_files import require_finite


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
        UserError: If the names of optimizers or of groups differ between config and model, a parameter stands twice, or
            an optimizer cannot be built.
    """
    _require_same_names(list(optim), list(groups), "optim", "optimizer")
    for name, entry in optim.items():
        if not callable(getattr(OPTIMIZERS.get(entry.type), "build", None)):
            raise UserError(
                f"optim.{name}.type: {entry.type} lacks the classmethod build(groups, config, total_steps), which "
                "every optimizer of common/optimizers/ has"
            )
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


def restore_optimizers(optimizers: Mapping[str, torch.optim.Optimizer], states: Mapping[str, Any], place: str) -> None:
    """Gives optimizers the state that those of a run before had.

    Args:
        optimizers: As `build_optimizers` made them; changed in place.
        states: Optimizer name -> its state dict.
        place: Where the states come from, for messages.

    Raises:
        UserError: If a state is not one of its optimizer, or a number in it is not finite.
    """
    for name, optimizer in optimizers.items():
        state = states.get(name)
        if not isinstance(state, dict) or not _is_state_of(state, optimizer):
            raise UserError(
                f"{place}: what it holds as optim.{name} is no state of {type(optimizer).__name__} for the parameters "
                "of this model; go on from an earlier checkpoint, or start a new run"
            )
        for number, entries in state["state"].items():
            numbers = {f"{name}.{number}.{key}": value for key, value in entries.items() if torch.is_tensor(value)}
            require_finite(numbers, place)
        # Settings that a later version of the optimizer added are those of the configuration.
        groups = zip(optimizer.state_dict()["param_groups"], state["param_groups"], strict=True)
        optimizer.load_state_dict({**state, "param_groups": [{**own, **group} for own, group in groups]})


def _is_state_of(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> bool:
    """Whether groups, their settings and the entries of parameters are such as this optimizer has."""
    fresh = optimizer.state_dict()
    if not (state.keys() == fresh.keys() and isinstance(state["state"], dict)):
        return False
    groups = state["param_groups"]
    if not (isinstance(groups, list) and len(groups) == len(fresh["param_groups"])):
        return False
    for group, own in zip(groups, fresh["param_groups"], strict=True):
        if not (isinstance(group, dict) and group.get("params") == own["params"]):
            return False
        if any(not _alike(value, own[key]) for key, value in group.items() if key in own):
            return False
    places = {place for group in groups for place in group["params"]}
    return state["state"].keys() <= places and all(isinstance(entry, dict) for entry in state["state"].values())


def _alike(a: Any, b: Any) -> bool:
    """Whether two settings are of one type; whole numbers may stand for others."""
    return type(a) is type(b) or (isinstance(a, int | float) and isinstance(b, int | float))


def _require_same_names(given: list[str], needed: list[str], place: str, kind: str) -> None:
    unknown = [name for name in given if name not in needed]
    missing = [name for name in needed if name not in given]
    faults = [f"{place}.{name}: the model has no such {kind}{near_names(name, needed)}" for name in unknown]
    faults += [f"{place}.{name} is missing" for name in missing]
    if faults:
        raise UserError(f"{', '.join(faults)}; the model's are: {', '.join(needed)}")
