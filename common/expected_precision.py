"""Average precision whatever the order of ties: its expectation over all orders, exactly, from counts per distance."""

from dataclasses import dataclass

import torch
from torch import Tensor

from common.ranking import Ranking


@dataclass(frozen=True)
class Tables:
    """Functions of whole numbers from 0 to D: a look-up takes a fraction of the time of computing one.

    Attributes:
        harmonic: The harmonic number less a constant, [D + 1] float64.
        log_factorial: [D + 1] float64.
    """

    harmonic: Tensor
    log_factorial: Tensor

    @classmethod
    def up_to(cls, size: int, device: torch.device) -> "Tables":
        """Tables for a database of D items.

        Args:
            size: D.
            device: Where the rankings are.
        """
        numbers = torch.arange(1, size + 2, dtype=torch.float64, device=device)
        return cls(torch.digamma(numbers), torch.lgamma(numbers))

    def log_choose(self, n: Tensor, k: Tensor) -> Tensor:
        """Logarithm of the number of ways to choose k [...] of n [...], int64; anything where there is none."""
        ways = self.log_factorial[n] - self.log_factorial[k.clamp(min=0)]
        return ways - self.log_factorial[(n - k).clamp(min=0)]

    def bucket_sum(self, t: Tensor, j: Tensor, n: Tensor, m: Tensor) -> Tensor:
        """What a bucket adds to the sum of precisions, see `expected_precision`; 0 for m = 0.

        Args:
            t: Items before the bucket, int64 as all of them; [...], and they broadcast.
            j: Relevant ones among those, [...].
            n: Items of the bucket, [...].
            m: Relevant ones among those, [...].

        Returns:
            [...] float64.
        """
        a = (m - 1).double() / (n - 1).clamp(min=1)
        harmonic = self.harmonic[t + n] - self.harmonic[t]
        return torch.where(m > 0, m.double() / n * (a * n + (j + 1 - a * (t + 1)) * harmonic), 0.0)


def expected_precision(ranking: Ranking, cut: int, tables: Tables) -> Tensor:
    """Average precision over a list that ends at a rank, expected over all orders of items at the same distance.

    In closed form per distance. A bucket of n items, m of them relevant, behind t items with j relevant ones: its place
    s is relevant with probability m / n, and then a = (m - 1) / (n - 1) of each of the s - 1 places before it is. So it
    adds

        sum_s (m / n) (j + 1 + a (s - 1)) / (t + s) = (m / n) (a n + (j + 1 - a (t + 1)) (H(t + n) - H(t)))

    with the harmonic numbers H. Of the bucket that the cut divides, the x relevant ones among its c places before the
    cut are hypergeometric; given x those places are again such a bucket.

    Args:
        ranking: Of q queries.
        cut: The rank (from 1) at which the list ends, at most D.
        tables: For at least D items.

    Returns:
        [q] float64, 0 for a query without a relevant item.

    Source:
        McSherry and Najork, ECIR 2008, Section 3.
    """
    items, hits = ranking.items, ranking.hits  # [q, K + 1]
    before, hits_before = items.cumsum(1) - items, hits.cumsum(1) - hits
    whole = before + items <= cut
    sums = (tables.bucket_sum(before, hits_before, items, hits) * whole).sum(1)  # [q]
    found = (hits * whole).sum(1)

    divided = (before < cut) & ~whole  # at most one bucket of a query
    values = torch.where(found > 0, sums / found, 0.0)
    if divided.any():
        rows = divided.any(1).nonzero().squeeze(1)
        place = divided[rows].byte().argmax(1, keepdim=True)
        n, m, t = (table[rows].gather(1, place) for table in (items, hits, before))  # [r, 1]
        sums, found = sums[rows].unsqueeze(1), found[rows].unsqueeze(1)
        c = cut - t
        x = torch.arange(int(torch.minimum(c, m).max()) + 1, device=n.device)  # [X]
        possible = (x <= m) & (x <= c) & (c - x <= n - m)
        chance = tables.log_choose(m, x) + tables.log_choose(n - m, c - x) - tables.log_choose(n, c)
        mean = torch.where(found + x > 0, (sums + tables.bucket_sum(t, found, c, x)) / (found + x), 0.0)
        values[rows] = (chance.exp() * mean).where(possible, 0.0).sum(1)
    return values
