"""Pearson's chi-square test."""

import torch
from torch import Tensor


def chi_square_p_value(counts: Tensor, probabilities: Tensor, *, fewest: float = 5.0) -> float:
    """Pearson's goodness of fit; cells expected less often than ``fewest`` times are counted as one."""
    expected = probabilities * counts.sum()
    rare = expected < fewest
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]]).double()
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]]).double()
    if expected[-1] < fewest:  # too few even together
        observed, expected = observed[:-1], expected[:-1]
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))
