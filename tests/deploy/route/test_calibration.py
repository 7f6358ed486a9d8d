import math
import random

import pytest

from shadowpeft.deploy.route.calibration import (
    Isotonic,
    Temperature,
    auroc,
    expected_calibration_error,
    fit_isotonic,
    fit_temperature,
    from_dict,
)
from shadowpeft.deploy.route.deferral import (
    deferral_curve,
    oracle_curve,
    random_curve,
    recovered_gap,
    share_for_gap,
    shuffled,
)
from shadowpeft.deploy.route.scores import SCORES, all_scores
from shadowpeft.deploy.serve.sampling import TokenFacts

FACTS = [
    TokenFacts(token=1, logprob=-0.1, margin=0.8, entropy=0.3),
    TokenFacts(token=2, logprob=-0.7, margin=0.2, entropy=1.1),
]


def drawn(temperature, n=4000):
    rng = random.Random(0)
    scores = [-3 * rng.random() for _ in range(n)]
    return scores, [rng.random() < math.exp(score / temperature) for score in scores]


def test_scores_are_what_their_names_say():
    expected = {"sequence_logprob": -0.8, "mean_logprob": -0.4, "min_logprob": -0.7, "first_logprob": -0.1}
    got = all_scores(FACTS)
    assert {name: got[name] for name in expected} == pytest.approx(expected)
    assert got["margin"] == pytest.approx(math.log(0.2)) and got["entropy"] == -1.1
    assert set(got) == set(SCORES) and max(got.values()) <= 0


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_the_temperature_that_made_the_rows_is_found_again(temperature):
    scores, right = drawn(temperature)
    # The standard error of T on 4,000 such rows is about 3%.
    assert fit_temperature(scores, right).temperature == pytest.approx(temperature, rel=0.12)


@pytest.mark.parametrize("all_right", [True, False])
def test_rows_that_are_all_right_or_all_wrong_give_a_finite_temperature(all_right):
    calibration = fit_temperature([-0.5, -0.1], [all_right] * 2)
    assert 0 < calibration.temperature < math.inf
    assert calibration.probability(-0.1) == pytest.approx(float(all_right), abs=0.01)


def test_calibration_shrinks_the_calibration_error():
    scores, right = drawn(3.0)
    before = [Temperature(temperature=1.0).probability(score) for score in scores]
    for calibration in (fit_temperature(scores, right), fit_isotonic(scores, right)):
        after = [calibration.probability(score) for score in scores]
        error = expected_calibration_error(after, right)
        assert error < 0.03 < expected_calibration_error(before, right)


def test_isotonic_steps_rise_and_pool_what_falls():
    calibration = fit_isotonic([-4, -3, -2, -1], [False, True, False, True])
    assert calibration == Isotonic(starts=(-4, -3, -1), values=(0.0, 0.5, 1.0))
    assert [calibration.probability(score) for score in (-9, -2.5, 0)] == [0.0, 0.5, 1.0]
    assert from_dict(calibration.to_dict()) == calibration


def test_auroc_counts_pairs():
    scores, positive = [0.1, 0.4, 0.4, 0.8, 0.3], [False, True, False, True, False]
    pairs = [
        (p, q)
        for p, a in zip(scores, positive, strict=True)
        if a
        for q, b in zip(scores, positive, strict=True)
        if not b
    ]
    expected = sum((p > q) + 0.5 * (p == q) for p, q in pairs) / len(pairs)
    assert auroc(scores, positive) == pytest.approx(expected)
    assert auroc([1.0], [True]) is None


# ---------------------------------------------------------------- deferral


EDGE, CLOUD = [1, 0, 0, 1], [1, 1, 1, 0]


def test_a_deferral_curve_hands_over_the_least_sure_rows_first():
    curve = deferral_curve([0.9, 0.1, 0.2, 0.8], EDGE, CLOUD)
    assert curve.shares == (0, 0.25, 0.5, 0.75, 1) and curve.accuracies == (0.5, 0.75, 1, 0.75, 0.75)
    assert curve.area == pytest.approx(0.25 * (0.25 + 0.75 + 1 + 0.75 + 0.375))
    assert curve.at(0.6) == 1 and curve.at(0) == 0.5


def test_rows_of_equal_confidence_go_together():
    assert deferral_curve([0.5] * 4, EDGE, CLOUD).shares == (0, 1)


def test_no_router_beats_the_oracle_and_chance_is_a_line():
    oracle = oracle_curve(EDGE, CLOUD)
    for seed in range(20):
        assert deferral_curve(shuffled(4, seed), EDGE, CLOUD).area <= oracle.area + 1e-12
    line = random_curve(EDGE, CLOUD)
    assert line.area == 0.625 and recovered_gap(line) == pytest.approx(0.5)
    assert share_for_gap(oracle, 1.0) == 0.25 and recovered_gap(random_curve([1], [1])) is None
