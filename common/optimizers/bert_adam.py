"""BertAdam exactly as CLIP hashing uses it, and the same after clipping all gradients together."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, cast

import torch
from pydantic import Field
from torch import Tensor

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

_NUMBERS_OF_A_CORE = 1 << 16  # that one core updates at a time; with their state they stay in its cache


class BertAdamConfig(ScheduledConfig):
    """An entry of `optim:` of type BertAdam."""

    b1: float = Field(ge=0, lt=1)  # decay of the mean of gradients; all CLIP hashing papers: 0.9
    b2: float = Field(ge=0, lt=1)  # decay of the mean of squared gradients; 0.98, not Adam's 0.999
    eps: float = Field(gt=0)  # outside the root; 1e-6
    weight_decay: float = Field(ge=0)  # decoupled, times the scheduled rate; 0.2, MITH 0.01
    max_grad_norm: float  # largest norm of one tensor's gradient; 1, and 0 or less does not clip


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

    Config: ClassVar[type[BertAdamConfig]] = BertAdamConfig

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
        require_steps(total_steps)
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
    def build(cls, groups: Groups, config: BertAdamConfig, total_steps: int) -> "BertAdam":
        """The optimizer of a model's groups.

        Args:
            groups: Group name -> parameters; every name stands in `config.lr`.
            config: Settings.
            total_steps: Updates of the whole run.
        """
        return cls(
            torch_groups(groups, config),
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
        """One update of tensors of one device and dtype."""
        gradients = [cast(Tensor, parameter.grad) for parameter in parameters]
        states = [self._state_of(parameter) for parameter in parameters]
        scales: Sequence[Tensor | None] = [None] * len(parameters)
        if group["max_grad_norm"] > 0:
            norms = torch.stack(torch._foreach_norm(gradients))
            scales = (group["max_grad_norm"] / (norms + 1e-6)).clamp(max=1.0).unbind()
        pieces = [
            _Piece(parameter, gradient, state["exp_avg"], state["exp_avg_sq"], _rate(group, state["step"]), scale)
            for parameter, gradient, state, scale in zip(parameters, gradients, states, scales, strict=True)
        ]
        for some in _in_cache(pieces) if parameters[0].device.type == "cpu" else [pieces]:
            _update_together(some, group)
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


class _Piece(NamedTuple):
    """A tensor, or a part of one, with what its update needs.

    Attributes:
        parameter: Any shape.
        gradient: Of the same shape, as the others.
        mean: Of its gradients.
        square: Mean of its squared gradients.
        rate: Learning rate.
        scale: Factor that clips the gradient, []; None where nothing is clipped.
    """

    parameter: Tensor
    gradient: Tensor
    mean: Tensor
    square: Tensor
    rate: float
    scale: Tensor | None

    def parts(self, size: int) -> Iterator["_Piece"]:
        """The same in parts of at most so many numbers, where it is stored in one piece."""
        tensors = self[:4]
        if self.parameter.numel() <= size or not all(tensor.is_contiguous() for tensor in tensors):
            yield self
            return
        for parameter, gradient, mean, square in zip(*(tensor.view(-1).split(size) for tensor in tensors), strict=True):
            yield _Piece(parameter, gradient, mean, square, self.rate, self.scale)


def _in_cache(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    """The pieces in portions that the caches of a CPU hold, since an update passes over every number eleven times."""
    size = _NUMBERS_OF_A_CORE * torch.get_num_threads()
    portion: list[_Piece] = []
    filled = 0
    for piece in pieces:
        for part in piece.parts(size):
            if portion and filled + part.parameter.numel() > size:
                yield portion
                portion, filled = [], 0
            portion.append(part)
            filled += part.parameter.numel()
    yield portion


def _update_together(pieces: Iterable[_Piece], group: Mapping[str, Any]) -> None:
    """One update in a few fused calls, however many tensors there are."""
    parameters, gradients, means, squares, rates, scales = (list(each) for each in zip(*pieces, strict=True))
    if scales[0] is not None:
        torch._foreach_mul_(gradients, scales)
    torch._foreach_mul_(means, group["b1"])
    torch._foreach_add_(means, gradients, alpha=1 - group["b1"])
    torch._foreach_mul_(squares, group["b2"])
    torch._foreach_addcmul_(squares, gradients, gradients, 1 - group["b2"])
    updates = torch._foreach_sqrt(squares)
    torch._foreach_add_(updates, group["eps"])
    updates = torch._foreach_div(means, updates)
    if group["weight_decay"] > 0:
        # Added to the update: p (1 - lr decay) would lose the decay to rounding at a rate of 1e-6.
        torch._foreach_add_(updates, parameters, alpha=group["weight_decay"])
    torch._foreach_mul_(updates, rates)
    torch._foreach_sub_(parameters, list(updates))


def _rate(group: Mapping[str, Any], step: int) -> float:
    """Learning rate of a group's update number `step`, from 0."""
    return cast(float, group["lr"] * scheduled_factor(group["schedule"], step / group["total_steps"], group["warmup"]))


class ClippedBertAdamConfig(BertAdamConfig):
    """An entry of `optim:` of type ClippedBertAdam."""

    max_total_norm: float = Field(gt=0)  # largest norm of all gradients of this optimizer together


@OPTIMIZERS.register("ClippedBertAdam")
class ClippedBertAdam(BertAdam):
    """BertAdam after clipping by the norm of all gradients together, which keeps their direction.

    Source:
        torch.nn.utils.clip_grad_norm_, which the trainers of DPSIH and DGHDGH call before BertAdam.
    """

    Config: ClassVar[type[BertAdamConfig]] = ClippedBertAdamConfig

    @classmethod
    def build(cls, groups: Groups, config: BertAdamConfig, total_steps: int) -> "ClippedBertAdam":
        """The optimizer of a model's groups; arguments as `BertAdam.build`."""
        optimizer = cast(ClippedBertAdam, super().build(groups, config, total_steps))
        for group in optimizer.param_groups:
            group["max_total_norm"] = cast(ClippedBertAdamConfig, config).max_total_norm
        return optimizer

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Clips, then updates as BertAdam does; arguments as there."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        clip_together(self, "max_total_norm")
        super().step()
        return loss
