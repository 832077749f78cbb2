"""Optimizers of torch with what runs need beside them: schedules, clipping, settings that are checked."""

from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator

from common.optimizers.base import (
    Groups,
    Schedule,
    ScheduledConfig,
    clip_together,
    require_steps,
    scheduled_factor,
    torch_groups,
)
from common.registry import OPTIMIZERS
from common.schemas import OptimizerConfig


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
            torch_groups(groups, config),
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
            torch_groups(groups, config),
            betas=(config.b1, config.b2),
            eps=config.eps,
            weight_decay=config.weight_decay,
        )
        require_steps(total_steps)
        for group in optimizer.param_groups:
            group.update(peak_lr=group["lr"], updates=0, max_grad_norm=config.max_grad_norm)
            group.update(milestones=list(config.milestones), milestone_factor=config.milestone_factor)
        return optimizer

    def step(self, closure: Any = None) -> Any:
        """Clips, sets the scheduled rates, then updates as torch does."""
        clip_together(self, "max_grad_norm")
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

    class Config(ScheduledConfig):
        """An entry of `optim:` of type AdamW."""

        b1: float = Field(ge=0, lt=1)  # decay of the mean of gradients
        b2: float = Field(ge=0, lt=1)  # decay of the mean of squared gradients; CLIP ViT: 0.98
        eps: float = Field(gt=0)  # CLIP ViT: 1e-6
        weight_decay: float = Field(ge=0)  # decoupled, of tensors with two or more dimensions; CLIP: 0.2

    @classmethod
    def build(cls, groups: Groups, config: Config, total_steps: int) -> "AdamW":
        """The optimizer of a model's groups, matrices and vectors apart; arguments as `BertAdam.build`."""
        halves = []
        for group in torch_groups(groups, config):
            for matrices in (True, False):
                members = [parameter for parameter in group["params"] if (parameter.ndim >= 2) == matrices]
                decay = config.weight_decay if matrices else 0.0
                halves.append({**group, "params": members, "weight_decay": decay})
        optimizer = cls(halves, betas=(config.b1, config.b2), eps=config.eps, fused=True)
        _attach_schedule(optimizer, config.schedule, config.warmup, total_steps)
        return optimizer

    def step(self, closure: Any = None) -> Any:
        """Sets the scheduled rates, then updates as torch does."""
        _set_rates(self)
        return super().step(closure)


def _attach_schedule(optimizer: torch.optim.Optimizer, schedule: Schedule, warmup: float, total_steps: int) -> None:
    """Puts schedule and count of updates into the groups, where state_dict keeps them."""
    require_steps(total_steps)
    for group in optimizer.param_groups:
        group.update(peak_lr=group["lr"], schedule=schedule, warmup=warmup, total_steps=total_steps, updates=0)


def _set_rates(optimizer: torch.optim.Optimizer) -> None:
    """Sets every group's rate for the update that follows."""
    for group in optimizer.param_groups:
        progress = group["updates"] / group["total_steps"]
        group["lr"] = group["peak_lr"] * scheduled_factor(group["schedule"], progress, group["warmup"])
        group["updates"] += 1
