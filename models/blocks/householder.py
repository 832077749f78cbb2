"""An orthogonal rotation of codes as a product of reflections."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class HouseholderRotation(nn.Module):
    """Reflects rows at as many hyperplanes as they have entries, one after the other.

    Args:
        width: R, length of the rows.

    Source:
        The rotation layer that the authors of DNcH and DAGtH published; the product of its reflections.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.eye(width))  # a normal vector in each column, of any length but 0

    def forward(self, rows: Tensor) -> Tensor:
        """`H_0 H_1 ... H_{R-1} z` of every row z, H_i = I - 2 v_i v_i^T: [..., R] -> [..., R]; -z at the start."""
        for normal in F.normalize(self.weights, dim=0).unbind(1)[::-1]:
            rows = rows - 2 * (rows @ normal).unsqueeze(-1) * normal
        return rows


def bit_variance(rows: Tensor) -> Tensor:
    """How undecided bits are: mean of `s (1 - s)` for the logistic function s of every entry [...]; in (0, 1/4].

    Source:
        The quantisation loss beside the rotation layer of DNcH's authors.
    """
    share = rows.sigmoid()
    return (share * (1 - share)).mean()
