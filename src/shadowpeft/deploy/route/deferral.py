"""Cost against quality: what the system gets right when it hands its least sure rows to the cloud."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A deferral curve.

    Attributes:
        shares: of rows that go to the cloud, from 0 to 1.
        accuracies: of the system there.
        area: under the curve, by trapezoids.
    """

    shares: tuple[float, ...]
    accuracies: tuple[float, ...]
    area: float

    def at(self, share: float) -> float:
        """Accuracy at the largest share that is not above ``share``."""
        return [a for s, a in zip(self.shares, self.accuracies, strict=True) if s <= share + 1e-9][-1]


def deferral_curve(confidence: Sequence[float], edge: Sequence[float], cloud: Sequence[float]) -> Curve:
    """Rows go to the cloud in the order of rising confidence; rows of equal confidence go together.

    Args:
        confidence: of each row on the edge.
        edge, cloud: 1 where that side's answer is right, else 0.
    """
    order = sorted(range(len(confidence)), key=lambda row: confidence[row])
    right, shares, accuracies = float(sum(edge)), [0.0], [sum(edge) / len(edge)]
    for place, row in enumerate(order, start=1):
        right += cloud[row] - edge[row]
        is_tie = place < len(order) and confidence[order[place]] == confidence[row]
        if not is_tie:
            shares.append(place / len(order))
            accuracies.append(right / len(order))
    return Curve(shares=tuple(shares), accuracies=tuple(accuracies), area=_area(shares, accuracies))


def oracle_curve(edge: Sequence[float], cloud: Sequence[float]) -> Curve:
    """The best order there is: first rows that only the cloud gets right, last those that only the edge does."""
    gains = [e - c for e, c in zip(edge, cloud, strict=True)]
    unique = [gain + row * 1e-9 for row, gain in enumerate(gains)]
    return deferral_curve(unique, edge, cloud)


def random_curve(edge: Sequence[float], cloud: Sequence[float]) -> Curve:
    """What chance gives on average: the straight line from the edge's accuracy to the cloud's."""
    ends = (sum(edge) / len(edge), sum(cloud) / len(cloud))
    return Curve(shares=(0.0, 1.0), accuracies=ends, area=sum(ends) / 2)


def recovered_gap(curve: Curve) -> float | None:
    """RouteLLM's APGR: the area as a share of the way from edge-only to cloud-only. None if both are equally good."""
    edge, cloud = curve.accuracies[0], curve.accuracies[-1]
    return None if edge == cloud else (curve.area - edge) / (cloud - edge)


def share_for_gap(curve: Curve, part: float) -> float | None:
    """RouteLLM's CPT: the smallest share at which ``part`` of the gap to the cloud is closed; None without a gap."""
    edge, cloud = curve.accuracies[0], curve.accuracies[-1]
    if cloud <= edge:
        return None
    wanted = edge + part * (cloud - edge) - 1e-12
    return next(s for s, a in zip(curve.shares, curve.accuracies, strict=True) if a >= wanted)


def shuffled(n: int, seed: int = 0) -> list[float]:
    """Confidences without meaning, for one random router."""
    order = list(range(n))
    random.Random(seed).shuffle(order)
    return [float(place) for place in order]


def _area(shares: Sequence[float], accuracies: Sequence[float]) -> float:
    pairs = list(zip(shares, accuracies, strict=True))
    return sum((s1 - s0) * (a0 + a1) / 2 for (s0, a0), (s1, a1) in pairwise(pairs))
