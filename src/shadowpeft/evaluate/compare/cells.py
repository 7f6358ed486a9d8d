"""Running one cell: search, train and score, or latencies. Nothing is written here."""

import math
from collections import Counter
from dataclasses import replace
from typing import Any

from shadowpeft.evaluate.compare.budget import Sized
from shadowpeft.evaluate.compare.latency import measure_latency
from shadowpeft.evaluate.compare.loss import answer_loss
from shadowpeft.evaluate.compare.methods import trials_of
from shadowpeft.evaluate.compare.plan import Cell
from shadowpeft.evaluate.compare.recipe import methods_of
from shadowpeft.evaluate.compare.scoring import described, evaluate_rows, loss_options, score, scored_rows
from shadowpeft.evaluate.compare.store import Store
from shadowpeft.evaluate.compare.training import Payload, train_method
from shadowpeft.evaluate.record import data_revision
from shadowpeft.model import ShadowModel
from shadowpeft.model.bases import load_model, load_tokenizer
from shadowpeft.train.answers import Row
from shadowpeft.train.data import label_indices
from shadowpeft.train.finite import NotFiniteError


def run_cell(cell: Cell, store: Store) -> tuple[Payload, list[dict[str, Any]]]:
    """(what the result file says, raw generations)."""
    if cell.section == "search":
        return search(cell, store), []
    if cell.section == "latency":
        return _latency(cell, store), []
    for name in cell.score_on:
        check_labels(store, name, scored_rows(store, cell, name))
    setting = store.setting(cell, cell.method)
    fitted = train_method(cell, store, setting, seed=cell.seed)
    scores, generations = {}, []
    for name in cell.score_on:
        evaluation = score(fitted, fitted.model, cell, store, name)
        scores[name] = described(evaluation, fitted, fitted.model, cell, store, name)
        generations += [{"task": name, **row} for row in evaluation.generations]
    payload = {
        "setting": setting,
        "trainable": fitted.trainable,
        "target": fitted.sized.target,
        "sizes": _sizes(fitted.sized),
        "config": fitted.config.to_dict() | {"shadow": None},
        "base_revision": fitted.base_revision,
        "train": fitted.cost,
        "scores": scores,
    }
    if cell.score_detached and isinstance(fitted.model, ShadowModel):
        detached = fitted.model.detach()
        own = store.recipe.tasks[cell.task].score_on or (cell.task,)  # transfer is the attached model's
        found = {name: score(fitted, detached, cell, store, name) for name in own}
        payload["detached"] = {
            name: described(evaluation, fitted, detached, cell, store, name) for name, evaluation in found.items()
        }
        for name, evaluation in found.items():
            generations += [{"task": name, "mode": "detached", **row} for row in evaluation.generations]
    return payload, generations


def check_labels(store: Store, name: str, rows: list[Row]) -> None:
    """Finds a label that training never sees before it, not after.

    Raises:
        DataError: there is one.
    """
    labels = store.labels(name)
    if labels is not None:
        label_indices(store.task(name), rows, labels)


def _sizes(sized: Sized) -> Payload:
    """What was solved; ranks as a count of modules for each rank."""
    ranks = {f"rank {rank}": f"{count} modules" for rank, count in sorted(Counter(sized.ranks.values()).items())}
    return sized.shadow | ranks


# ---------------------------------------------------------------- search


def search(cell: Cell, store: Store) -> Payload:
    """Short runs over the method's settings, compared on validation rows; the test rows are never read."""
    spec = store.recipe.search
    rows = store.rows(cell.task, "validation", spec.limit_validation)
    check_labels(store, cell.task, rows)
    trials = []
    given = store.recipe.tasks[cell.task].trials.get(cell.method, ())
    for setting in trials_of(store.method(cell.method, cell.base), spec.trials, given):
        try:
            trials.append({"setting": setting, **_trial(cell, store, setting, rows)})
        except NotFiniteError as error:  # too high a rate is an answer too; other settings may well learn
            trials.append({"setting": setting, "metric": None, "loss": None, "diverged": str(error), "train": {}})
    best = max(trials, key=_quality)
    if best["loss"] is None or not math.isfinite(best["loss"]):
        why = best.get("diverged", f"a loss of {best['loss']}")
        raise NotFiniteError(f"every trial of {cell.id} diverged, the last one: {why}; give it lower rates")
    return {
        "chosen": best["setting"],
        "seed": spec.seed,
        "trials": trials,
        "validation_rows": len(rows),
        "validation_revision": data_revision(rows),
    }


def _trial(cell: Cell, store: Store, setting: Payload, rows: list[Row]) -> Payload:
    """One short run and what it is worth. Its model is gone when it returns, so the next one has the memory."""
    spec, task = store.recipe.search, store.task(cell.task)
    fitted = train_method(cell, store, setting, seed=spec.seed, share=spec.share)
    options = loss_options(fitted)
    found: Payload = {"metric": None, "loss": answer_loss(fitted.model, fitted.tokenizer, task, rows, **options)}
    if spec.criterion == "metric":
        found["metric"] = evaluate_rows(fitted, fitted.model, store, cell.task, rows).metrics[task.metric]
    if isinstance(fitted.model, ShadowModel):  # told, not chosen by
        found["detached_loss"] = answer_loss(fitted.model.detach(), fitted.tokenizer, task, rows, **options)
    return found | {"train": fitted.cost, "base_revision": fitted.base_revision}


def _quality(trial: Payload) -> tuple[float, float]:
    """The metric, then the loss; a run that diverged loses against any other."""
    if trial["loss"] is None or not math.isfinite(trial["loss"]):
        return -1.0, -math.inf
    return trial["metric"] or 0.0, -trial["loss"]


# ---------------------------------------------------------------- latency


def _latency(cell: Cell, store: Store) -> Payload:
    """Trains each adapter as the main table does (drafts need a trained shadow), then times all of them together."""
    fitted = {}
    for name in methods_of(store.recipe, "latency"):
        own = replace(cell, section="main", method=name)
        fitted[name] = train_method(own, store, store.setting(cell, name), seed=cell.seed)
    kinds = {name: store.recipe.methods[name].kind for name in fitted}
    settings = store.recipe.sections["latency"]
    task = store.task(cell.task)
    prompts = store.rows(cell.task, "test", settings.get("prompts", 8))
    tokenizer = load_tokenizer(store.base_path(cell.base))
    first = next(iter(fitted.values()))
    base = load_model(store.base_path(cell.base), dtype=first.config.dtype).to(first.model.device)
    return {
        "latency": measure_latency(
            base, {name: each.model for name, each in fitted.items()}, kinds, tokenizer, task, prompts, settings
        ),
        "trainable": {name: each.trainable for name, each in fitted.items()},
    }
