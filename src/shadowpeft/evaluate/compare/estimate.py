"""What a comparison will cost: parameters from shapes, memory from a formula, hours from measured step times."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from shadowpeft.errors import ConfigError, DataError, ShadowPeftError
from shadowpeft.evaluate.compare.budget import Sized, base_config, meta_base
from shadowpeft.evaluate.compare.fit import num_steps
from shadowpeft.evaluate.compare.gather import Gathered
from shadowpeft.evaluate.compare.plan import Cell
from shadowpeft.evaluate.compare.store import Store
from shadowpeft.train.config import TrainConfig

StepKey = tuple[str, str, str]  # base, task, method
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one optimizer step, and what measured them."""

    seconds: float
    source: str


@dataclass(frozen=True, kw_only=True)
class Estimated:
    """One line of ``--plan``: all cells of one section, base, task, method and variant.

    Attributes:
        left: cells that a run would take up: those without a current result, failed ones aside.
        problem: why the sizes cannot be solved, else None.
        steps: optimizer steps of all seeds (of all trials, for a search); None if the number of rows is not known.
        memory_gib: of one training; see :func:`memory_bytes`.
        hours: steps times the measured seconds of one; None without a measurement.
        source: what measured them.
    """

    section: str
    base: str
    task: str
    method: str
    variant: str
    cells: int
    left: int
    sized: Sized | None
    problem: str | None
    steps: int | None
    memory_gib: float | None
    hours: float | None
    source: str | None = None


def estimate(
    cells: list[Cell], store: Store, times: Mapping[StepKey, StepTime] | None = None, left: Collection[str] | None = None
) -> list[Estimated]:
    """Groups cells that differ in the seed alone.

    Args:
        times: measured step times; they go before those that the recipe gives.
        left: ids of the cells that are not done; None: all.
    """
    groups: dict[tuple[str, ...], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.section, cell.base, cell.task, cell.method, cell.variant), []).append(cell)
    waiting = {cell.id for cell in cells} if left is None else left
    return [_of_group(group, store, times or {}, waiting) for group in groups.values()]


def times_of_results(gathered: Gathered, source: str) -> dict[StepKey, StepTime]:
    """The mean step time of the trainings there are, of all sizes and variants of a method."""
    costs: dict[StepKey, list[dict[str, Any]]] = {}
    for cell, result in gathered.results:
        found = [trial["train"] for trial in result.get("trials", ())] or [result.get("train")]
        costs.setdefault((cell.base, cell.task, cell.method), []).extend(cost for cost in found if cost)
    return {
        key: StepTime(
            seconds=60 * sum(cost["minutes"] for cost in found) / sum(cost["steps"] for cost in found), source=source
        )
        for key, found in costs.items()
        if found
    }


def _of_group(group: list[Cell], store: Store, times: Mapping[StepKey, StepTime], left: Collection[str]) -> Estimated:
    cell, recipe = group[0], store.recipe
    shared: dict[str, Any] = {name: getattr(cell, name) for name in ("section", "base", "task", "method", "variant")} | {
        "cells": len(group),
        "left": sum(each.id in left for each in group),
    }
    nothing: dict[str, Any] = {"sized": None, "problem": None, "steps": None, "memory_gib": None, "hours": None}
    if cell.section == "latency":
        return Estimated(**shared, **nothing)
    try:
        sized = store.size(cell, num_labels(cell.task, store))
    except ShadowPeftError as error:
        return Estimated(**shared, **{**nothing, "problem": str(error)})
    config = recipe.train_config(cell.base, cell.task, cell.method)
    if not sized.trainable:
        return Estimated(**shared, **{**nothing, "sized": sized, "steps": 0, "hours": 0.0})
    steps = _steps(cell, config, store)
    total = None if steps is None else steps * len(group)
    if total is not None and cell.section == "search":
        total = recipe.search.trials * math.ceil(total * recipe.search.share)
    spec = recipe.bases[cell.base]
    kind = recipe.methods[cell.method].kind
    given = spec.step_seconds.get(cell.method, spec.step_seconds.get(kind))
    time = times.get((cell.base, cell.task, cell.method))
    tokens = recipe.tasks[cell.task].mean_tokens or config.max_length
    if time is None and given is not None:
        step = config.batch_size * config.gradient_accumulation * tokens
        share = 1.0 if spec.step_tokens is None else step / spec.step_tokens
        time = StepTime(seconds=given * share, source=spec.measured_on or "the recipe's base")
    shape = base_config(store.base_path(cell.base), spec.config)
    memory = memory_bytes(shape, config, sized, tokens=tokens)
    return Estimated(
        **shared,
        sized=sized,
        problem=None,
        steps=total,
        memory_gib=memory / 2**30,
        hours=None if time is None or total is None else total * time.seconds / 3600,
        source=None if time is None else time.source,
    )


def num_labels(task: str, store: Store) -> int | None:
    """Labels of a task entry, from the recipe or else the data; None for tasks answered by text."""
    if store.task(task).kind != "classification":
        return None
    given = store.recipe.tasks[task].num_labels
    return given if given is not None else len(store.labels(task) or ())


def _steps(cell: Cell, config: TrainConfig, store: Store) -> int | None:
    rows = store.recipe.tasks[cell.task].num_rows
    if config.max_steps <= 0 and rows is None:
        try:
            rows = len(store.rows(cell.task, "train"))
        except (DataError, ConfigError):
            return None
    rows = rows or 1
    return num_steps(config, rows if config.limit_train is None else min(rows, config.limit_train))


def memory_bytes(shape: PreTrainedConfig, config: TrainConfig, sized: Sized, *, tokens: int) -> float:
    """A rough estimate of one training's peak, in bytes.

    Weights as stored; for each trained parameter a gradient and two moments in fp32, and its fp32 copy; activations
    that a frozen block keeps for the backward pass (about 14 d + 3 m numbers a token) and the fp32 logits, twice.
    """
    base = meta_base(shape, None)
    stored = sum(p.numel() for p in base.parameters()) * BYTES.get(config.dtype, 2)
    width, blocks = shape.hidden_size, shape.num_hidden_layers
    a_token = 14 * width + 3 * (getattr(shape, "intermediate_size", None) or 4 * width)
    kept = blocks * a_token if not config.gradient_checkpointing else blocks * width + a_token
    batch = config.batch_size * tokens
    return stored + 16 * sized.trainable + batch * (kept * BYTES.get(config.dtype, 2) + 8 * shape.vocab_size)
