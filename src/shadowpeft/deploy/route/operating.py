"""The threshold for a target, and what to expect of it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

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
class Target:
    """What a threshold is set for: one of these, or nothing, which is the best accuracy at the lowest share.

    Attributes:
        max_cloud_share: of all rows.
        max_normal_share: of the rows that are not out of scope.
        min_accuracy: of the system.

    Raises:
        ConfigError: two targets, or one outside [0, 1].
    """

    max_cloud_share: float | None = None
    max_normal_share: float | None = None
    min_accuracy: float | None = None

    def __post_init__(self) -> None:
        for name, value in self.given().items():
            if not 0 <= value <= 1:
                raise ConfigError(f"{name}={value} is not valid: expected a share from 0 to 1")
        if len(self.given()) > 1:
            raise ConfigError(f"give one target, not {' and '.join(self.given())}")

    def given(self) -> dict[str, float]:
        return {name: value for name, value in asdict(self).items() if value is not None}


NO_TARGET = Target()


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


class Point(NamedTuple):
    """What a threshold means for the rows at hand; ``normal_share`` is of the rows in scope, 0 without any."""

    threshold: float
    share: float
    normal_share: float
    accuracy: float


def sweep(examples: Sequence[Example], confidence: Sequence[float]) -> list[Point]:
    """A point for every threshold that makes a difference, in one pass."""
    order = sorted(zip(confidence, examples, strict=True), key=lambda pair: pair[0])
    n, num_normal = len(order), sum(not example.is_out_of_scope for example in examples)
    forced = [example for example in examples if example.reason is not None]
    gone, normal_gone = len(forced), sum(not example.is_out_of_scope for example in forced)
    right = sum(example.cloud if example.reason else example.edge for example in examples)
    points = []
    rows = [(c, example) for c, example in order if example.reason is None]
    for place, (value, example) in enumerate(rows):
        if place == 0 or value != rows[place - 1][0]:
            points.append(Point(value, gone / n, normal_gone / max(num_normal, 1), right / n))
        gone += 1
        normal_gone += not example.is_out_of_scope
        right += example.cloud - example.edge
    return [*points, Point(ALL_TO_CLOUD, gone / n, normal_gone / max(num_normal, 1), right / n)]


def choose_threshold(examples: Sequence[Example], confidence: Sequence[float], target: Target = NO_TARGET) -> float:
    """The threshold for a target: the best accuracy within a share, or the lowest share that reaches an accuracy.

    Raises:
        ConfigError: the target cannot be reached; says what can.
    """
    points = sweep(examples, confidence)
    if target.min_accuracy is not None:
        fitting = [point for point in points if point.accuracy >= target.min_accuracy - 1e-12]
        if not fitting:
            best = max(point.accuracy for point in points)
            raise ConfigError(f"no threshold reaches min_accuracy={target.min_accuracy}; the best is {best:.4f}")
        return fitting[0].threshold
    for name, value, of in (("max_cloud_share", "share", "validation"), ("max_normal_share", "normal_share", "normal")):
        limit = getattr(target, name)
        if limit is None:
            continue
        least = getattr(points[0], value)
        points = [point for point in points if getattr(point, value) <= limit + 1e-12]
        if not points:
            raise ConfigError(
                f"the skill grammar alone sends {least:.3f} of the {of} rows to the cloud, more than {name}={limit}; ask "
                "for at least that"
            )
    return max(points, key=lambda point: (point.accuracy, -point.share)).threshold


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
