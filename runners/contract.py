"""Guards of the contract of `models/base.py`: what a method gives is checked where it is first taken."""

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.types import DataInfo
from models.base import HashingModel, ParamGroups
from models.clip.towers import CLIP
from utils.distributed import world_size

logger = logging.getLogger(__name__)
_OF_TORCH = vars(nn.Module()).keys()  # what every module keeps of its own
_SEVERAL = (list, tuple, set, deque)  # collections that attributes may be
Form = dict[str, tuple[torch.Size, torch.dtype]]  # name of an entry of a state -> its shape and kind


def require_whole(cls: Any, name: str) -> None:
    """Refuses a registered class that lacks something which every method has.

    Args:
        cls: What is registered.
        name: Under which name.

    Raises:
        UserError: With what is lacking.
    """
    if not (isinstance(cls, type) and issubclass(cls, HashingModel)):
        raise UserError(f"{name} is no HashingModel; derive its class from ClipHashingModel or HashingModel")
    lacking = [*sorted(cls.__abstractmethods__), *([] if hasattr(cls, "fields") else ["fields"])]
    if lacking:
        raise UserError(f"{name} lacks {', '.join(lacking)}, which models/base.py asks of every method")
    for fields in ("fields", "image_fields", "text_fields", "optional_fields"):
        value = getattr(cls, fields)
        if not isinstance(value, Set) or not all(isinstance(field, str) for field in value):
            raise UserError(f'{name}.{fields} is no set of names; write frozenset({{"image", "text"}}) with your own')


def require_backbone(model: HashingModel, data: DataInfo) -> None:
    """Refuses a prepared method whose CLIP has nothing of the pretrained weights; warns of one under another name.

    Raises:
        UserError: As said.
    """
    if data.backbone is None:
        return
    towers = dict(model.named_children()).get("backbone")
    if not isinstance(towers, CLIP):
        logger.warning(
            "%s has no CLIP as its attribute backbone, where checkpoints look for it: other uses than --evaluate will "
            "refuse them; name it so, or derive the class from ClipHashingModel",
            type(model).__name__,
        )
        return
    if data.clip.weights is not None:
        own = towers.state_dict()
        matrices = (name for name, value in data.clip.weights.items() if value.ndim > 1 and name in own)
        if not any(torch.equal(own[name], data.clip.weights[name].to(own[name].dtype)) for name in matrices):
            raise UserError(
                f"{type(model).__name__}.prepare left CLIP without its weights; call super().prepare(data) in it"
            )


def trained_groups(model: HashingModel) -> ParamGroups:
    """What `param_groups` says, each group as a list.

    Raises:
        UserError: If it has another form, or a trainable parameter stands in no group.
    """
    place, said = f"{type(model).__name__}.param_groups", model.param_groups()
    if not isinstance(said, Mapping) or not all(isinstance(groups, Mapping) for groups in said.values()):
        raise UserError(
            f'{place} returns no {{optimizer: {{group: parameters}}}}, such as {{"main": {{"head": [...]}}}}'
        )
    taken: ParamGroups = {}
    for name, groups in said.items():
        taken[name] = {}
        for group, parameters in groups.items():
            members = list(parameters) if isinstance(parameters, Iterable) else [parameters]
            if isinstance(parameters, Tensor) or not all(isinstance(p, nn.Parameter) for p in members):
                raise UserError(f"{place}: {name}.{group} is no list of parameters, as list(self.head.parameters()) is")
            taken[name][group] = members
    grouped = {id(parameter) for groups in taken.values() for group in groups.values() for parameter in group}
    left_out = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in grouped]
    if left_out:
        raise UserError(
            f"{place} leaves out {len(left_out)} trainable parameters (first: {left_out[0]}); put them in a group, or "
            "set requires_grad_(False)"
        )
    return taken


def require_gradients(model: HashingModel) -> None:
    """Names what the first step of a run did not train, after the backward pass of its loss.

    Raises:
        UserError: If the model says that its loss reaches every trainable parameter, and it does not, where several
            processes would wait for the gradients that do not come.
    """
    if not model.loss_reaches_all:
        return
    left_out = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if left_out:
        said = (
            f"{type(model).__name__}: the loss does not depend on {len(left_out)} trainable parameters (first: "
            f"{left_out[0]}); remove them, set requires_grad_(False), or, if another step's loss does, let "
            "loss_reaches_all be False"
        )
        if world_size() > 1:
            raise UserError(said)
        logger.warning("%s", said)


def form_of_state(model: HashingModel) -> Form:
    """Names, shapes and kinds of what a checkpoint keeps of a model.

    Raises:
        UserError: If a checkpoint cannot keep all of its state, or not give it back.
    """
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            what = f"is a {type(value).__name__}, but a checkpoint keeps tensors alone; keep it in a buffer"
        elif any(size > 1 and step == 0 for size, step in zip(value.shape, value.stride(), strict=True)):
            what = "has several places for one number (expand), so nothing can be read into it; register a clone()"
        else:
            continue
        raise UserError(f"{type(model).__name__}: {name} of its state {what}")
    return {name: (value.shape, value.dtype) for name, value in model.state_dict().items()}


def require_form(model: HashingModel, form: Form) -> None:
    """Refuses a state that has changed its form in training: a checkpoint is read into a model that is built anew.

    Args:
        model: The model.
        form: Of its state before the first step.

    Raises:
        UserError: With the first entry that differs.
    """
    now = form_of_state(model)
    for name in sorted(form.keys() | now.keys()):
        if form.get(name) != now.get(name):
            before, after = (f"{list(of[name][0])} {of[name][1]}" if name in of else "nothing" for of in (form, now))
            raise UserError(
                f"{type(model).__name__}: {name} of its state was {before} and is now {after}, so that no checkpoint "
                "could be read back; register it with its final shape and write into it"
            )


def warn_of_loose_state(model: HashingModel) -> None:
    """Names tensors and modules of a model that are not registered: no optimizer, device or checkpoint gets them."""
    for name, kind in _loose(model):
        logger.warning(
            "%s: %s is a %s that no checkpoint keeps and no device gets; register it %s",
            type(model).__name__,
            name,
            kind,
            "with register_buffer, or use a local variable" if kind == "tensor" else "in an nn.ModuleList, say",
        )


def _loose(model: HashingModel) -> Iterator[tuple[str, str]]:
    """Name and kind of attributes with a tensor or module, itself or in a collection, that is not registered."""
    registered = {id(value) for value in (*model.parameters(), *model.buffers(), *model.modules())}
    for place, module in model.named_modules():
        for key, value in vars(module).items():
            inside = value.values() if isinstance(value, dict) else value if isinstance(value, _SEVERAL) else [value]
            kinds = {type(part) for part in inside if id(part) not in registered} if key not in _OF_TORCH else ()
            for kind, base in (("tensor", Tensor), ("module", nn.Module)):
                if any(issubclass(found, base) for found in kinds):
                    yield f"{place}.{key}".lstrip("."), kind
