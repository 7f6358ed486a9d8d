"""Figures of one replay, of every router on the test rows, and of telling what is out of scope. No models here."""

from collections.abc import Sequence
from typing import Any

from shadowpeft.deploy.route.calibration import auroc
from shadowpeft.deploy.route.deferral import (
    Curve,
    deferral_curve,
    oracle_curve,
    random_curve,
    recovered_gap,
    share_for_gap,
)
from shadowpeft.deploy.route.scores import SCORES
from shadowpeft.deploy.system_eval.replay import Replay, quantile
from shadowpeft.evaluate.result import wilson


def system_figures(
    one: Replay, right: Sequence[float], out_of_scope: Sequence[bool], num_bytes: dict[str, int] | None
) -> dict[str, Any]:
    """Accuracy, cost and time of one system."""
    n, seconds = len(one.replies), [reply.seconds for reply in one.replies]
    gone = [_is_escalated(reply.info) for reply in one.replies]
    normal = [g for g, out in zip(gone, out_of_scope, strict=True) if not out]
    normal_right = [r for r, out in zip(right, out_of_scope, strict=True) if not out]
    latency = {f"p{share}": quantile(seconds, share / 100) * 1000 for share in (50, 95, 99)}
    return {
        "accuracy": sum(right) / n,
        "accuracy_interval": wilson(int(sum(right)), n),
        "accuracy_in_scope": sum(normal_right) / len(normal_right) if normal_right else None,
        "escalated": sum(gone) / n,
        "escalated_in_scope": sum(normal) / len(normal) if normal else None,
        "degraded": sum(bool(reply.info.get("degraded")) for reply in one.replies),
        "latency_ms": {"mean": 1000 * sum(seconds) / n, **latency},
        "seconds": one.seconds,
        "requests_per_second": n / one.seconds,
        "link_bytes": num_bytes,
        "latencies": seconds,
    }


def _is_escalated(info: dict[str, Any]) -> bool:
    return info["answered_by"] in ("cloud", "server") or bool(info.get("degraded"))


def routers_on_test(
    scores: Sequence[dict[str, float]], edge: Sequence[float], cloud: Sequence[float]
) -> dict[str, dict[str, Any]]:
    """Deferral curves by confidence score, of the best router there could be, and of chance."""
    curves = {name: deferral_curve([row[name] for row in scores], edge, cloud) for name in SCORES}
    curves |= {"oracle": oracle_curve(edge, cloud), "random": random_curve(edge, cloud)}
    right = [value == 1 for value in edge]
    table = {name: _described(curve) for name, curve in curves.items()}
    for name in SCORES:
        table[name]["auroc_right"] = auroc([row[name] for row in scores], right)
    return table


def _described(curve: Curve) -> dict[str, Any]:
    return {
        "area": curve.area,
        "recovered_gap": recovered_gap(curve),
        "share_for_gap": {f"{part:.0%}": share_for_gap(curve, part) for part in (0.5, 0.8, 0.95)},
        "shares": list(curve.shares),
        "accuracies": list(curve.accuracies),
    }


def scope_detection(
    scores: Sequence[dict[str, float]],
    attached_first: Sequence[float],
    attached_sequence: Sequence[float],
    out_of_scope: Sequence[bool],
) -> dict[str, float | None]:
    """AUROC of telling in scope from out of scope, by each edge score and by the attached model's probabilities.

    Args:
        scores: of the edge's answers.
        attached_first: log-probability of the attached model's first token, its maximum softmax probability.
        attached_sequence: that of its whole answer.
        out_of_scope: which rows are.
    """
    is_in = [not out for out in out_of_scope]
    table = {f"edge {name}": auroc([row[name] for row in scores], is_in) for name in SCORES}
    table["attached maximum softmax probability"] = auroc(attached_first, is_in)
    table["attached sequence probability"] = auroc(attached_sequence, is_in)
    return table
