"""Result files, read and gathered by what they belong to."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from shadowpeft.evaluate.compare.plan import Cell, is_same_training, plan_cells, scaling_cells
from shadowpeft.evaluate.compare.recipe import Recipe
from shadowpeft.evaluate.compare.results import as_numbers, current_result
from shadowpeft.evaluate.compare.statistics import Sample, mean_of_rows, row_by_row
from shadowpeft.train.tasks import TASKS, Task

Entry = dict[str, Any]
DETACHED = " (detached)"


@dataclass(frozen=True, kw_only=True)
class Key:
    """What one number of a table belongs to; seeds are gathered below it."""

    section: str
    base: str
    task: str
    method: str
    variant: str
    scored: str


@dataclass(kw_only=True)
class Gathered:
    """All current results of a comparison."""

    recipe: Recipe
    results: list[tuple[Cell, Entry]] = field(default_factory=list)
    failed: list[tuple[Cell, Entry]] = field(default_factory=list)
    missing: list[Cell] = field(default_factory=list)
    scores: dict[Key, dict[int, Entry]] = field(default_factory=lambda: defaultdict(dict))
    trained: dict[Key, int] = field(default_factory=dict)


def gather(recipe: Recipe, output: Path) -> Gathered:
    """Reads every planned cell. Results of other settings count as missing; failed ones are kept apart, and those of other
    data than most: rows that are not the same cannot be compared.
    """
    gathered = Gathered(recipe=recipe)
    done = []
    for cell in plan_cells(recipe):
        result = current_result(recipe, output, cell)
        if result is None:
            gathered.missing.append(cell)
        elif result["status"] == "failed":
            gathered.failed.append((cell, result))
        else:
            done.append((cell, result, _revisions(recipe, cell, result)))
    usual = _usual_revisions(revisions for _, _, revisions in done)
    scaling = scaling_cells(recipe)
    for cell, result, revisions in done:
        others = [what for what, revision in revisions.items() if revision != usual[what]]
        if others:
            error = f"{' and '.join(others)} are not those of the other cells; delete {cell.id}.json and run it on their data"
            gathered.failed.append((cell, {**result, "error": [error]}))
            continue
        gathered.results.append((cell, result))
        for each in (cell, *(variant for variant in scaling if is_same_training(recipe, cell, variant))):
            _add_scores(gathered, each, result)
    return gathered


def _revisions(recipe: Recipe, cell: Cell, result: Entry) -> dict[str, str]:
    """What a result was made of -> hash of these rows; where a base or method has fewer of them, they are others."""

    def named(what: str, limit: int | None) -> str:
        return what if limit is None else f"{what} (at most {limit})"

    found = {
        named(f"test rows of {name}", recipe.train_config(cell.base, name, cell.method).limit_eval): score["revision"]
        for name, score in result.get("scores", {}).items()
    }
    if "validation_revision" in result:
        what = f"validation rows of {cell.task} (at most {recipe.search.limit_validation})"
        found[what] = result["validation_revision"]
    trainings = [*result.get("trials", ()), *([result] if "train" in result else [])]
    for training in trainings:
        if "base_revision" in training:  # results of before have none
            found[f"weights of {cell.base}"] = training["base_revision"]
        if training["train"]:
            limit = recipe.train_config(cell.base, cell.task, cell.method).limit_train
            found[named(f"training rows of {cell.task}", limit)] = training["train"]["revision"]
    return found


def _usual_revisions(of_results: Iterable[dict[str, str]]) -> dict[str, str]:
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for revisions in of_results:
        for what, revision in revisions.items():
            counts[what][revision] += 1
    return {what: count.most_common(1)[0][0] for what, count in counts.items()}


def _add_scores(gathered: Gathered, cell: Cell, result: Entry) -> None:
    section = "main" if cell.section == "transfer" else cell.section
    # Of scaling, the attached model alone: that is what its other budgets have.
    detached = {} if section == "scaling" else result.get("detached", {})
    for suffix, scores in (("", result.get("scores", {})), (DETACHED, detached)):
        for name in cell.score_on:  # of a main cell that counts for scaling too, what scaling scores
            if name not in scores:
                continue
            key = Key(
                section=section,
                base=cell.base,
                task=cell.task,
                method=cell.method + suffix,
                variant=cell.variant,
                scored=name,
            )
            gathered.scores[key][cell.seed] = scores[name]
            gathered.trained[key] = result["trainable"]


# ---------------------------------------------------------------- samples


def sample_of(recipe: Recipe, scores: dict[int, Entry], scored: str, seeds: Iterable[int]) -> Sample:
    """The table [S, N, K] of some seeds' scores."""
    task = TASKS[recipe.tasks[scored].task]
    tables = [_counts(scores[seed]) for seed in seeds]
    return Sample(counts=torch.tensor(tables, dtype=torch.float64), value=_value_of(task, scores))


def _counts(score: Entry) -> list[list[float]]:
    if "counts" in score:
        return [as_numbers(line) for line in score["counts"]]
    return [[value, 1.0] for value in as_numbers(score["values"])]


def _value_of(task: Task, scores: dict[int, Entry]) -> Any:
    is_corpus = "counts" in next(iter(scores.values()))
    return row_by_row(task.corpus.value) if is_corpus and task.corpus is not None else mean_of_rows


def paired(gathered: Gathered, first: Key, second: Key) -> tuple[Sample, Sample] | None:
    """Both methods' samples over the seeds they share and the same rows; None where they share none.

    A method that needs no seed (the untouched base) is repeated for each of the other's.
    """
    left, right = dict(gathered.scores.get(first, {})), dict(gathered.scores.get(second, {}))
    for one, other in ((left, right), (right, left)):
        if one and other and gathered.recipe.is_untrained((first if one is left else second).method):
            one |= dict.fromkeys(other, next(iter(one.values())))
    seeds = sorted(
        seed for seed in set(left) & set(right)
        if left[seed]["revision"] == right[seed]["revision"]
    )  # fmt: skip
    if not seeds:
        return None
    recipe = gathered.recipe
    return sample_of(recipe, left, first.scored, seeds), sample_of(recipe, right, second.scored, seeds)
