"""Intervals over rows and seeds together.

A method's score on a task is a table [S, N, K]: seeds, rows, counts of each row. The metric of a seed is ``value`` of
the counts summed over rows (accuracy: right answers and rows), and the score is the mean over seeds.

*Interval*: 95% of ``NUM_RESAMPLES`` draws of the score, each with two kinds of luck. Rows: drawn with replacement, the
same for all seeds (bootstrap). Seeds: a draw of Student's t with S - 1 degrees of freedom times s / sqrt(S), s the
standard deviation between seeds; resampling three seeds would give little more than the worst and the best of them. The
draws of t are its quantiles at even steps, in random order: with three seeds the ends of the interval lie far out, where
independent draws would put them a tenth off. With one seed that part is missing, and the interval is of rows alone.
Rows that single seeds happen to get right are in both parts, so it is a little too wide rather than too narrow.

*Paired difference*: the same of the differences seed by seed, with the same rows. *p*: two-sided, the share of draws on
the other side of zero, twice. *p_holm*: the same, corrected for the number of tasks that a method is compared on (Holm, 1979).
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

NUM_RESAMPLES = 4000  # even: half of the draws of t are the other half's negatives
NUM_DRAWS_OF_T = 1000 * NUM_RESAMPLES  # of which the quantiles are taken
K = TypeVar("K", bound=Hashable)
SEEDS = 1_000_000  # so that draws of seeds and of rows come from different streams


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Scores of one method on one task.

    Attributes:
        counts: [S, N, K], float64.
        value: counts summed over rows, [..., K], to the metric, [...].
    """

    counts: Tensor
    value: Callable[[Tensor], Tensor]

    @property
    def num_seeds(self) -> int:
        return self.counts.shape[0]

    @property
    def mean(self) -> float:
        """The metric, averaged over seeds."""
        return seeds_of(self).mean().item()


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value with its 95% interval; ``p`` for differences, ``p_holm`` for those that are one of several (:func:`holm`)."""

    value: float
    low: float
    high: float
    p: float | None = None
    p_holm: float | None = None


def mean_of_rows(sums: Tensor) -> Tensor:
    """``value`` of metrics that are means over rows; counts are (score, 1)."""
    return sums[..., 0] / sums[..., 1]


def row_by_row(value: Callable[[Sequence[float]], float]) -> Callable[[Tensor], Tensor]:
    """A corpus metric of one list of sums, for tables [..., K]."""

    def of_table(sums: Tensor) -> Tensor:
        values = [value(row) for row in sums.reshape(-1, sums.shape[-1]).tolist()]
        return torch.tensor(values, dtype=torch.float64).reshape(sums.shape[:-1])

    return of_table


def seeds_of(sample: Sample) -> Tensor:
    """[S]: the metric of each seed."""
    return sample.value(sample.counts.sum(1))


def resampled(sample: Sample, *, seed: int = 0) -> Tensor:
    """[B, S]: the metric of each seed on ``NUM_RESAMPLES`` resamples of the rows; samples with the same number of rows see the
    same draws for the same ``seed``."""
    num_rows = sample.counts.shape[1]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(num_rows, (NUM_RESAMPLES, num_rows), generator=generator)
    times = torch.zeros(NUM_RESAMPLES, num_rows, dtype=torch.float64)
    times.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    return sample.value(torch.einsum("bn,snk->bsk", times, sample.counts))


def with_luck_of_seeds(draws: Tensor, seeds: Tensor, *, seed: int = 0) -> Tensor:
    """[B]: draws of the mean over seeds, from draws of rows [B, S] and what each seed has on all rows [S]."""
    num_seeds, mean = len(seeds), draws.mean(1)
    if num_seeds == 1:
        return mean
    order = torch.randperm(len(draws), generator=torch.Generator().manual_seed(seed + SEEDS))
    return mean + quantiles_of_t(num_seeds - 1, len(draws))[order] * seeds.std() / num_seeds**0.5


@lru_cache
def quantiles_of_t(freedom: int, count: int) -> Tensor:
    """[count]: Student's t at the probabilities (i + 1/2) / count, from draws of it; symmetric, as t is."""
    normal = torch.randn(NUM_DRAWS_OF_T, freedom + 1, generator=torch.Generator().manual_seed(SEEDS), dtype=torch.float64)
    sizes = (normal[:, 0].abs() / normal[:, 1:].square().mean(1).sqrt()).sort().values
    steps = (torch.arange(count // 2, dtype=torch.float64) + 0.5) / (count // 2)
    upper = sizes[(steps * len(sizes)).long()]
    return torch.cat([-upper.flip(0), upper])


def estimate(sample: Sample, *, seed: int = 0) -> Estimate:
    """The score and its interval."""
    return _score(sample.mean, _draws(sample, seed))


def difference(first: Sample, second: Sample, *, seed: int = 0) -> Estimate:
    """``first - second``, paired by seed and row."""
    return _gap(first.mean - second.mean, _draws_of_pair(first, second, seed))


def mean_difference(pairs: Sequence[tuple[Sample, Sample]]) -> Estimate:
    """The mean over tasks of paired differences; tasks are drawn apart, for they share neither rows nor trainings."""
    draws = [_draws_of_pair(first, second, index) for index, (first, second) in enumerate(pairs)]
    return _gap(sum(first.mean - second.mean for first, second in pairs) / len(pairs), torch.stack(draws).mean(0))


def holm(gaps: Mapping[K, Estimate]) -> dict[K, Estimate]:
    """The same differences with ``p_holm``: the k-th smallest p of m times m - k + 1, and none below the one before it."""
    corrected: dict[K, Estimate] = {}
    least = 0.0
    for place, key in enumerate(sorted(gaps, key=lambda key: gaps[key].p or 0.0)):
        least = min(1.0, max(least, (len(gaps) - place) * (gaps[key].p or 0.0)))
        corrected[key] = replace(gaps[key], p_holm=least)
    return {key: corrected[key] for key in gaps}


def mean_estimate(samples: Sequence[Sample]) -> Estimate:
    """The mean over tasks of scores."""
    draws = torch.stack([_draws(sample, index) for index, sample in enumerate(samples)]).mean(0)
    return _score(sum(sample.mean for sample in samples) / len(samples), draws)


def _draws(sample: Sample, seed: int) -> Tensor:
    return with_luck_of_seeds(resampled(sample, seed=seed), seeds_of(sample), seed=seed)


def _draws_of_pair(first: Sample, second: Sample, seed: int) -> Tensor:
    draws = resampled(first, seed=seed) - resampled(second, seed=seed)
    return with_luck_of_seeds(draws, seeds_of(first) - seeds_of(second), seed=seed)


def _score(value: float, draws: Tensor) -> Estimate:
    """Scores lie between 0 and 1, so their interval does."""
    low, high = _interval(draws.clamp(0, 1))
    return Estimate(value=value, low=low, high=high)


def _gap(value: float, draws: Tensor) -> Estimate:
    low, high = _interval(draws)
    beyond = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
    return Estimate(value=value, low=low, high=high, p=min(1.0, 2 * (1 + beyond) / (1 + len(draws))))


def _interval(draws: Tensor) -> list[float]:
    return draws.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
