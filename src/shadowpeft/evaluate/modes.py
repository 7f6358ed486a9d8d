"""The untouched base, the attached model and the detached shadow, scored on the same rows with the same prompts."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from shadowpeft.errors import ConfigError
from shadowpeft.evaluate.score import Evaluation, evaluate
from shadowpeft.model import ShadowModel
from shadowpeft.model.build import frozen_parts
from shadowpeft.train.tasks import Task

MODES = ("base", "attached", "detached")


def score_modes(
    model: ShadowModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    rows: list[dict[str, Any]],
    *,
    modes: Iterable[str] = MODES,
    label_names: list[str] | None = None,
    max_length: int,
    batch_size: int = 64,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Evaluation]:
    """Scores by mode, in the order of ``modes``.

    Args:
        progress: called with (mode, prompts done, prompts in all) after every batch.

    Raises:
        ConfigError: an unknown mode.
    """
    modes = check_modes(modes)
    options: dict[str, Any] = {"label_names": label_names, "max_length": max_length, "batch_size": batch_size}
    scores = {}
    for mode in modes:
        told = None if progress is None else partial(progress, mode)
        if mode == "base":
            with model.disable_adapter():
                scores[mode] = evaluate(model, tokenizer, task, rows, progress=told, **options)
        else:
            chosen = model if mode == "attached" else model.detach()
            scores[mode] = evaluate(chosen, tokenizer, task, rows, progress=told, **options)
    return scores


def check_modes(modes: Iterable[str]) -> tuple[str, ...]:
    """The modes, if each is known and there is one at least.

    Raises:
        ConfigError: otherwise.
    """
    modes = tuple(modes)
    for mode in modes or ("",):
        if mode not in MODES:
            raise ConfigError(f"unknown mode {mode!r}; choose from {', '.join(MODES)}")
    return modes


def parameters_in_use(model: ShadowModel) -> dict[str, int]:
    """Trained parameters at work in each mode: none, those of the network, those of the network without its steps."""
    network = model.network()
    # By the config: a loaded adapter is frozen as a whole, and was trained all the same.
    frozen = {id(p) for part in frozen_parts(network) for p in part.parameters()}
    attached = sum(p.numel() for p in network.parameters() if id(p) not in frozen)
    only_attached = [*network.step_parts, *([] if network.head is None else [network.head])]
    steps = sum(p.numel() for part in only_attached for p in part.parameters())
    return {"base": 0, "attached": attached, "detached": attached - steps}
