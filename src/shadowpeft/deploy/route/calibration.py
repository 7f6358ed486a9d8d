"""From a score to the probability that the answer is right, fitted on validation rows; and how well that works."""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from shadowpeft.errors import ConfigError

_TINY = 1e-12


class Calibration(Protocol):
    """A non-decreasing map from scores to probabilities."""

    def probability(self, score: float) -> float: ...

    def to_dict(self) -> dict[str, Any]: ...


@dataclass(frozen=True, kw_only=True)
class Temperature:
    """``exp(score / T)``: T over 1 where the model is less sure than its own probabilities deserve, under 1 where more.

    (Guo et al. 2017 divide logits; for an answer of several tokens the score, a log-probability, takes their place.)
    """

    temperature: float

    def probability(self, score: float) -> float:
        return math.exp(score / self.temperature)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "temperature", "temperature": self.temperature}


@dataclass(frozen=True, kw_only=True)
class Isotonic:
    """Steps found by pooling adjacent violators: from ``starts[i]`` on, the probability is ``values[i]``."""

    starts: tuple[float, ...]
    values: tuple[float, ...]

    def probability(self, score: float) -> float:
        return self.values[max(bisect.bisect_right(self.starts, score) - 1, 0)]

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "isotonic", "starts": list(self.starts), "values": list(self.values)}


def from_dict(values: dict[str, Any]) -> Calibration:
    """Reads what ``to_dict`` wrote.

    Raises:
        ConfigError: an unknown kind.
    """
    if values.get("kind") == "temperature":
        return Temperature(temperature=float(values["temperature"]))
    if values.get("kind") == "isotonic":
        return Isotonic(starts=tuple(values["starts"]), values=tuple(values["values"]))
    raise ConfigError(f"unknown calibration {values.get('kind')!r}; expected 'temperature' or 'isotonic'")


def fit(kind: str, scores: Sequence[float], is_right: Sequence[bool]) -> Calibration:
    """The calibration of that kind.

    Raises:
        ConfigError: unknown kind, or no rows.
    """
    check_kind(kind)
    if not scores:
        raise ConfigError("there are no rows to calibrate on")
    return fit_temperature(scores, is_right) if kind == "temperature" else fit_isotonic(scores, is_right)


def check_kind(kind: str) -> None:
    """Refuses an unknown kind of calibration.

    Raises:
        ConfigError: it is neither ``temperature`` nor ``isotonic``.
    """
    if kind not in ("temperature", "isotonic"):
        raise ConfigError(f"unknown calibration {kind!r}; choose temperature or isotonic")


def fit_temperature(scores: Sequence[float], is_right: Sequence[bool]) -> Temperature:
    """The T that makes what happened likeliest, by golden-section search over log T; between e^-7 and e^7."""
    low, high, ratio = -7.0, 7.0, (math.sqrt(5) - 1) / 2

    def loss(log_temperature: float) -> float:
        calibration = Temperature(temperature=math.exp(log_temperature))
        return negative_log_likelihood([calibration.probability(score) for score in scores], is_right)

    for _ in range(60):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if loss(left) <= loss(right) else (left, high)
    return Temperature(temperature=math.exp((low + high) / 2))


def fit_isotonic(scores: Sequence[float], is_right: Sequence[bool]) -> Isotonic:
    """Least squares among non-decreasing maps; rows of one score are one block from the start."""
    sums: dict[float, list[float]] = {}
    for score, right in zip(scores, is_right, strict=True):
        entry = sums.setdefault(score, [0.0, 0.0])
        entry[0] += right
        entry[1] += 1
    blocks: list[tuple[float, float, float]] = []
    for start, (right, count) in sorted(sums.items()):
        block = (start, right, count)
        while blocks and blocks[-1][1] / blocks[-1][2] >= block[1] / block[2]:
            before = blocks.pop()
            block = (before[0], before[1] + block[1], before[2] + block[2])
        blocks.append(block)
    return Isotonic(starts=tuple(b[0] for b in blocks), values=tuple(b[1] / b[2] for b in blocks))


def negative_log_likelihood(probabilities: Sequence[float], is_right: Sequence[bool]) -> float:
    """Mean, in nats; probabilities are kept a tiny distance from 0 and 1."""
    total = 0.0
    for probability, right in zip(probabilities, is_right, strict=True):
        probability = min(max(probability, _TINY), 1 - _TINY)
        total -= math.log(probability if right else 1 - probability)
    return total / len(probabilities)


def expected_calibration_error(probabilities: Sequence[float], is_right: Sequence[bool], num_bins: int = 10) -> float:
    """Mean distance of confidence and accuracy over bins of equal width, weighted by their rows (Guo et al. 2017)."""
    bins: dict[int, list[tuple[float, bool]]] = {}
    for probability, right in zip(probabilities, is_right, strict=True):
        bins.setdefault(min(int(probability * num_bins), num_bins - 1), []).append((probability, right))
    gaps = (abs(sum(p for p, _ in rows) - sum(r for _, r in rows)) for rows in bins.values())
    return sum(gaps) / len(probabilities)


def auroc(scores: Sequence[float], is_positive: Sequence[bool]) -> float | None:
    """Probability that a positive row scores above a negative one, ties counting half. None without both kinds."""
    order = sorted(zip(scores, is_positive, strict=True))
    num_positive = sum(is_positive)
    num_negative = len(order) - num_positive
    if not num_positive or not num_negative:
        return None
    rank_sum, place = 0.0, 0
    while place < len(order):
        end = place
        while end < len(order) and order[end][0] == order[place][0]:
            end += 1
        rank_sum += sum(positive for _, positive in order[place:end]) * (place + end + 1) / 2
        place = end
    return (rank_sum - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative)
