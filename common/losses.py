"""Equations that two or more methods use: pure functions, one equation each."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_TRIPLETS_AT_ONCE = 1 << 24  # of some anchors, computed together, and again for the gradient


def full_precision(device: torch.device) -> torch.autocast:
    """Context in which autocast is off. Methods compute losses inside, on features made float32 with `.float()`."""
    return torch.autocast(device.type, enabled=False)


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of the values that count; 0 where none does.

    Args:
        values: [...], finite.
        mask: Which of them count, of the same shape, bool.
        dim: Over which dimension; None: over all.

    Returns:
        Scalar, or [...] without `dim`.
    """
    return (values * mask).sum(dim) / mask.sum(dim).clamp(min=1)


def sum_over_triplets(cost: Callable[..., tuple[Tensor, Tensor]], *tables: Tensor) -> tuple[Tensor, Tensor]:
    """Cost of all triplets of a batch and how many count, for some anchors at a time: memory stays far below B^3.

    Args:
        cost: Rows of the tables, [b, B] each -> sum of the costs of these anchors' triplets, and the number of triplets
            that count, both scalars.
        tables: Anchors as rows, [B, B] each.

    Returns:
        Both sums over all anchors.
    """
    rows = max(1, _TRIPLETS_AT_ONCE // tables[0].shape[1] ** 2)
    parts = zip(*(table.split(rows) for table in tables), strict=True)
    costs, counts = zip(*(checkpoint(cost, *part, use_reentrant=False) for part in parts), strict=True)
    return torch.stack(costs).sum(), torch.stack(counts).sum()


def soft_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy with all labels of an item, each as a target of its own.

    Args:
        logits: [B, C].
        labels: Multi-hot labels, [B, C].

    Returns:
        Scalar: the sum over labels of `-log softmax`, mean over rows; a row without labels costs 0.

    Source:
        DNcH, ESWA 2025, on cosines without a temperature, as in the authors' code; DGHDGH, ICLR 2026.
    """
    return -(logits.log_softmax(-1) * (labels > 0)).sum(-1).mean()


def asymmetric_likelihood(bank: Tensor, codes: Tensor, similarity: Tensor) -> Tensor:
    """Negative log-likelihood of pairwise similarities, codes of the batch against remembered codes of all items.

    With t = clamp(bank codes^T, -64, 64) / 2, the mean of `log(1 + e^t) - s t` over all N B pairs. The inner product is
    clamped before it is halved; where it is clamped, no gradient flows.

    Args:
        bank: Remembered relaxed codes of the training split, [N, K]; a constant.
        codes: Relaxed codes of the batch, [B, K].
        similarity: 1 where a pair shares a label, else 0, [N, B].

    Returns:
        Scalar.

    Source:
        MITH, ACM MM 2023, the likelihood terms, with the clamp of the authors' code; VTPH, IJCAI 2024, the same.
    """
    logits = (bank @ codes.T).clamp(-64, 64) / 2
    return (F.softplus(logits) - similarity * logits).mean()


def diagonal_contrast(logits: Tensor) -> Tensor:
    """Symmetric InfoNCE: each row should choose its diagonal entry among the columns, each column among the rows.

    Args:
        logits: Similarities over temperature, [..., n, n]; the partners stand on the diagonal.

    Returns:
        Mean of the two cross entropies of every matrix, [...].

    Source:
        CLIP, ICML 2021; MITH, ACM MM 2023, instance and token alignment.
    """
    rows = logits.log_softmax(-1).diagonal(dim1=-2, dim2=-1)
    columns = logits.log_softmax(-2).diagonal(dim1=-2, dim2=-1)
    return -(rows + columns).mean(-1) / 2


def mutual_distillation(teacher: Tensor, student: Tensor, back: float) -> Tensor:
    """Squared distance of two hashes; full gradient to the student, a fraction `back` of it to the teacher.

    Args:
        teacher: Relaxed codes, [B, K].
        student: Relaxed codes, [B, K].
        back: Weight of the term in which the student is the constant, >= 0.

    Returns:
        Scalar, summed over bits and divided by B (not by K).

    Source:
        MITH, ACM MM 2023, global-local distillation; `back` 0.1 and the divisor as in the authors' code.
    """
    forth = (teacher.detach() - student).square().sum()
    return (forth + back * (teacher - student.detach()).square().sum()) / teacher.shape[0]


def pair_quantization(pairs: Tensor) -> Tensor:
    """How far two-way softmax outputs are from a decision: 0 if all are 0 or 1, 1 if all are one half.

    Args:
        pairs: Softmax pairs, [B, 2K], each value in [0, 1].

    Returns:
        Scalar, `1 - mean((2 p - 1)^2)`.

    Source:
        TwDH, TMM 2024, quantisation; also DCMHT as its author re-implemented it.
    """
    return 1 - (2 * pairs - 1).square().mean()
