"""Step times for ``--plan``, measured on this machine with random weights and random tokens: no hub, no data."""

import random
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from shadowpeft.errors import ConfigError
from shadowpeft.evaluate.compare.budget import base_config
from shadowpeft.evaluate.compare.estimate import StepKey, StepTime
from shadowpeft.evaluate.compare.fit import fit
from shadowpeft.evaluate.compare.methods import put_on
from shadowpeft.evaluate.compare.plan import Cell
from shadowpeft.evaluate.compare.store import Store

WARM_STEPS, STEPS = 2, 5


def measure_steps(cells: list[Cell], store: Store, num_labels: dict[str, int | None]) -> dict[StepKey, StepTime]:
    """The time of one optimizer step, for every method that is trained.

    Those that do not fit this machine's memory have none, nor have pretrained shadows, whose weights would have to be there.

    Args:
        num_labels: task entry -> labels, None for tasks answered by text.
    """
    wanted = {(cell.base, cell.task, cell.method): cell for cell in cells if cell.section in ("main", "transfer")}
    times = {}
    for key, cell in wanted.items():
        if store.recipe.methods[cell.method].kind in ("none", "shadow-pretrained"):
            continue
        try:
            seconds = step_seconds(cell, store, num_labels[cell.task])
        except torch.OutOfMemoryError:
            continue
        times[key] = StepTime(seconds=seconds, source="this machine")
    return times


def step_seconds(cell: Cell, store: Store, num_labels: int | None) -> float:
    """Seconds of one optimizer step at the task's mean length and the run's batch size, on the device there is.

    Raises:
        ConfigError: the recipe does not say how long the task's rows are.
    """
    recipe, spec = store.recipe, store.recipe.bases[cell.base]
    config = recipe.train_config(cell.base, cell.task, cell.method)
    length = recipe.tasks[cell.task].mean_tokens
    if length is None:
        raise ConfigError(f"task {cell.task!r} needs `mean_tokens:` in the recipe, so that a step can be measured")
    shape = base_config(store.base_path(cell.base), spec.config)
    sized = store.size(cell, num_labels)
    dtype = torch.float32 if config.dtype in ("auto", "float32") else getattr(torch, config.dtype)
    auto = AutoModelForCausalLM
    if num_labels is not None:
        auto, shape.num_labels = AutoModelForSequenceClassification, num_labels
    shape.pad_token_id = 0
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        base = auto.from_config(shape, dtype=dtype)
    model = put_on(base, store.method(cell.method, cell.base), sized, overrides={})
    padding: Any = SimpleNamespace(pad_token_id=0, eos_token_id=0)
    examples = _examples(config.batch_size * config.gradient_accumulation, length, shape.vocab_size, num_labels)
    fit(model, padding, examples, config, WARM_STEPS)
    return 60 * fit(model, padding, examples, config, STEPS)["minutes"] / STEPS


def _examples(count: int, length: int, vocabulary: int, num_labels: int | None) -> list[dict[str, Any]]:
    draw = random.Random(0)
    ids = [[draw.randrange(1, vocabulary) for _ in range(length)] for _ in range(count)]
    return [{"input_ids": row, "labels": row if num_labels is None else draw.randrange(num_labels)} for row in ids]
