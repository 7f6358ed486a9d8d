"""Running a model over many inputs without training it."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from shadowpeft.errors import ConfigError

Progress = Callable[[int, int], None]


def in_batches(
    model: Any,
    items: Sequence[Sequence[int]],
    answer: Callable[[list[Sequence[int]]], list[Any]],
    batch_size: int,
    progress: Progress | None,
) -> tuple[list[Any], float]:
    """(the answer to each item in the items' order, seconds); batches hold items of like length.

    Raises:
        ConfigError: ``batch_size`` below 1.
    """
    check_batch_size(batch_size)
    order = sorted(range(len(items)), key=lambda index: len(items[index]), reverse=True)
    answers: list[Any] = [None] * len(items)
    started = time.perf_counter()
    with evaluating(model), torch.inference_mode():
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            for index, value in zip(chosen, answer([items[index] for index in chosen]), strict=True):
                answers[index] = value
            if progress is not None:
                progress(start + len(chosen), len(order))
    return answers, time.perf_counter() - started


def check_batch_size(batch_size: int) -> None:
    """Refuses a batch of no row.

    Raises:
        ConfigError: it is below 1.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size} is not valid: expected at least 1")


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """The model in evaluation mode; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training
