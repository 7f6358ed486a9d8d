import pytest
import torch

from shadowpeft.evaluate.compare.statistics import (
    Sample,
    difference,
    estimate,
    mean_difference,
    mean_of_rows,
    permutation_p,
    row_by_row,
)
from shadowpeft.train.answers import BLEU, bleu_counts


def right_answers(*rows_of_seeds: list[float]) -> Sample:
    counts = [[[value, 1.0] for value in rows] for rows in rows_of_seeds]
    return Sample(counts=torch.tensor(counts, dtype=torch.float64), value=mean_of_rows)


def random_answers(share: float, *, rows: int, seeds: int = 1, seed: int = 0) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(seeds, rows, generator=generator, dtype=torch.float64) < share
    return right_answers(*drawn.double().tolist())


def test_the_score_is_the_mean_over_seeds():
    assert right_answers([1, 1, 0, 0], [1, 1, 1, 1]).mean == 0.75


def test_the_interval_of_a_share_has_the_width_that_theory_gives():
    found = estimate(random_answers(0.5, rows=400))
    assert found.low < found.value < found.high
    assert found.high - found.low == pytest.approx(2 * 1.96 * (0.25 / 400) ** 0.5, rel=0.1)


def test_seeds_that_differ_widen_the_interval():
    alike, apart = right_answers([1, 0] * 50, [1, 0] * 50), right_answers([1] * 100, [0] * 100)
    assert alike.mean == apart.mean
    wide, narrow = estimate(apart), estimate(alike)
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


def test_a_difference_is_paired_so_that_shared_luck_with_rows_does_not_blur_it():
    first = random_answers(0.5, rows=200)
    answers = first.counts[0, :, 0].tolist()
    second = right_answers([*([0.0] * 8), *answers[8:]])
    gap = difference(first, second)
    alone = estimate(first)
    assert gap.value == pytest.approx(sum(answers[:8]) / 200)
    assert gap.high - gap.low < (alone.high - alone.low) / 2


def test_equal_methods_differ_by_nothing_and_p_is_one():
    same = random_answers(0.4, rows=100, seeds=3)
    gap = difference(same, same)
    assert (gap.value, gap.low, gap.high, gap.p) == (0.0, 0.0, 0.0, 1.0)


def test_p_of_a_few_discordant_rows_is_that_of_the_exact_sign_test():
    first, second = right_answers([1] * 6 + [0] * 44), right_answers([0] * 50)
    exact = 2 / 2**6  # all six rows on one side, two-sided
    assert permutation_p(first, second) == pytest.approx(exact, abs=0.015)


def test_p_is_about_uniform_where_the_methods_are_equally_good():
    values = [
        permutation_p(random_answers(0.5, rows=60, seed=number), random_answers(0.5, rows=60, seed=1000 + number))
        for number in range(60)
    ]
    # Under the null at most 5% fall below 0.05; 12 of 60 or more would happen with probability below 1e-4.
    assert sum(value < 0.05 for value in values) < 12
    assert sum(values) / len(values) > 0.35


def test_seeds_of_a_row_are_swapped_together():
    rows, seeds = 4, 5
    first, second = right_answers(*[[1] * rows] * seeds), right_answers(*[[0] * rows] * seeds)
    # Twenty independent swaps would give p of 2^-19; four rows can only give 2 / 2^4.
    assert permutation_p(first, second) == pytest.approx(2 / 2**rows, abs=0.02)


def test_a_corpus_metric_is_computed_from_resampled_counts_and_not_averaged_over_rows():
    texts = [("the fox is red now", ["the fox is red now"]), ("a b c d e", ["a b c d f"]), ("x y z", ["p q r"])]
    counts = torch.tensor([[bleu_counts(said, golds) for said, golds in texts]], dtype=torch.float64)
    sample = Sample(counts=counts, value=row_by_row(BLEU.value))
    assert sample.mean == pytest.approx(BLEU.value(counts[0].sum(0).tolist()))
    found = estimate(sample)
    assert 0 <= found.low <= found.value <= found.high <= 1


def test_the_mean_over_tasks_is_surer_than_each_task():
    pairs = [(random_answers(0.7, rows=100, seed=n), random_answers(0.5, rows=100, seed=50 + n)) for n in range(9)]
    overall, single = mean_difference(pairs), difference(*pairs[0])
    assert overall.value == pytest.approx(sum(a.mean - b.mean for a, b in pairs) / 9)
    assert overall.high - overall.low < (single.high - single.low) / 2
    assert overall.low > 0
