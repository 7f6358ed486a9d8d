"""A router as a JSON file: score, calibration, threshold, skills, and the validation rows they come from.

The rows (scores and right or wrong, no texts) stay in it, so that another target needs no model.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from shadowpeft.deploy.route import calibration as calibrations
from shadowpeft.deploy.route.calibration import Calibration
from shadowpeft.deploy.route.operating import (
    NO_TARGET,
    Example,
    OperatingPoint,
    Target,
    choose_threshold,
    escalates,
    operating_point,
    sweep,
)
from shadowpeft.deploy.route.scores import SCORES
from shadowpeft.errors import ConfigError
from shadowpeft.evaluate.record import write_record

FORMAT = "shadowpeft-router"
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Router:
    """Everything that decides.

    Attributes:
        score: name of the confidence score.
        calibration: from the score to a probability.
        skills: what the device can do; None: any answer will do.
        task: whose prompts it was calibrated with, if any.
        point: threshold and what to expect of it.
        examples: the validation rows.
        report: how good each score is, for people.
    """

    score: str
    calibration: Calibration
    skills: tuple[str, ...] | None
    task: str | None
    point: OperatingPoint
    examples: tuple[Example, ...]
    report: dict[str, Any]

    def confidence(self, scores: dict[str, float]) -> float:
        return self.calibration.probability(scores[self.score])

    def curve(self, num_points: int = 100) -> list[dict[str, float]]:
        """Expected accuracy over share, for drawing."""
        return _drawn(self.examples, self._confidences(), num_points)

    def cloud_calibration(self) -> Calibration:
        """From the edge's confidence to the probability that the cloud is right."""
        return calibrations.fit_isotonic(self._confidences(), [example.cloud == 1 for example in self.examples])

    def live(self, given: Sequence[tuple[float, bool]], cloud: Calibration, num_points: int = 100) -> dict[str, Any]:
        """Curve and point of answers whose truth nobody knows: each side is right with its probability.

        Args:
            given: of every answer, the edge's confidence, and whether the grammar alone sends it to the cloud.
            cloud: of :meth:`cloud_calibration`.

        Returns:
            ``curve`` as of :meth:`curve`; ``point``, share and accuracy at the threshold, None without answers.
        """
        if not given:
            return {"curve": [], "point": None}
        examples = [
            Example(
                scores={},
                edge=confidence,
                cloud=cloud.probability(confidence),
                reason="grammar" if is_forced else None,
                is_out_of_scope=False,
            )
            for confidence, is_forced in given
        ]
        confidence = [value for value, _ in given]
        gone = [escalates(e, c, self.point.threshold) for e, c in zip(examples, confidence, strict=True)]
        right = [e.cloud if is_gone else e.edge for e, is_gone in zip(examples, gone, strict=True)]
        point = {"share": sum(gone) / len(gone), "accuracy": sum(right) / len(right)}
        return {"curve": _drawn(examples, confidence, num_points), "point": point}

    def _confidences(self) -> list[float]:
        return [self.confidence(example.scores) for example in self.examples]

    def with_target(self, target: Target) -> "Router":
        """The same router at another operating point."""
        confidence = self._confidences()
        threshold = choose_threshold(self.examples, confidence, target)
        return replace(self, point=operating_point(self.examples, confidence, threshold))


def _drawn(examples: Sequence[Example], confidence: Sequence[float], num_points: int) -> list[dict[str, float]]:
    points = sweep(examples, confidence)
    stride = max(len(points) // num_points, 1)
    kept = [*points[:-1:stride], points[-1]]
    return [{"threshold": p.threshold, "share": p.share, "accuracy": p.accuracy} for p in kept]


def _auroc(report: dict[str, Any], name: str) -> float:
    """Of a confidence score; below any other where right and wrong answers cannot be told apart."""
    value = report[name]["auroc"]
    return -1.0 if value is None else value


def fit_router(
    examples: Sequence[Example],
    *,
    score: str | None = None,
    kind: str = "temperature",
    skills: Sequence[str] | None = None,
    task: str | None = None,
    target: Target = NO_TARGET,
) -> Router:
    """Calibrates and sets the threshold.

    Args:
        score: which one decides; None: the one that best tells right from wrong among rows that pass the grammar.
        kind: ``temperature`` or ``isotonic``.

    Raises:
        ConfigError: unknown score or kind, no rows, or a target out of reach.
    """
    check_choices(score=score, kind=kind)
    if not examples:
        raise ConfigError("there are no validation rows to fit a router on")
    report = score_report(examples, kind)
    if score is None:
        score = max(SCORES, key=partial(_auroc, report))
    open_rows = _open_rows(examples)
    calibration = calibrations.fit(kind, [e.scores[score] for e in open_rows], [e.edge == 1 for e in open_rows])
    confidence = [calibration.probability(example.scores[score]) for example in examples]
    threshold = choose_threshold(examples, confidence, target)
    return Router(
        score=score,
        calibration=calibration,
        skills=None if skills is None else tuple(sorted(skills)),
        task=task,
        point=operating_point(examples, confidence, threshold),
        examples=tuple(examples),
        report=report,
    )


def check_choices(*, score: str | None, kind: str) -> None:
    """Refuses arguments of :func:`fit_router` that are wrong whatever the examples.

    Raises:
        ConfigError: unknown score or kind.
    """
    calibrations.check_kind(kind)
    if score is not None and score not in SCORES:
        raise ConfigError(f"unknown score {score!r}; choose one of {', '.join(SCORES)}")


def score_report(examples: Sequence[Example], kind: str) -> dict[str, dict[str, float | None]]:
    """For each score: AUROC of right against wrong, of in against out of scope, calibration error before and after."""
    open_rows = _open_rows(examples)
    is_right = [example.edge == 1 for example in open_rows]
    table = {}
    for name in SCORES:
        values = [example.scores[name] for example in open_rows]
        raw = [calibrations.Temperature(temperature=1.0).probability(value) for value in values]
        fitted = calibrations.fit(kind, values, is_right)
        table[name] = {
            "auroc": calibrations.auroc(values, is_right),
            "auroc_in_scope": calibrations.auroc(
                [example.scores[name] for example in examples], [not example.is_out_of_scope for example in examples]
            ),
            "ece_raw": calibrations.expected_calibration_error(raw, is_right),
            "ece": calibrations.expected_calibration_error([fitted.probability(v) for v in values], is_right),
        }
    return table


def _open_rows(examples: Sequence[Example]) -> list[Example]:
    """Rows on which the confidence decides; all of them if the grammar leaves none."""
    return [example for example in examples if example.reason is None] or list(examples)


def save_router(router: Router, path: Path) -> None:
    """Writes the file, complete or not at all."""
    write_record(
        path,
        {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "score": router.score,
            "calibration": router.calibration.to_dict(),
            "skills": None if router.skills is None else list(router.skills),
            "task": router.task,
            "point": router.point.to_dict(),
            "report": router.report,
            "examples": [asdict(example) for example in router.examples],
        },
    )


def load_router(path: Path) -> Router:
    """Reads what :func:`save_router` wrote.

    Raises:
        ConfigError: no such file, or not a router of this version.
    """
    if not path.is_file():
        raise ConfigError(f"there is no router at {path}; make one with: shadowpeft calibrate ADAPTER --output {path}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != FORMAT or values["format_version"] != FORMAT_VERSION:
            raise ConfigError(f"{path} is no router of format version {FORMAT_VERSION}; calibrate again")
        point: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values["point"].items()}
        return Router(
            score=values["score"],
            calibration=calibrations.from_dict(values["calibration"]),
            skills=None if values["skills"] is None else tuple(values["skills"]),
            task=values["task"],
            point=OperatingPoint(**point),
            examples=tuple(Example(**example) for example in values["examples"]),
            report=values["report"],
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} is not a router ({type(error).__name__}: {error}); calibrate again") from error
