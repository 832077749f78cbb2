"""Retrieval of a query's own partner: what text-image retrieval reports, on binary codes.

Every query of one modality searches the items of the other one in the same split; one of them is its partner. Of m
items at the partner's distance, itself included, with c items nearer, the partner's rank is one of c + 1, ..., c + m,
each equally likely: recall@k is the probability that it is at most k, the rank its mean. No order of the items decides.
"""

import torch
from torch import Tensor

RECALL_AT = (1, 5, 10)
_PAIRS = 1 << 24  # distances held at a time


def partner_values(query_codes: Tensor, item_codes: Tensor, partners: Tensor) -> dict[str, Tensor]:
    """The numbers of pair retrieval, of every query.

    Args:
        query_codes: Codes in {-1, +1}, [q, K], or [q, n, K] of several codes an item, of which the nearest pair counts.
        item_codes: Codes of the items that are searched, [D, K] or [D, n, K].
        partners: Place of each query's partner among them, [q] int64.

    Returns:
        Name -> [q] float64: `recall@<k>(expected)` in [0, 1], and `rank(expected)`, from 1.
    """
    several = query_codes.shape[1] if query_codes.ndim == 3 else 1
    bits, size = query_codes.shape[-1], len(item_codes)
    items = item_codes.float().reshape(-1, bits).T
    nearer, tied = [], []
    for rows in torch.arange(len(query_codes), device=query_codes.device).split(max(1, _PAIRS // (size * several**2))):
        products = query_codes[rows].float().reshape(-1, bits) @ items  # sums of at most 2^24 ones are exact
        products = products.view(len(rows), several, size, several).amax((1, 3))  # nearest: largest product
        own = products.gather(1, partners[rows, None])
        nearer.append((products > own).sum(1))
        tied.append((products == own).sum(1))
    c, m = (torch.cat(counts).double() if counts else torch.zeros(0).double() for counts in (nearer, tied))
    values = {f"recall@{k}(expected)": ((k - c) / m).clamp(0, 1) for k in RECALL_AT}
    return {**values, "rank(expected)": c + (m + 1) / 2}


def pair_report(values: dict[str, Tensor]) -> dict[str, float]:
    """Means of the recalls, and the median of the ranks, over all queries.

    Args:
        values: What `partner_values` returned, name -> [Q].
    """
    report = {name: float(value.mean()) for name, value in values.items() if name.startswith("recall")}
    return {**report, "median rank(expected)": float(values["rank(expected)"].quantile(0.5))}


def random_pairs(size: int) -> dict[str, float]:
    """What random codes without ties would get among `size` items."""
    return {
        **{f"recall@{k}(expected)": min(k / size, 1.0) for k in RECALL_AT},
        "median rank(expected)": (size + 1) / 2,
    }
