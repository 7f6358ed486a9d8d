"""From tables of samples to the tables of a report: lists of plain dictionaries, no text, no pictures."""

from collections import defaultdict
from typing import Any

from shadowpeft.evaluate.compare.gather import Entry, Gathered, Key, paired, sample_of
from shadowpeft.evaluate.compare.recipe import SEARCH, Recipe
from shadowpeft.evaluate.compare.statistics import (
    Estimate,
    Sample,
    difference,
    estimate,
    holm,
    mean_difference,
    mean_estimate,
)
from shadowpeft.train.tasks import TASKS

MEANS = {"classification": "classes", "choice": "choices", "generation": "written answers"}


def main_table(gathered: Gathered) -> list[Entry]:
    """base, task, method -> score, and the paired difference to each baseline; ``task`` None is a mean over tasks.

    One mean for tasks answered by a class and one for those answered by text: they have other metrics, and may read the same
    rows, where a mean's interval takes tasks for independent. A mean is over the tasks that method *and* baseline have.
    """
    recipe, table = gathered.recipe, []
    keys = [key for key in gathered.scores if key.section == "main" and key.scored in _own(recipe, key.task)]
    for base in dict.fromkeys(key.base for key in keys):
        of_base = [key for key in keys if key.base == base]
        for method in dict.fromkeys(key.method for key in of_base):
            own = {key: _pairs(gathered, key) for key in of_base if key.method == method}
            gaps_of = _gaps(method, own)
            for key in own:
                scores = gathered.scores[key]
                found = estimate(sample_of(recipe, scores, key.scored, sorted(scores)))
                gaps = gaps_of[key]
                further = _without(gaps, recipe.baseline)
                table.append(_entry(key, found, gaps.get(recipe.baseline), scores) | {"further": further})
            table += _means(recipe, base, method, own)
    return table


def _pairs(gathered: Gathered, key: Key) -> dict[str, tuple[Sample, Sample]]:
    """Baseline -> (own sample, the baseline's), of the seeds that both have."""
    baselines = (gathered.recipe.baseline, *gathered.recipe.further_baselines)
    found = {other: paired(gathered, key, _with_method(key, other)) for other in baselines}
    return {other: pair for other, pair in found.items() if pair}


def _gaps(method: str, pairs_of: dict[Key, dict[str, tuple[Sample, Sample]]]) -> dict[Key, dict[str, Estimate]]:
    """Task -> baseline -> difference, with p corrected over a method's tasks."""
    gaps: dict[str, dict[Key, Estimate]] = defaultdict(dict)
    for key, pairs in pairs_of.items():
        for other, pair in pairs.items():
            if other != method:
                gaps[other][key] = difference(*pair)
    corrected = {other: holm(found) for other, found in gaps.items()}
    return {key: {other: found[key] for other, found in corrected.items() if key in found} for key in pairs_of}


def _means(recipe: Recipe, base: str, method: str, pairs_of: dict[Key, dict[str, tuple[Sample, Sample]]]) -> list[Entry]:
    """Lines of the means over the tasks that a method and the baseline share, one a kind of task."""
    pairs: dict[str, dict[str, list[tuple[Sample, Sample]]]] = defaultdict(lambda: defaultdict(list))
    for key, of_key in pairs_of.items():
        for other, pair in of_key.items():
            pairs[TASKS[recipe.tasks[key.scored].task].kind][other].append(pair)
    lines = []
    for kind, of_kind in pairs.items():
        shared = of_kind.get(recipe.baseline)
        if not shared:
            continue
        gaps = {other: mean_difference(found) for other, found in of_kind.items() if other != method}
        lines.append(
            {
                "base": base, "task": None, "scored": None, "mean_of": MEANS[kind], "method": method, "num_tasks": len(shared),
                "score": mean_estimate([first for first, _ in shared]), "difference": gaps.get(recipe.baseline),
                "further": _without(gaps, recipe.baseline),
                "further_num_tasks": {other: len(of_kind[other]) for other in gaps if other != recipe.baseline},
            }
        )  # fmt: skip
    return lines


def _without(gaps: dict[str, Estimate], name: str) -> dict[str, Estimate]:
    return {other: gap for other, gap in gaps.items() if other != name}


def heading_of(entry: Entry) -> str:
    """What a line of the main table is about: a task (and what was trained on, where that is another), or the mean over a kind
    of them."""
    if entry["scored"] is None:
        return f"mean of {entry['mean_of']}"
    return entry["scored"] if entry["scored"] == entry["task"] else f"{entry['scored']} (trained on {entry['task']})"


def _own(recipe: Recipe, task: str) -> tuple[str, ...]:
    return recipe.tasks[task].score_on or (task,)


def _with_method(key: Key, method: str) -> Key:
    return Key(**{**vars(key), "method": method})


def _entry(key: Key, found: Any, gap: Any, scores: dict[int, Entry]) -> Entry:
    first = next(iter(scores.values()))
    losses = [score["answer_loss"] for score in scores.values() if score.get("answer_loss") is not None]
    return {
        **vars(key),
        "score": found,
        "difference": gap,
        "metric": first["headline"],
        "seeds": sorted(scores),
        "rows": first["n"],
        "answer_loss": sum(losses) / len(losses) if losses else None,
        "other_metrics": {
            name: sum(score["metrics"][name] for score in scores.values()) / len(scores)
            for name in first["metrics"]
            if name != first["headline"]
        },
    }


def transfer_table(gathered: Gathered) -> list[Entry]:
    """Every method trained on one task and scored on another, or on its own, where transfer was asked for."""
    settings = gathered.recipe.sections.get("transfer")
    if settings is None:
        return []
    tasks = settings.get("tasks", list(gathered.recipe.tasks))
    methods = settings.get("methods", list(gathered.recipe.methods))
    bases = settings.get("bases", list(gathered.recipe.bases))
    table = []
    for key, scores in gathered.scores.items():
        if key.section != "main" or key.base not in bases or key.method not in methods:
            continue
        if key.task not in tasks or key.scored not in tasks:
            continue
        pair = paired(gathered, key, _with_method(key, gathered.recipe.baseline))
        gap = difference(*pair) if pair and key.method != gathered.recipe.baseline else None
        table.append(_entry(key, estimate(sample_of(gathered.recipe, scores, key.scored, sorted(scores))), gap, scores))
    return table


def variant_table(gathered: Gathered, section: str) -> list[Entry]:
    """Scaling or ablations: each variant's score; for ablations the unchanged method's with the same seeds, and the paired
    difference to it."""
    table = []
    for key, scores in gathered.scores.items():
        if key.section != section:
            continue
        unchanged = Key(**{**vars(key), "section": "main", "variant": ""})
        pair = paired(gathered, key, unchanged) if section == "ablations" else None
        found = estimate(sample_of(gathered.recipe, scores, key.scored, sorted(scores)))
        entry = _entry(key, found, difference(*pair) if pair else None, scores)
        added = {"trainable": gathered.trained[key]}
        if pair:
            added |= {"unchanged": estimate(pair[1]), "unchanged_trainable": gathered.trained[unchanged]}
        table.append(entry | added)
    return table


def cost_table(gathered: Gathered) -> list[Entry]:
    """Trained parameters, minutes, memory and speed of each method on each base and task, means over seeds."""
    groups: dict[tuple[str, str, str], list[Entry]] = defaultdict(list)
    for cell, result in gathered.results:
        if cell.section in ("main", "transfer"):
            groups[cell.base, cell.task, cell.method].append(result)
    table = []
    for (base, task, method), found in groups.items():
        costs = [result["train"] for result in found if result["train"]]
        table.append(
            {
                "base": base,
                "task": task,
                "method": method,
                "trainable": found[0]["trainable"],
                "target": found[0]["target"],
                "setting": found[0]["setting"],
                **{name: _mean(costs, name) for name in ("minutes", "peak_memory_mib", "tokens_per_second")},
            }
        )
    return table


def search_table(gathered: Gathered) -> list[Entry]:
    """Every trial of every search, whether it was the one chosen, and whether its learning rate is the range's end.

    A chosen end says that the range was too narrow for that method.
    """
    return [
        {
            "base": cell.base,
            "task": cell.task,
            "method": cell.method,
            "parameters": cell.parameters,
            **{name: trial.get(name) for name in ("setting", "metric", "loss", "detached_loss")},
            "is_chosen": trial["setting"] == result["chosen"],
            "is_end": _rate(trial) in (min(map(_rate, result["trials"])), max(map(_rate, result["trials"]))),
        }
        for cell, result in gathered.results
        if cell.section == SEARCH
        for trial in result["trials"]
    ]


def _rate(trial: Entry) -> float:
    return trial["setting"].get("learning_rate", 0.0)


def latency_table(gathered: Gathered) -> list[Entry]:
    return [
        {"base": cell.base, "task": cell.task, **entry}
        for cell, result in gathered.results
        if cell.section == "latency"
        for entry in result["latency"]
    ]


def _mean(costs: list[Entry], name: str) -> float | None:
    values = [cost[name] for cost in costs if cost.get(name) is not None]
    return sum(values) / len(values) if values else None
