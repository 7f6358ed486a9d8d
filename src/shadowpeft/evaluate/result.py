"""From answers to metrics and their uncertainty."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shadowpeft.train.answers import Row
from shadowpeft.train.tasks import Task

NUM_RESAMPLES = 1000
SHOWN_PROMPT = 300
_Z = 1.959964  # two-sided 95% of the normal distribution


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One model's scores on one set of rows.

    Attributes:
        task: its name.
        headline: the metric that ``interval`` belongs to.
        metrics: name -> value from 0 to 1, over all rows.
        interval: 95% interval of the headline: Wilson's if every row is right or wrong, else bootstrap.
        n: rows.
        num_truncated: rows whose prompt was cut.
        seconds: time in the model.
        new_tokens: tokens generated; 0 for classification.
        tokens_per_second: new tokens a second; for classification input tokens a second.
        generations: one for each row, in the order given: ``prompt`` (its last 300 characters),
            ``prediction``, ``extracted`` (None: no answer found), ``target`` and ``score``.
    """

    task: str
    headline: str
    metrics: dict[str, float]
    interval: tuple[float, float]
    n: int
    num_truncated: int
    seconds: float
    new_tokens: int
    tokens_per_second: float
    generations: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a model said to each row. ``num_tokens`` is what the speed counts."""

    texts: list[str]
    num_truncated: int
    seconds: float
    num_tokens: int


def scored(task: Task, rows: Sequence[Row], answers: Answers) -> Evaluation:
    """Extracts, compares and sums up."""
    extracted = [task.extract(text) for text in answers.texts]
    scores = row_scores(task, extracted, rows)
    generations = [
        {
            "prompt": task.prompt(row)[-SHOWN_PROMPT:],
            "prediction": text,
            "extracted": answer,
            "target": task.target(row),
            "score": score,
        }
        for row, text, answer, score in zip(rows, answers.texts, extracted, scores, strict=True)
    ]
    return Evaluation(
        task=task.name,
        headline=task.metric,
        metrics=metrics_of(task, scores, extracted, rows),
        interval=headline_interval(task, scores, extracted, rows),
        n=len(rows),
        num_truncated=answers.num_truncated,
        seconds=answers.seconds,
        new_tokens=0 if task.kind == "classification" else answers.num_tokens,
        tokens_per_second=answers.num_tokens / max(answers.seconds, 1e-9),
        generations=generations,
    )


def row_scores(task: Task, extracted: Sequence[str | None], rows: Sequence[Row]) -> list[dict[str, float]]:
    return [task.score(answer, row) for answer, row in zip(extracted, rows, strict=True)]


def metrics_of(
    task: Task, scores: Sequence[dict[str, float]], extracted: Sequence[str | None], rows: Sequence[Row]
) -> dict[str, float]:
    """Means of the rows' metrics, and the metrics of the corpus."""
    means = {name: sum(score[name] for score in scores) / len(scores) for name in scores[0]}
    return means | task.corpus_score(extracted, rows)


def headline_interval(
    task: Task, scores: Sequence[dict[str, float]], extracted: Sequence[str | None], rows: Sequence[Row]
) -> tuple[float, float]:
    """95% interval of the headline metric."""
    if task.corpus is not None and task.metric == task.corpus.name:
        return bootstrap(task.corpus.counts(extracted, rows), task.corpus.value)
    values = [score[task.metric] for score in scores]
    if set(values) <= {0.0, 1.0}:
        return wilson(int(sum(values)), len(values))
    return bootstrap([[value, 1.0] for value in values], lambda sums: sums[0] / sums[1])


def wilson(num_right: int, n: int) -> tuple[float, float]:
    """Wilson's score interval (1927) of a share, at 95%."""
    share, spread = num_right / n, _Z**2 / n
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(spread * (share * (1 - share) + spread / 4)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap(
    counts: Sequence[Sequence[float]], value: Callable[[Sequence[float]], float], *, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval at 95% of ``value(summed counts)`` over resampled rows of ``counts`` [n, k]."""
    table = torch.tensor(counts, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(NUM_RESAMPLES):
        chosen = torch.randint(len(table), (len(table),), generator=generator)
        values.append(value(table[chosen].sum(0).tolist()))
    low, high = (
        torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    )
    return low, high
