"""Intervals and tests over rows and seeds together.

A method's score on a task is a table [S, N, K]: seeds, rows, counts of each row. The metric of a seed is ``value`` of
the counts summed over rows (accuracy: right answers and rows), and the score is the mean over seeds.

*Interval*: percentile bootstrap at 95%; each resample draws seeds and rows with replacement, the same rows for all
seeds. *Paired difference*: the same draws for both methods. *Test*: permutation; under the null hypothesis the two
methods' answers to a row can be swapped, so they are, at random, row by row (all seeds of a row together), and p is the
share of differences at least as large as the one found. The interval holds the luck of rows and seeds; the test, of
rows alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NUM_RESAMPLES = 2000


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
        return self.value(self.counts.sum(1)).mean().item()


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value with its 95% interval; ``p`` for differences."""

    value: float
    low: float
    high: float
    p: float | None = None


def mean_of_rows(sums: Tensor) -> Tensor:
    """``value`` of metrics that are means over rows; counts are (score, 1)."""
    return sums[..., 0] / sums[..., 1]


def row_by_row(value: Callable[[Sequence[float]], float]) -> Callable[[Tensor], Tensor]:
    """A corpus metric of one list of sums, for tables [..., K]."""

    def of_table(sums: Tensor) -> Tensor:
        values = [value(row) for row in sums.reshape(-1, sums.shape[-1]).tolist()]
        return torch.tensor(values, dtype=torch.float64).reshape(sums.shape[:-1])

    return of_table


def resampled(sample: Sample, *, seed: int = 0) -> Tensor:
    """[B]: the score of ``NUM_RESAMPLES`` resamples; samples of the same shape see the same draws for the same seed."""
    num_seeds, num_rows, _ = sample.counts.shape
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(num_rows, (NUM_RESAMPLES, num_rows), generator=generator)
    times = torch.zeros(NUM_RESAMPLES, num_rows, dtype=torch.float64)
    times.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    sums = torch.einsum("bn,snk->bsk", times, sample.counts)
    seeds = torch.randint(num_seeds, (NUM_RESAMPLES, num_seeds), generator=generator)
    return sample.value(sums).gather(1, seeds).mean(1)


def estimate(sample: Sample, *, seed: int = 0) -> Estimate:
    """The score and its interval."""
    return _with_interval(sample.mean, resampled(sample, seed=seed))


def difference(first: Sample, second: Sample, *, seed: int = 0) -> Estimate:
    """``first - second``, paired by seed and row, with the p of the permutation test."""
    draws = resampled(first, seed=seed) - resampled(second, seed=seed)
    found = _with_interval(first.mean - second.mean, draws)
    return Estimate(value=found.value, low=found.low, high=found.high, p=permutation_p(first, second, seed=seed))


def permutation_p(first: Sample, second: Sample, *, seed: int = 0) -> float:
    """Two-sided p of swapping the two methods' answers row by row; (1 + hits) / (1 + draws)."""
    generator = torch.Generator().manual_seed(seed)
    num_rows = first.counts.shape[1]
    swap = torch.randint(2, (NUM_RESAMPLES, num_rows), generator=generator).double()
    moved = torch.einsum("bn,snk->bsk", swap, second.counts - first.counts)
    left, right = first.counts.sum(1) + moved, second.counts.sum(1) - moved
    found = abs(first.mean - second.mean)
    differences = (first.value(left) - second.value(right)).mean(1).abs()
    return (1 + int((differences >= found - 1e-12).sum())) / (1 + NUM_RESAMPLES)


def mean_difference(pairs: Sequence[tuple[Sample, Sample]]) -> Estimate:
    """The mean over tasks of paired differences; tasks are resampled apart, for they share no rows."""
    draws = torch.stack(
        [resampled(first, seed=index) - resampled(second, seed=index) for index, (first, second) in enumerate(pairs)]
    ).mean(0)
    value = sum(first.mean - second.mean for first, second in pairs) / len(pairs)
    return _with_interval(value, draws)


def mean_estimate(samples: Sequence[Sample]) -> Estimate:
    """The mean over tasks of scores."""
    draws = torch.stack([resampled(sample, seed=index) for index, sample in enumerate(samples)]).mean(0)
    return _with_interval(sum(sample.mean for sample in samples) / len(samples), draws)


def _with_interval(value: float, draws: Tensor) -> Estimate:
    low, high = draws.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(value=value, low=low, high=high)
