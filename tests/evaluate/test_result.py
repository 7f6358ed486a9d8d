import pytest
import torch

from shadowpeft.evaluate.result import bootstrap, wilson


def test_wilsons_interval_has_the_published_values():
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


def test_the_bootstrap_of_a_mean_agrees_with_the_normal_interval():
    values = torch.linspace(0, 1, 400).tolist()
    low, high = bootstrap([[value, 1.0] for value in values], lambda sums: sums[0] / sums[1])
    half = 1.96 * (1 / 12) ** 0.5 / 400**0.5
    # 1,000 resamples put a percentile within about 6% of the half-width.
    assert (low, high) == pytest.approx((0.5 - half, 0.5 + half), abs=0.15 * half)
    assert (low, high) == bootstrap([[value, 1.0] for value in values], lambda sums: sums[0] / sums[1])
