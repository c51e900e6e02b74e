"""Chi-square tests that say what they could have seen: the total variation that they find with a given power."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.optimize import brentq
from scipy.stats import chi2, ncx2
from torch import Tensor

FALSE_ALARM = 1e-6  # chance that one test calls a lossless subject lossy
POWER = 0.99  # chance that it finds a deviation of `detectable_tv`
LEAST_EXPECTED = 5.0  # cells that expect less are pooled, for the chi-square law to hold


@dataclass(frozen=True, slots=True)
class ChiSquare:
    """A statistic and the limit that it passes only by chance (FALSE_ALARM); `detectable_tv`: smallest TV found with POWER."""

    statistic: float
    freedom: int
    limit: float
    detectable_tv: float

    @property
    def passed(self) -> bool:
        return self.statistic <= self.limit


def goodness(observed: Tensor, expected: Tensor) -> ChiSquare:
    """Counts against expected counts of the same total, any shape. A count where nothing can come (expected 0) is infinite."""
    counts, means = observed.double().flatten(), expected.double().flatten()
    if bool(counts[means <= 0].sum() > 0):
        return judged(float("inf"), max(int((means > 0).sum()) - 1, 1), float(counts.sum()))
    counts, means = pooled(counts, means, means)
    return judged(float(((counts - means) ** 2 / means).sum()), max(len(means) - 1, 1), float(counts.sum()))


def homogeneity(one: Tensor, other: Tensor) -> ChiSquare:
    """Whether two samples, as counts over the same cells, have one law."""
    a, b = one.double().flatten(), other.double().flatten()
    share = a.sum() / (a.sum() + b.sum())
    both = a + b
    a, b = pooled(a, b, both * torch.minimum(share, 1 - share))
    means = (a + b) * share
    statistic = float(((a - means) ** 2 / means + (b - (a + b) + means) ** 2 / (a + b - means)).sum())
    size = float(a.sum() * b.sum() / (a.sum() + b.sum()))
    return judged(statistic, max(len(a) - 1, 1), size)


def pooled(one: Tensor, other: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """Two rows of cells with those that expect too little put into one (the largest of the others joins it if need be)."""
    small = expected < LEAST_EXPECTED
    if bool(small.any()) and float(expected[small].sum()) < LEAST_EXPECTED and not bool(small.all()):
        small = small.clone()
        small[expected.masked_fill(small, torch.inf).argmin()] = True
    rows = [torch.cat([row[~small], row[small].sum()[None]]) if bool(small.any()) else row for row in (one, other)]
    return rows[0], rows[1]


def judged(statistic: float, freedom: int, size: float) -> ChiSquare:
    """`size`: effective number of samples, n for one sample and n m / (n + m) for two."""
    return ChiSquare(statistic, freedom, float(chi2.isf(FALSE_ALARM, freedom)), detectable_tv(freedom, size))


def detectable_tv(freedom: int, size: float) -> float:
    """Smallest total variation that is found with POWER, whatever its direction.

    A deviation of total variation t moves the statistic's mean by size * sum(d^2 / p) >= 4 size t^2 (Cauchy-Schwarz), so the
    least favourable direction is a non-central chi-square with that non-centrality.
    """
    limit = chi2.isf(FALSE_ALARM, freedom)
    needed = brentq(lambda shift: ncx2.sf(limit, freedom, shift) - POWER, 1e-9, 20 * (limit + 100))
    return float(min((needed / (4 * max(size, 1.0))) ** 0.5, 1.0))
