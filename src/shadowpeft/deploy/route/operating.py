"""The threshold for a target, and what to expect of it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from shadowpeft.errors import ConfigError
from shadowpeft.evaluate.result import bootstrap

# Above every probability: everything goes to the cloud.
ALL_TO_CLOUD = 2.0


@dataclass(frozen=True, kw_only=True)
class Example:
    """One validation row as the router would see it.

    Attributes:
        scores: by name.
        edge, cloud: 1.0 where that side's answer is right.
        reason: why the grammar alone sends it to the cloud, if it does.
        is_out_of_scope: whether it is meant to go there.
    """

    scores: dict[str, float]
    edge: float
    cloud: float
    reason: str | None
    is_out_of_scope: bool


@dataclass(frozen=True, kw_only=True)
class OperatingPoint:
    """A threshold and its expected cost and quality, on the validation rows.

    Attributes:
        threshold: answers with less confidence go to the cloud.
        cloud_share, cloud_share_interval: of all rows, with a 95% bootstrap interval.
        normal_cloud_share: of the rows that are not out of scope; None without any.
        accuracy, accuracy_interval: of the system.
    """

    threshold: float
    cloud_share: float
    cloud_share_interval: tuple[float, float]
    normal_cloud_share: float | None
    accuracy: float
    accuracy_interval: tuple[float, float]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def escalates(example: Example, confidence: float, threshold: float) -> bool:
    return example.reason is not None or confidence < threshold


def thresholds(examples: Sequence[Example], confidence: Sequence[float]) -> list[float]:
    """Every threshold that makes a difference, ascending: each confidence itself, and one above all."""
    values = {c for example, c in zip(examples, confidence, strict=True) if example.reason is None}
    return [*sorted(values), ALL_TO_CLOUD]


def sweep(examples: Sequence[Example], confidence: Sequence[float]) -> list[tuple[float, float, float]]:
    """(threshold, share of the cloud, accuracy) for every threshold that makes a difference, in one pass."""
    order = sorted(zip(confidence, examples, strict=True), key=lambda pair: pair[0])
    n = len(order)
    forced = [example for example in examples if example.reason is not None]
    num_cloud = len(forced)
    right = sum(example.cloud if example.reason else example.edge for example in examples)
    points = []
    rows = [(c, example) for c, example in order if example.reason is None]
    for place, (value, example) in enumerate(rows):
        if place == 0 or value != rows[place - 1][0]:
            points.append((value, num_cloud / n, right / n))
        num_cloud += 1
        right += example.cloud - example.edge
    return [*points, (ALL_TO_CLOUD, num_cloud / n, right / n)]


def choose_threshold(
    examples: Sequence[Example],
    confidence: Sequence[float],
    *,
    max_cloud_share: float | None = None,
    min_accuracy: float | None = None,
) -> float:
    """The threshold for a target; without one, the best accuracy at the lowest share.

    Raises:
        ConfigError: both targets, a target outside [0, 1], or one that cannot be reached; says what can.
    """
    for name, value in (("max_cloud_share", max_cloud_share), ("min_accuracy", min_accuracy)):
        if value is not None and not 0 <= value <= 1:
            raise ConfigError(f"{name}={value} is not valid: expected a share from 0 to 1")
    if max_cloud_share is not None and min_accuracy is not None:
        raise ConfigError("give max_cloud_share or min_accuracy, not both: one follows from the other")
    points = sweep(examples, confidence)
    if max_cloud_share is not None:
        fitting = [point for point in points if point[1] <= max_cloud_share + 1e-12]
        if not fitting:
            raise ConfigError(
                f"the skill grammar alone sends {points[0][1]:.3f} of the validation rows to the cloud, more than "
                f"max_cloud_share={max_cloud_share}; ask for at least that"
            )
        return max(fitting, key=lambda point: (point[2], -point[1]))[0]
    if min_accuracy is not None:
        fitting = [point for point in points if point[2] >= min_accuracy - 1e-12]
        if not fitting:
            best = max(point[2] for point in points)
            raise ConfigError(f"no threshold reaches min_accuracy={min_accuracy}; the best is {best:.4f}")
        return fitting[0][0]
    return max(points, key=lambda point: (point[2], -point[1]))[0]


def operating_point(examples: Sequence[Example], confidence: Sequence[float], threshold: float) -> OperatingPoint:
    """Expected share and accuracy of ``threshold``, with their intervals."""
    gone = [float(escalates(e, c, threshold)) for e, c in zip(examples, confidence, strict=True)]
    right = [e.cloud if g else e.edge for e, g in zip(examples, gone, strict=True)]
    normal = [g for e, g in zip(examples, gone, strict=True) if not e.is_out_of_scope]
    return OperatingPoint(
        threshold=threshold,
        cloud_share=sum(gone) / len(gone),
        cloud_share_interval=_interval(gone),
        normal_cloud_share=sum(normal) / len(normal) if normal else None,
        accuracy=sum(right) / len(right),
        accuracy_interval=_interval(right),
    )


def _interval(values: Sequence[float]) -> tuple[float, float]:
    return bootstrap([[value, 1.0] for value in values], lambda sums: sums[0] / sums[1])
