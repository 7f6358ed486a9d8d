import json
from dataclasses import replace

import pytest

from shadowpeft.deploy.route.artefact import fit_router, load_router, save_router
from shadowpeft.deploy.route.breaker import CircuitBreaker
from shadowpeft.deploy.route.grammar import reason_to_escalate
from shadowpeft.deploy.route.operating import ALL_TO_CLOUD, Example, Target, choose_threshold, operating_point
from shadowpeft.deploy.route.scores import SCORES
from shadowpeft.errors import ConfigError


def example(score, edge, cloud=1.0, reason=None, out=False):
    return Example(scores=dict.fromkeys(SCORES, score), edge=edge, cloud=cloud, reason=reason, is_out_of_scope=out)


# Ten rows: sure ones are right on the edge; one the cloud gets wrong; one asks for the cloud itself.
ROWS = [example(-0.1 * i, float(i < 6), cloud=float(i != 2)) for i in range(9)] + [
    example(-0.01, 0.0, 1.0, "remote", True)
]
CONFIDENCE = [1 - 0.1 * i for i in range(9)] + [0.99]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (" sit()", None),
        ("move(steps=3) and then", None),
        ("[REMOTE]", "remote"),
        ("fly()", "unknown_skill"),
        ("I cannot", "no_call"),
        ("sit(", "no_call"),
        ("", "no_call"),
    ],
)
def test_the_grammar_knows_what_the_device_can_do(text, reason):
    assert reason_to_escalate(text, {"sit", "move"}) == reason
    assert reason_to_escalate(text, None) is None


def test_a_share_is_kept_and_used_for_the_best_accuracy_it_buys():
    threshold = choose_threshold(ROWS, CONFIDENCE, Target(max_cloud_share=0.4))
    point = operating_point(ROWS, CONFIDENCE, threshold)
    assert point.cloud_share == pytest.approx(0.4) and point.accuracy == pytest.approx(1.0)
    assert point.normal_cloud_share == pytest.approx(3 / 9)
    assert point.cloud_share_interval[0] < 0.4 < point.cloud_share_interval[1]
    assert (
        operating_point(ROWS, CONFIDENCE, choose_threshold(ROWS, CONFIDENCE, Target(max_cloud_share=0.25))).cloud_share <= 0.25
    )


def test_a_share_of_the_normal_rows_does_not_count_those_out_of_scope():
    # One row in ten asks for the cloud itself; two of the nine others may go as well.
    point = operating_point(ROWS, CONFIDENCE, choose_threshold(ROWS, CONFIDENCE, Target(max_normal_share=0.25)))
    assert point.normal_cloud_share == pytest.approx(2 / 9) and point.cloud_share == pytest.approx(0.3)
    forced = [*ROWS, example(-0.05, 0.0, 1.0, "no_call")]
    with pytest.raises(ConfigError, match=r"sends 0\.100 of the normal rows"):
        choose_threshold(forced, [*CONFIDENCE, 0.95], Target(max_normal_share=0.05))


def test_an_accuracy_is_reached_at_the_lowest_share():
    point = operating_point(ROWS, CONFIDENCE, choose_threshold(ROWS, CONFIDENCE, Target(min_accuracy=0.85)))
    assert point.accuracy >= 0.85 and point.cloud_share == pytest.approx(0.3)


def test_without_a_target_accuracy_comes_first_and_cost_second():
    assert operating_point(ROWS, CONFIDENCE, choose_threshold(ROWS, CONFIDENCE)).cloud_share == pytest.approx(0.4)


def test_everything_or_nothing_goes_to_the_cloud_where_that_is_best():
    worse_edge = [example(-0.1, 0.0), example(-0.2, 0.0)]
    assert choose_threshold(worse_edge, [0.9, 0.8]) == ALL_TO_CLOUD
    same = [example(-0.1, 1.0), example(-0.2, 1.0)]
    assert operating_point(same, [0.9, 0.8], choose_threshold(same, [0.9, 0.8])).cloud_share == 0


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ({"max_cloud_share": 0.05}, "grammar alone sends 0.100 of the validation"),
        ({"max_normal_share": -0.1}, "from 0 to 1"),
        ({"min_accuracy": 1.1}, "from 0 to 1"),
        ({"max_cloud_share": 0.2, "min_accuracy": 0.9}, "not max_cloud_share and min_accuracy"),
    ],
)
def test_a_target_that_cannot_be_is_refused_with_what_can(target, said):
    with pytest.raises(ConfigError, match=said):
        choose_threshold(ROWS, CONFIDENCE, Target(**target))
    with pytest.raises(ConfigError, match=r"the best is 0\.9000"):
        choose_threshold([*ROWS[:-1], example(-0.01, 0.0, 0.0, "remote")], CONFIDENCE, Target(min_accuracy=1.0))


# ---------------------------------------------------------------- the file


def test_a_router_is_the_same_after_a_round_trip_and_takes_a_new_target(tmp_path):
    router = fit_router(ROWS, score="margin", skills=["sit", "move"], task="robot", target=Target(max_cloud_share=0.25))
    save_router(router, tmp_path / "router.json")
    loaded = load_router(tmp_path / "router.json")
    assert loaded == router
    assert loaded.with_target(Target(max_cloud_share=0.4)).point.cloud_share == pytest.approx(0.4)
    curve = loaded.curve()
    assert curve[0]["share"] == pytest.approx(0.1) and curve[-1]["share"] == 1
    assert "text" not in json.loads((tmp_path / "router.json").read_text())["examples"][0]


def test_the_live_curve_counts_each_side_with_its_probability_of_being_right():
    rows = [example(-0.1, 1.0, 1.0), example(-1.0, 0.0, 1.0), example(-2.0, 0.0, 0.0)]
    router = fit_router(rows, score="margin")
    cloud = router.cloud_calibration()
    sure, unsure, lost = (router.confidence(row.scores) for row in rows)
    assert [cloud.probability(value) for value in (lost, unsure, sure)] == [0, 1, 1]
    assert router.live([], cloud) == {"curve": [], "point": None}
    # The sure one stays; of the two that go the cloud gets one; the grammar sends the last one, however sure.
    live = router.live([(sure, False), (unsure, False), (lost, False), (sure, True)], cloud)
    assert unsure < router.point.threshold <= sure
    assert live["point"] == pytest.approx({"share": 3 / 4, "accuracy": (sure + 1 + 0 + 1) / 4})
    assert [point["share"] for point in live["curve"]] == [0.25, 0.5, 0.75, 1]
    assert live["curve"][0]["accuracy"] == pytest.approx((sure + unsure + lost + 1) / 4)


def test_the_score_that_tells_right_from_wrong_best_is_taken():
    rows = [
        replace(example(-0.5, float(i < 3)), scores={**dict.fromkeys(SCORES, -0.5), "entropy": -0.1 * i})
        for i in range(6)
    ]
    router = fit_router(rows)
    assert router.score == "entropy" and router.report["entropy"]["auroc"] == 1


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": "other", "format_version": 1}', '{"format": "shadowpeft-router"}']
)
def test_a_file_that_is_no_router_is_refused(tmp_path, text):
    path = tmp_path / "router.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="router"):
        load_router(path)
    with pytest.raises(ConfigError, match="shadowpeft calibrate"):
        load_router(tmp_path / "other.json")


# ---------------------------------------------------------------- the breaker


def test_the_breaker_opens_after_failures_in_a_row_and_tries_once_after_a_while():
    now = [0.0]
    breaker = CircuitBreaker(max_failures=2, open_seconds=5, clock=lambda: now[0])
    for outcome in ("failed", "succeeded", "failed", "failed"):
        getattr(breaker, outcome)(breaker.admit())
    assert breaker.is_open and breaker.admit() is None
    now[0] = 6
    trial = breaker.admit()
    assert trial.is_trial and breaker.admit() is None
    breaker.failed(trial)
    assert breaker.admit() is None
    now[0] = 12
    breaker.released(breaker.admit())
    breaker.succeeded(breaker.admit())
    assert not breaker.is_open and not breaker.admit().is_trial


@pytest.mark.parametrize("outcome", ["failed", "released"])
def test_a_call_from_before_the_breaker_opened_lets_no_second_trial_through_and_does_not_prolong_it(outcome):
    now = [0.0]
    breaker = CircuitBreaker(max_failures=1, open_seconds=5, clock=lambda: now[0])
    old, first = breaker.admit(), breaker.admit()
    breaker.failed(first)
    now[0] = 4
    getattr(breaker, outcome)(old)
    now[0] = 6
    other = breaker.admit()
    assert other is not None and other.is_trial
    getattr(breaker, outcome)(old)
    assert breaker.admit() is None
    breaker.succeeded(other)
    assert not breaker.is_open
