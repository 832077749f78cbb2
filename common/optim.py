"""The optimizers that the YAML's `optim:` section may name: BertAdam exactly as CLIP hashing uses it, SGD, Adam, AdamW.

`build_optimizers` joins the parameter groups that a model declares with the settings that the config gives them.
Rates follow the number of updates, never the number of processes.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, Self, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import Parameter

from common.errors import UserError
from common.registry import OPTIMIZERS, near_names
from common.schemas import OptimizerConfig

Groups = dict[str, list[Parameter]]
Schedule = Literal["constant", "warmup_constant", "warmup_linear", "warmup_cosine"]


# ---------------------------------------------------------------------------------------------- schedules


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


class _ScheduledConfig(OptimizerConfig):
    """Settings of an optimizer whose rate warms up."""

    schedule: Schedule  # shape of the learning rate over the run, see scheduled_factor
    warmup: float = Field(ge=0, lt=1)  # fraction of all updates over which the rate rises from 0; constant ignores it


# ---------------------------------------------------------------------------------------------- BertAdam


@OPTIMIZERS.register("BertAdam")
class BertAdam(torch.optim.Optimizer):
    """Adam without bias correction, with decoupled weight decay and each tensor's gradient clipped by its own norm.

    For every tensor p with gradient g, which has had n updates so far:

        g <- g min(1, c / (|g| + 1e-6))        in place, norm of this tensor alone
        m <- b1 m + (1 - b1) g
        v <- b2 v + (1 - b2) g^2
        p <- p - lr f(n / T) (m / (sqrt(v) + eps) + weight_decay p)
        n <- n + 1

    A tensor without a gradient is skipped: it does not decay and its n stays. Every warm-up starts at f(0) = 0, so a
    tensor's first update fills m and v and leaves p. Since clipping is per tensor, merging or splitting parameters
    changes the result.

    Args:
        params: Parameter groups, each with its `lr`.
        schedule: See `scheduled_factor`.
        warmup: Fraction of all updates that warm-up takes, in [0, 1).
        total_steps: T, number of updates of the whole run, > 0.
        b1: Decay of the mean of gradients, in [0, 1).
        b2: Decay of the mean of squared gradients, in [0, 1).
        eps: Added outside the root, > 0.
        weight_decay: Applied to every tensor, biases and LayerNorms too.
        max_grad_norm: c; 0 or less does not clip.

    Raises:
        ValueError: If `total_steps` is not positive.

    Source:
        BertAdam of pytorch-pretrained-BERT as CLIP4Clip, DCMHT and MITH carry it.
    """

    class Config(_ScheduledConfig):
        """An entry of `optim:` of type BertAdam."""

        b1: float = Field(ge=0, lt=1)  # decay of the mean of gradients; all CLIP hashing papers: 0.9
        b2: float = Field(ge=0, lt=1)  # decay of the mean of squared gradients; 0.98, not Adam's 0.999
        eps: float = Field(gt=0)  # outside the root; 1e-6
        weight_decay: float = Field(ge=0)  # decoupled, times the scheduled rate; 0.2, MITH 0.01
        max_grad_norm: float  # largest norm of one tensor's gradient; 1, and 0 or less does not clip

    def __init__(
        self,
        params: Sequence[dict[str, Any]],
        *,
        schedule: Schedule,
        warmup: float,
        total_steps: int,
        b1: float,
        b2: float,
        eps: float,
        weight_decay: float,
        max_grad_norm: float,
    ) -> None:
        _require_steps(total_steps)
        defaults = {
            "schedule": schedule,
            "warmup": warmup,
            "total_steps": total_steps,
            "b1": b1,
            "b2": b2,
            "eps": eps,
            "weight_decay": weight_decay,
            "max_grad_norm": max_grad_norm,
        }
        super().__init__(params, defaults)

    @classmethod
    def build(cls, groups: Groups, config: Config, total_steps: int) -> "BertAdam":
        """The optimizer of a model's groups.

        Args:
            groups: Group name -> parameters; every name stands in `config.lr`.
            config: Settings.
            total_steps: Updates of the whole run.
        """
        return cls(
            _torch_groups(groups, config),
            schedule=config.schedule,
            warmup=config.warmup,
            total_steps=total_steps,
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Updates every tensor that has a gradient.

        Args:
            closure: Recomputes the loss with gradients, if given.

        Returns:
            The closure's loss, else None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            alike: defaultdict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike[parameter.device, parameter.dtype].append(parameter)
            for parameters in alike.values():
                self._update(parameters, group)
        return loss

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """One update of tensors of one device and dtype; a few fused calls however many tensors there are."""
        gradients = [cast(Tensor, parameter.grad) for parameter in parameters]
        states = [self._state_of(parameter) for parameter in parameters]
        means = [state["exp_avg"] for state in states]
        squares = [state["exp_avg_sq"] for state in states]
        rates = [_rate(group, state["step"]) for state in states]

        if group["max_grad_norm"] > 0:
            norms = torch.stack(torch._foreach_norm(gradients))
            scales = (group["max_grad_norm"] / (norms + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(gradients, list(scales.unbind()))
        torch._foreach_mul_(means, group["b1"])
        torch._foreach_add_(means, gradients, alpha=1 - group["b1"])
        torch._foreach_mul_(squares, group["b2"])
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - group["b2"])
        roots = torch._foreach_sqrt(squares)
        torch._foreach_add_(roots, group["eps"])
        updates = torch._foreach_div(means, roots)
        if group["weight_decay"] > 0:
            # Added to the update: p (1 - lr decay) would lose the decay to rounding at a rate of 1e-6.
            torch._foreach_add_(updates, parameters, alpha=group["weight_decay"])
        torch._foreach_mul_(updates, rates)
        torch._foreach_sub_(parameters, list(updates))
        for state in states:
            state["step"] += 1

    def _state_of(self, parameter: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state

    def get_lr(self) -> list[float]:
        """Rate of the next update of every tensor that has a gradient; [0] before the first update of any of them."""
        rates: list[float] = []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if not self.state.get(parameter):
                    return [0.0]
                rates.append(_rate(group, self.state[parameter]["step"]))
        return rates


def _rate(group: Mapping[str, Any], step: int) -> float:
    """Learning rate of a group's update number `step`, from 0."""
    return cast(float, group["lr"] * scheduled_factor(group["schedule"], step / group["total_steps"], group["warmup"]))


@OPTIMIZERS.register("ClippedBertAdam")
class ClippedBertAdam(BertAdam):
    """BertAdam after clipping by the norm of all gradients together, which keeps their direction.

    Source:
        torch.nn.utils.clip_grad_norm_, which the trainers of DPSIH and DGHDGH call before BertAdam.
    """

    class Config(BertAdam.Config):
        """An entry of `optim:` of type ClippedBertAdam."""

        max_total_norm: float = Field(gt=0)  # largest norm of all gradients of this optimizer together

    @classmethod
    def build(cls, groups: Groups, config: BertAdam.Config, total_steps: int) -> "ClippedBertAdam":
        """The optimizer of a model's groups; arguments as `BertAdam.build`."""
        optimizer = cast(ClippedBertAdam, super().build(groups, config, total_steps))
        for group in optimizer.param_groups:
            group["max_total_norm"] = cast(ClippedBertAdam.Config, config).max_total_norm
        return optimizer

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Clips, then updates as BertAdam does; arguments as there."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        _clip_together(self, "max_total_norm")
        super().step()
        return loss


# ---------------------------------------------------------------------------------------------- torch's own


@OPTIMIZERS.register("SGD")
class SGD(torch.optim.SGD):
    """torch's SGD, for proxies and for methods that train without Adam.

    Source:
        torch.optim.SGD.
    """

    class Config(OptimizerConfig):
        """An entry of `optim:` of type SGD."""

        momentum: float = Field(ge=0, lt=1)
        weight_decay: float = Field(ge=0)  # added to the gradient
        nesterov: bool  # needs momentum
        schedule: Literal["constant", "cosine"]  # cosine: from lr to 0 over the run

        @model_validator(mode="after")
        def _momentum_for_nesterov(self) -> Self:
            if self.nesterov and self.momentum == 0:
                raise ValueError("nesterov: true needs momentum above 0")
            return self

    @classmethod
    def build(cls, groups: Groups, config: Config, total_steps: int) -> "SGD":
        """The optimizer of a model's groups; arguments as `BertAdam.build`."""
        optimizer = cls(
            _torch_groups(groups, config),
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.nesterov,
        )
        schedule: Schedule = "warmup_cosine" if config.schedule == "cosine" else "constant"
        _attach_schedule(optimizer, schedule, 0.0, total_steps)
        return optimizer

    def step(self, closure: Any = None) -> Any:
        """Sets the scheduled rates, then updates as torch does."""
        _set_rates(self)
        return super().step(closure)


@OPTIMIZERS.register("Adam")
class Adam(torch.optim.Adam):
    """torch's Adam, whose weight decay is added to the gradient, after clipping by the norm of all gradients together.

    Source:
        torch.optim.Adam; torch.nn.utils.clip_grad_norm_.
    """

    class Config(OptimizerConfig):
        """An entry of `optim:` of type Adam."""

        b1: float = Field(ge=0, lt=1)  # decay of the mean of gradients
        b2: float = Field(ge=0, lt=1)  # decay of the mean of squared gradients
        eps: float = Field(gt=0)  # outside the root
        weight_decay: float = Field(ge=0)  # added to the gradient of every tensor
        max_grad_norm: float  # largest norm of all gradients of this optimizer together; 0 or less does not clip
        milestones: list[Annotated[int, Field(gt=0)]]  # numbers of updates after each of which the rate is multiplied
        milestone_factor: float = Field(gt=0)  # by this

    @classmethod
    def build(cls, groups: Groups, config: Config, total_steps: int) -> "Adam":
        """The optimizer of a model's groups; arguments as `BertAdam.build`."""
        optimizer = cls(
            _torch_groups(groups, config),
            betas=(config.b1, config.b2),
            eps=config.eps,
            weight_decay=config.weight_decay,
        )
        _require_steps(total_steps)
        for group in optimizer.param_groups:
            group.update(peak_lr=group["lr"], updates=0, max_grad_norm=config.max_grad_norm)
            group.update(milestones=list(config.milestones), milestone_factor=config.milestone_factor)
        return optimizer

    def step(self, closure: Any = None) -> Any:
        """Clips, sets the scheduled rates, then updates as torch does."""
        _clip_together(self, "max_grad_norm")
        for group in self.param_groups:
            passed = sum(group["updates"] >= milestone for milestone in group["milestones"])
            group["lr"] = group["peak_lr"] * group["milestone_factor"] ** passed
            group["updates"] += 1
        return super().step(closure)


@OPTIMIZERS.register("AdamW")
class AdamW(torch.optim.AdamW):
    """torch's AdamW, one pass over every tensor, with BertAdam's schedules, for training a CLIP.

    Matrices decay; vectors and scalars (biases, LayerNorms, the temperature) do not, as CLIP was trained.

    Source:
        torch.optim.AdamW; Radford et al., ICML 2021, Section 2.5.
    """

    class Config(_ScheduledConfig):
        """An entry of `optim:` of type AdamW."""

        b1: float = Field(ge=0, lt=1)  # decay of the mean of gradients
        b2: float = Field(ge=0, lt=1)  # decay of the mean of squared gradients; CLIP ViT: 0.98
        eps: float = Field(gt=0)  # CLIP ViT: 1e-6
        weight_decay: float = Field(ge=0)  # decoupled, of tensors with two or more dimensions; CLIP: 0.2

    @classmethod
    def build(cls, groups: Groups, config: Config, total_steps: int) -> "AdamW":
        """The optimizer of a model's groups, matrices and vectors apart; arguments as `BertAdam.build`."""
        torch_groups = []
        for group in _torch_groups(groups, config):
            for matrices in (True, False):
                members = [parameter for parameter in group["params"] if (parameter.ndim >= 2) == matrices]
                decay = config.weight_decay if matrices else 0.0
                torch_groups.append({**group, "params": members, "weight_decay": decay})
        optimizer = cls(torch_groups, betas=(config.b1, config.b2), eps=config.eps, fused=True)
        _attach_schedule(optimizer, config.schedule, config.warmup, total_steps)
        return optimizer

    def step(self, closure: Any = None) -> Any:
        """Sets the scheduled rates, then updates as torch does."""
        _set_rates(self)
        return super().step(closure)


def _clip_together(optimizer: torch.optim.Optimizer, key: str) -> None:
    """Clips all gradients by their norm as if they were one tensor's, if the value under `key` is above 0."""
    norm = optimizer.param_groups[0][key]  # the same in all groups
    if norm > 0:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, norm)


def _attach_schedule(optimizer: torch.optim.Optimizer, schedule: Schedule, warmup: float, total_steps: int) -> None:
    """Puts schedule and count of updates into the groups, where state_dict keeps them."""
    _require_steps(total_steps)
    for group in optimizer.param_groups:
        group.update(peak_lr=group["lr"], schedule=schedule, warmup=warmup, total_steps=total_steps, updates=0)


def _set_rates(optimizer: torch.optim.Optimizer) -> None:
    """Sets every group's rate for the update that follows."""
    for group in optimizer.param_groups:
        progress = group["updates"] / group["total_steps"]
        group["lr"] = group["peak_lr"] * scheduled_factor(group["schedule"], progress, group["warmup"])
        group["updates"] += 1


# ---------------------------------------------------------------------------------------------- building


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


def _torch_groups(groups: Groups, config: OptimizerConfig) -> list[dict[str, Any]]:
    return [{"name": name, "params": parameters, "lr": config.lr[name]} for name, parameters in groups.items()]


def _require_steps(total_steps: int) -> None:
    if total_steps <= 0:
        raise ValueError(f"total_steps must be positive, not {total_steps}")
