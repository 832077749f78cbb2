"""Equations on sets of vectors, and the triplet loss weighted by label gain: pure functions, one equation each.

An item is a set of M member vectors. Letters beside the usual ones: M members of a set, W width of a member.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from einops import einsum
from torch import Tensor

from common.similarity import label_similarity

SetMode = Literal["smooth_chamfer", "chamfer", "max", "avg"]
DiversityScope = Literal["batch", "sample"]

TRIPLETS_AT_ONCE = 2**22  # entries of the largest temporary of `weighted_triplet`; 16 MiB of float32
DIVERSITY_SHARPNESS = 20.0  # factor of the squared distance; a constant of the authors' code
ACTIVE_TRIPLET = 1e-16  # a triplet that costs no more does not count in the mean


# ---------------------------------------------------------------------------------------------- similarity of sets


def set_cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosines between the members of all pairs of sets.

    Args:
        a: Sets, [N, A, W]; members need not be normalised.
        b: Sets, [M, B, W].

    Returns:
        [N, M, A, B], values in [-1, 1].
    """
    return einsum(F.normalize(a, dim=-1), F.normalize(b, dim=-1), "N A W, M B W -> N M A B")


def smooth_chamfer(cosines: Tensor, temperature: float, scale: float, denominator: float) -> Tensor:
    """How well every member of either set finds a partner in the other, with a soft maximum.

    With t the temperature and s the scale: the mean over members of the first set of `log(sum e^(t s c)) / (t s)`, plus
    the mean over members of the second set of `log(sum e^(t c)) / t`, divided by the denominator. The soft maximum
    exceeds the maximum by up to log(M) / t, so the result can exceed 1.

    Args:
        cosines: Cosines between members, [..., A, B].
        temperature: t > 0; the larger, the closer to `chamfer`.
        scale: s > 0, of the first set's temperature.
        denominator: 2 averages the two directions.

    Returns:
        [...].

    Source:
        Kim et al., "Improving Cross-Modal Retrieval with Set of Diverse Embeddings", CVPR 2023; DIMCH, TIP 2025.
    """
    sharp = temperature * scale
    first = (sharp * cosines).logsumexp(-1).mean(-1) / sharp
    second = (temperature * cosines).logsumexp(-2).mean(-1) / temperature
    return (first + second) / denominator


def chamfer(cosines: Tensor, denominator: float) -> Tensor:
    """How well every member of either set finds a partner in the other: means of the best cosines.

    Args:
        cosines: Cosines between members, [..., A, B].
        denominator: 2 averages the two directions.

    Returns:
        [...].

    Source:
        DIMCH, TIP 2025, option of the authors' code.
    """
    return (cosines.max(-1).values.mean(-1) + cosines.max(-2).values.mean(-1)) / denominator


def set_distance(cosines: Tensor, mode: SetMode, temperature: float, scale: float, denominator: float) -> Tensor:
    """Distance of sets, `max(0, 1 - similarity)`; where the similarity exceeds 1 no gradient flows.

    Args:
        cosines: Cosines between members, [..., A, B].
        mode: `smooth_chamfer`, `chamfer`, `max` (the best cosine) or `avg` (mean of the cosines' sigmoids).
        temperature: Of `smooth_chamfer`.
        scale: Of the first set's temperature in `smooth_chamfer`.
        denominator: Of both Chamfer similarities.

    Returns:
        [...], values >= 0.

    Source:
        DIMCH, TIP 2025, with the options of the authors' code.
    """
    if mode == "smooth_chamfer":
        similarity = smooth_chamfer(cosines, temperature, scale, denominator)
    elif mode == "chamfer":
        similarity = chamfer(cosines, denominator)
    elif mode == "max":
        similarity = cosines.flatten(-2).max(-1).values
    else:
        similarity = cosines.sigmoid().mean((-2, -1))
    return (1 - similarity).clamp(min=0)


# ---------------------------------------------------------------------------------------------- triplets


def label_gain(labels: Tensor) -> Tensor:
    """How much each item matters to each anchor: its share of the anchor's ideal discounted cumulative gain.

    With S the number of shared labels, `(2^S_ij - 1) / Z_i`, where `Z_i` sums `(2^S - 1) / log2(r + 1)` over the row's
    values in falling order, r = 1, 2, ...

    Args:
        labels: Multi-hot labels, [B, C], any dtype.

    Returns:
        [B, B] float64, values in [0, 1]; 0 where no label is shared, so a row without labels is all 0.

    Source:
        DIMCH, TIP 2025, weights of the triplet loss. Differs from the authors' code: a row without labels gives 0, not
        NaN; labels are counted in float64, so that nothing overflows.
    """
    counts = labels.double()
    gain = torch.exp2(counts @ counts.T) - 1
    discounts = torch.arange(2, len(gain) + 2, device=gain.device, dtype=gain.dtype).log2()
    ideal = (gain.sort(1, descending=True).values / discounts).sum(1, keepdim=True)
    return torch.where(ideal > 0, gain / ideal, 0.0)


def weighted_triplet(distances: Tensor, labels: Tensor, margin: float) -> Tensor:
    """Every positive should be nearer to its anchor than every negative by a margin, weighted by the positive's gain.

    With R the `label_gain`, the mean over the triplets that cost anything of
    `max(0, R_ij (d_ij - d_ik + margin))`, where j shares a label with anchor i and k does not. An item's own partner is
    a positive. The loss is linear in the distances once it is known which triplets cost something; these are looked up
    without gradients for some anchors at a time, so that memory stays at B^2.

    Args:
        distances: Rows are anchors of one modality, columns candidates of the other, [B, B].
        labels: Multi-hot labels of both, [B, C].
        margin: > 0.

    Returns:
        Scalar; 0 if no triplet costs anything.

    Source:
        DIMCH, TIP 2025; UMoED, TOMM 2025, the same.
    """
    rows = distances.shape[0]
    with torch.no_grad():
        gain = label_gain(labels).to(distances.dtype)
        negative = label_similarity(labels, labels) == 0
        pull, push, count = torch.zeros_like(gain), torch.zeros_like(gain), gain.new_zeros((), dtype=torch.int64)
        size = max(1, TRIPLETS_AT_ONCE // rows**2)
        for start in range(0, rows, size):
            part = slice(start, start + size)
            excess = distances[part, :, None] - distances[part, None, :] + margin  # [b, B positives, B negatives]
            active = (gain[part, :, None] * excess > ACTIVE_TRIPLET) & negative[part, None, :]
            weights = gain[part, :, None] * active
            pull[part], push[part] = weights.sum(2), weights.sum(1)
            count += active.sum()
    total = (pull * (distances + margin) - push * distances).sum()
    return total / (count + ACTIVE_TRIPLET)


# ---------------------------------------------------------------------------------------------- clouds of members


def maximum_mean_discrepancy(a: Tensor, b: Tensor, gamma: float, exact: bool) -> Tensor:
    """How far two clouds of vectors are from being drawn from one distribution; 0 if they are the same.

    `mean k(a, a) - 2 mean k(a, b) + mean k(b, b)` over all pairs, an element with itself included, with the kernel
    `k(x, y) = exp(-gamma |x - y|)`, the distance not squared.

    Args:
        a: Vectors, [N, W].
        b: Vectors, [M, W].
        gamma: > 0.
        exact: Distances come from differences; if not, from matrix products, so that in float32 a vector's distance to
            itself is about 3e-4 instead of 0, which moves the result by at most 1e-5.

    Returns:
        Scalar >= 0.

    Source:
        DIMCH, TIP 2025, and DPSIH, AAAI 2026. Differs from the authors' code: none; DIMCH's is not exact, DPSIH's is.
    """
    mode = "donot_use_mm_for_euclid_dist" if exact else "use_mm_for_euclid_dist_if_necessary"

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (-gamma * torch.cdist(x, y, compute_mode=mode)).exp().mean()

    return kernel(a, a) - 2 * kernel(a, b) + kernel(b, b)


def diversity(sets: Tensor, scope: DiversityScope) -> Tensor:
    """How close members are to each other, `exp(-20 |x - y|^2)` per pair; lower is more diverse.

    Args:
        sets: Members, [N, M, W].
        scope: `sample`: mean over sets of the mean over a set's M (M - 1) / 2 pairs. `batch`: sum over the pairs of all
            N M members, those of different sets too, divided by M (M - 1) / 2 alone.

    Returns:
        Scalar; 0 if a set has one member.

    Source:
        `sample`: UMoED, TOMM 2025, and the formula of DIMCH, TIP 2025. `batch`: what the code of DIMCH's authors
        computes, with which its weights were tuned.
    """
    members = sets.shape[1]
    if members == 1:
        return sets.sum() * 0  # keeps the graph: no parameter is left without a gradient
    groups = sets if scope == "sample" else sets.flatten(0, 1)[None]
    distances = torch.cdist(groups, groups, compute_mode="donot_use_mm_for_euclid_dist")
    closeness = (-DIVERSITY_SHARPNESS * distances.square()).exp()
    return closeness.triu(1).sum((1, 2)).mean() / (members * (members - 1) / 2)
