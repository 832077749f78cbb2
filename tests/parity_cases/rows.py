"""How quantities are compared with recorded ones: bounds, and the row that is printed of each."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Arrays = Mapping[str, Any]
Named = Mapping[str, Tensor]


@dataclass(frozen=True)
class Bound:
    """How far a value may be from the reference's.

    Attributes:
        text: As it is printed.
        allowed: Reference values [...] -> largest error allowed for each, [...].
    """

    text: str
    allowed: Callable[[Tensor], Tensor]


def absolute(value: float) -> Bound:
    """The same error everywhere."""
    return Bound(f"{value:g} absolute", lambda reference: torch.full_like(reference, value))


EQUAL = Bound("equal", torch.zeros_like)
OUTPUTS = absolute(5e-5)
PROBABILITIES = absolute(1e-4)
LOSS = Bound("5e-5 relative or 1e-6", lambda reference: (5e-5 * reference.abs()).clamp(min=1e-6))
LOOSE_TERM = Bound("5e-5 relative or 1e-4", lambda reference: (5e-5 * reference.abs()).clamp(min=1e-4))
GRADIENTS = Bound("3e-4 of the largest", lambda reference: 3e-4 * reference.abs().max().expand_as(reference))
TRAJECTORY = Bound("1e-4 relative", lambda reference: 1e-4 * reference.abs())
BANKS = Bound("1e-3 or 1e-5 relative", lambda reference: (1e-5 * reference.abs()).clamp(min=1e-3))
METRICS = absolute(1e-6)


def weights_bound(value: float) -> Bound:
    """An absolute error and 1e-4 of the value."""
    return Bound(f"{value:g} + 1e-4 relative", lambda reference: value + 1e-4 * reference.abs())


@dataclass(frozen=True)
class Row:
    """The verdict on one quantity of one case.

    Attributes:
        case: File name.
        quantity: What was compared.
        passed: Whether every value is within its bound.
        error: Largest error over the largest magnitude of its array; the worst array counts.
        bound: The bound in words.
        note: Number of arrays, or what is wrong.
    """

    case: str
    quantity: str
    passed: bool
    error: float
    bound: str
    note: str

    def __str__(self) -> str:
        verdict = "pass" if self.passed else "FAIL"
        return f"{self.case:<38} {self.quantity:<24} {self.error:9.2e}  {self.bound:<24} {verdict}  {self.note}"


def compare(case: str, quantity: str, ours: Named, reference: Named, bound: Bound | Mapping[str, Bound]) -> Row:
    """Compares named arrays.

    Args:
        case: File name.
        quantity: What they are.
        ours: What this library computed; must hold every name of `reference`.
        reference: What the reference computed, [...] each.
        bound: One for all, or one for each name.

    Returns:
        The row.
    """
    error = 0.0
    faults = [] if reference else ["the case records nothing of it"]
    bounds = {name: bound if isinstance(bound, Bound) else bound[name] for name in reference}
    for name, wanted in reference.items():
        if name not in ours:
            faults.append(f"{name}: not computed by this library")
            continue
        wanted, got = wanted.detach().double(), ours[name].detach().double()
        if got.shape != wanted.shape:
            faults.append(f"{name}: shape {tuple(got.shape)} instead of {tuple(wanted.shape)}")
            continue
        if wanted.numel() == 0:
            continue
        both_nan = got.isnan() & wanted.isnan()
        difference = torch.where(both_nan, 0.0, (got - wanted).abs()).nan_to_num(nan=torch.inf)
        largest = float(wanted.nan_to_num(nan=0.0).abs().max())
        relative = float(difference.max()) / largest if largest > 0 else float(difference.max())
        error = max(error, relative)
        excess = float((difference - bounds[name].allowed(wanted).nan_to_num(nan=0.0)).max())
        if excess > 0:
            faults.append(f"{name}: error {float(difference.max()):.2e}, largest value {largest:.2e}")
    text = "; ".join(sorted({one.text for one in bounds.values()}))
    count = f"{len(reference)} array" + "s" * (len(reference) != 1)
    return Row(case, quantity, not faults, error, text, f"{count}; {'; '.join(faults[:3])}" if faults else count)
