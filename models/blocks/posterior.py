"""A linear head whose weights are a Gaussian: their means are trained, their spread follows a running curvature."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_EPS = 1e-6  # beside lengths and deviations


class PosteriorHead(nn.Module):
    """One linear map onto the unit sphere, with an online diagonal Laplace approximation of its weights.

    Args:
        width: Width E of the features.
        bits: K.
        curvature: Start of every entry of the Hessian's diagonal: the number of training rows.
        samples: n, draws of the weights that codes are the mean of; 0: the means alone.
        seed: Of these draws.

    Source:
        DPBE, ACM MM 2025.
    """

    hessian: Tensor
    noise: Tensor

    def __init__(self, width: int, bits: int, curvature: float, samples: int, seed: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, bits)
        size = bits * width + bits
        self.register_buffer("hessian", torch.full((size,), float(curvature)))
        # A function of the seed, so no checkpoint need hold it.
        noise = torch.randn(samples, size, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("noise", noise, persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """Features [B, E] -> relaxed codes [B, K] float32: the mean over the draws, or the point of the means."""
        if len(self.noise) == 0:
            return to_sphere(self.fc(features).float())
        return to_sphere(outputs_of(features.float(), *self.drawn(self.noise))).mean(0)

    def drawn(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Heads drawn from the posterior; gradients go to the means as if the deviations were constants.

        Args:
            noise: Standard normal draws of all weights row by row, then all biases, [n, K E + K].

        Returns:
            Weights [n, K, E] and biases [n, K].
        """
        deviations = noise / ((self.hessian.clamp(min=0) + 1).sqrt() + _EPS)
        split = self.fc.weight.numel()
        weights = self.fc.weight + deviations[:, :split].view(-1, *self.fc.weight.shape)
        return weights, self.fc.bias + deviations[:, split:]

    @torch.no_grad()
    def remember(self, curvature: Tensor, memory: float) -> None:
        """Moves the diagonal on: `memory` times what it was, and what is positive of `curvature` [K E + K]."""
        self.hessian.mul_(memory).add_(curvature.clamp(min=0))


def outputs_of(features: Tensor, weights: Tensor, biases: Tensor) -> Tensor:
    """What n heads make of features, before the sphere: [B, E], [n, K, E], [n, K] -> [n, B, K]."""
    return features @ weights.transpose(1, 2) + biases[:, None]


def to_sphere(outputs: Tensor) -> Tensor:
    """Rows over their length, which is a little too large: [..., K] -> [..., K]; a row of zeros stays."""
    return outputs / (outputs.norm(dim=-1, keepdim=True) + _EPS)


def head_curvature(features: Tensor, outputs: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum over rows of the diagonal of the Gauss-Newton matrix of `to_sphere` of a linear head.

    For a row f with output y, z = to_sphere(y) and Jacobian J = (I - z z^T) / |y|, the entry of weight (k, d) is
    `(J^T J)_kk f_d^2`, that of bias k `(J^T J)_kk`; no K x K matrix is made.

    Args:
        features: [B, E].
        outputs: Before the sphere, of n heads, [n, B, K].
        weights: Of the rows, [B].

    Returns:
        [n, K E + K], in the order of `PosteriorHead.drawn`.

    Source:
        DPBE, ACM MM 2025; the diagonal of stochman's linear and normalisation layers.
    """
    squares = to_sphere(outputs).square()
    diagonal = (1 - 2 * squares + squares * squares.sum(-1, keepdim=True)) / (
        outputs.norm(dim=-1, keepdim=True) + _EPS
    ) ** 2
    diagonal = diagonal * weights[:, None]  # [n, B, K]
    return torch.cat([(diagonal.transpose(1, 2) @ features.square()).flatten(1), diagonal.sum(1)], dim=1)


def sphere_cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosines of rows that `to_sphere` gave, [..., B, K] and [..., D, K] -> [..., B, D]."""
    return F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).transpose(-2, -1)
