"""How alike rows are: by labels, by angle, by bits."""

import torch
import torch.nn.functional as F
from torch import Tensor


def label_similarity(a: Tensor, b: Tensor) -> Tensor:
    """1 where two rows share a label, else 0.

    Args:
        a: Multi-hot labels, [N, C], any dtype.
        b: Multi-hot labels, [M, C].

    Returns:
        [N, M] float32.

    Raises:
        ValueError: If the numbers of classes differ.
    """
    _require_same_width(a, b, "labels")
    return (a.float() @ b.float().T > 0).float()


def without_self(similar: Tensor) -> Tensor:
    """Similar pairs of one batch, [B, B] bool, without those of an item and itself."""
    return similar & ~torch.eye(len(similar), dtype=torch.bool, device=similar.device)


def cosine_similarity(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of the angle between rows; 0 for a row of zeros.

    Args:
        a: Real vectors, [N, K], not necessarily normalised.
        b: Real vectors, [M, K].

    Returns:
        [N, M], values in [-1, 1].

    Raises:
        ValueError: If the widths differ.
    """
    _require_same_width(a, b, "vectors")
    return F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T


def hamming_distance(a: Tensor, b: Tensor) -> Tensor:
    """Number of bits in which codes differ, (K - <a, b>) / 2; differentiable, and defined for relaxed codes too.

    Args:
        a: Codes in [-1, 1], [N, K], any real dtype.
        b: Codes in [-1, 1], [M, K].

    Returns:
        [N, M] float32, values in [0, K]; whole numbers where the codes are in {-1, +1}.

    Raises:
        ValueError: If the code lengths differ.
    """
    _require_same_width(a, b, "codes")
    return 0.5 * (a.shape[-1] - a.float() @ b.float().T)


def _require_same_width(a: Tensor, b: Tensor, what: str) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"{what} must be two matrices of one width, not {list(a.shape)} and {list(b.shape)}")
