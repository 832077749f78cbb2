"""What codes are like, whatever they find: bits that tell nothing apart, bits that say the same, loss by binarising."""

from collections.abc import Sequence

import torch
from torch import Tensor

_ROWS_AT_ONCE = 1 << 14


def constant_bits(codes: Tensor) -> float:
    """Share of the bits that have one sign in all codes, in [0, 1]; 1 means that all codes are equal.

    Args:
        codes: Codes in {-1, +1}, [N, K] or, n an item, [N, n, K]; N at least 1.
    """
    rows = codes.flatten(0, -2)  # [N n, K]
    return float((rows == rows[:1]).all(dim=0).double().mean())


def bit_correlation(codes: Tensor) -> float:
    """Mean absolute correlation of two bits, over all pairs of different bits that are not constant; 0 without a pair.

    0 is what independent bits have, 1 that all bits say the same.

    Args:
        codes: Codes in {-1, +1}, [N, K] or, n an item, [N, n, K]; N at least 1.
    """
    rows = codes.flatten(0, -2)  # [N n, K]
    products = torch.zeros(rows.shape[-1], rows.shape[-1], dtype=torch.float64, device=rows.device)
    sums = torch.zeros(rows.shape[-1], dtype=torch.float64, device=rows.device)
    for block in rows.split(_ROWS_AT_ONCE):
        values = block.float()  # sums of so few signs are exact
        products += (values.T @ values).double()
        sums += values.sum(dim=0).double()
    mean = sums / len(rows)
    moving = mean.abs() < 1
    spread = (1 - mean[moving] ** 2).sqrt()
    correlation = (products / len(rows) - torch.outer(mean, mean))[moving][:, moving] / torch.outer(spread, spread)
    pairs = len(spread) * (len(spread) - 1)
    return float((correlation.abs().sum() - correlation.diagonal().abs().sum()) / pairs) if pairs else 0.0


def squared_gaps(relaxed: Sequence[Tensor], codes: Tensor) -> Tensor:
    """Sum over items of (u - code)^2, bit by bit.

    Args:
        relaxed: What the codes were made of by sign: values u [B, K'] (or [B, n, K']) that are K wide side by side.
        codes: The codes, [B, K] or [B, n, K].

    Returns:
        [K] float64, the mean over an item's codes where it has several; [0] where `relaxed` does not make up the codes.
    """
    values = torch.cat([part.float() for part in relaxed], dim=-1) if relaxed else None
    if values is None or values.shape != codes.shape:
        return torch.zeros(0, dtype=torch.float64, device=codes.device)
    squares = (values - codes).double().square()
    return squares.flatten(1, -2).mean(1).sum(0) if squares.ndim > 2 else squares.sum(0)


def code_report(codes: Tensor, gaps: Tensor) -> dict[str, float]:
    """What a codes' line in the log says of one modality.

    Args:
        codes: Codes in {-1, +1}, [N, K] or [N, n, K].
        gaps: Mean over items of (u - sign u)^2 of every bit, [K]; empty where there is no u.

    Returns:
        `constant bits` and `bit correlation` as the functions above, and where there is a u, `quantization error`: the
        root of the mean over items and bits of (u - sign u)^2, that is of |u - sign u|^2 / K.
    """
    report = {"constant bits": constant_bits(codes), "bit correlation": bit_correlation(codes)}
    if len(gaps):
        report["quantization error"] = float(gaps.mean().sqrt())
    return report
