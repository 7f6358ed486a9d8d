import pytest
import torch

from shadowpeft.evaluate.compare.statistics import (
    Estimate,
    Sample,
    difference,
    estimate,
    holm,
    mean_difference,
    mean_of_rows,
    quantiles_of_t,
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


def test_holm_multiplies_by_the_differences_that_are_left_and_never_goes_back_down():
    """By hand: 0.005 x 4, 0.01 x 3, 0.03 x 2, and 0.04 x 1 is below the one before it."""
    found = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}
    gaps = {name: Estimate(value=1.0, low=0.0, high=2.0, p=p) for name, p in found.items()}
    assert {name: found.p_holm for name, found in holm(gaps).items()} == pytest.approx(dict(a=0.03, b=0.06, c=0.06, d=0.02))
    [alone] = holm({"a": Estimate(value=1.0, low=0.0, high=2.0, p=0.7)}).values()
    assert (alone.p, alone.p_holm) == (0.7, 0.7)


def test_p_of_a_few_discordant_rows_is_small_and_grows_with_fewer():
    p = [difference(right_answers([1] * n + [0] * (50 - n)), right_answers([0] * 50)).p for n in (2, 4, 8)]
    # That no resample of 50 rows meets one of n has probability (1 - n / 50)^50: 0.13, 0.015, 0.0002; twice that.
    assert p == pytest.approx([0.26, 0.031, 0.001], abs=0.03) and p[0] > p[1] > p[2]


def seeds_with_luck(generator: torch.Generator, *, spread: float, rows: int = 200, seeds: int = 3) -> Sample:
    """Answers of trainings whose share of right answers differs by seed, on rows that differ in difficulty."""
    shares = 0.5 + spread * torch.randn(seeds, 1, generator=generator, dtype=torch.float64)
    difficulty = 0.2 * (torch.rand(1, rows, generator=generator, dtype=torch.float64) - 0.5)
    drawn = torch.rand(seeds, rows, generator=generator, dtype=torch.float64) < shares + difficulty
    return right_answers(*drawn.double().tolist())


@pytest.mark.parametrize("seeds", [3, 5])
def test_the_interval_of_a_difference_holds_the_truth_as_often_as_it_says(seeds):
    """Two methods that are equally good on average; resampling three seeds with replacement covers that in 3 of 4 cases."""
    generator = torch.Generator().manual_seed(0)
    gaps = [
        difference(*(seeds_with_luck(generator, spread=0.08, seeds=seeds) for _ in range(2)), seed=number)
        for number in range(200)
    ]
    covered = sum(gap.low <= 0 <= gap.high for gap in gaps)
    # Of 200 at 95%, fewer than 180 come with probability below 0.002; all of them would be an interval that says nothing.
    assert 180 <= covered < 200
    # p and interval are one statement; draws at the edge may fall on either side.
    assert all((gap.p < 0.05) != (gap.low <= 0 <= gap.high) for gap in gaps if abs(gap.p - 0.05) > 0.004)


@pytest.mark.parametrize(("freedom", "table"), [(2, {0.95: 2.920, 0.975: 4.303}), (4, {0.95: 2.132, 0.975: 2.776})])
def test_the_draws_of_t_have_the_quantiles_of_its_table(freedom, table):
    draws = quantiles_of_t(freedom, 4000)
    for probability, value in table.items():
        # Four million draws place these quantiles to 0.2 %, steps of 1 in 4000 to 0.5 %.
        assert draws.quantile(probability).item() == pytest.approx(value, rel=0.01)
    assert torch.equal(draws, -draws.flip(0))  # so that an interval does not lean to one side by chance


def test_with_one_seed_the_interval_is_of_rows_alone():
    one = random_answers(0.5, rows=400)
    thrice = right_answers(*[one.counts[0, :, 0].tolist()] * 3)
    assert estimate(thrice) == estimate(one)  # seeds that agree add nothing


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
