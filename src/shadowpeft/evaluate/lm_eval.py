"""Base, attached and detached under EleutherAI's lm-evaluation-harness, without writing a checkpoint for it."""

from collections.abc import Iterable
from contextlib import nullcontext
from importlib import import_module
from typing import Any

from transformers import PreTrainedTokenizerBase

from shadowpeft.errors import ConfigError
from shadowpeft.evaluate.batches import evaluating
from shadowpeft.evaluate.modes import MODES
from shadowpeft.model import ShadowModel
from shadowpeft.train.sources import MissingPackageError


def lm_eval_scores(
    model: ShadowModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[Any],
    *,
    modes: Iterable[str] = MODES,
    batch_size: int = 8,
    add_bos_token: bool | None = None,
    **options: Any,
) -> dict[str, dict[str, dict[str, Any]]]:
    """mode -> task -> metric -> value, as ``lm_eval`` names them (``"acc,none"``).

    Args:
        tasks: names that ``lm_eval`` knows, or task configs as mappings.
        add_bos_token: see ``lm_eval.models.huggingface.HFLM``.
        options: of ``lm_eval.simple_evaluate``, such as ``num_fewshot``, ``limit`` or ``apply_chat_template``.

    Raises:
        MissingPackageError: ``lm_eval`` is not installed.
        ConfigError: an unknown mode, or a classifier, which the harness cannot ask.
    """
    try:
        # Without its types: it wraps its functions so that checkers see no arguments, and need not be installed.
        harness: Any = import_module("lm_eval")
        models: Any = import_module("lm_eval.models.huggingface")
    except ImportError as error:
        raise MissingPackageError("scoring with lm_eval needs the package: pip install lm_eval") from error
    if not model.can_generate():
        raise ConfigError("lm_eval asks language models; this is a classifier, score it with `shadowpeft eval`")
    scores = {}
    for mode in modes:
        if mode not in MODES:
            raise ConfigError(f"unknown mode {mode!r}; choose from {', '.join(MODES)}")
        chosen = model.detach() if mode == "detached" else model
        with evaluating(chosen), model.disable_adapter() if mode == "base" else nullcontext():
            wrapped = models.HFLM(
                pretrained=chosen, tokenizer=tokenizer, batch_size=batch_size, add_bos_token=add_bos_token
            )
            found = harness.simple_evaluate(model=wrapped, tasks=tasks, **options)
        scores[mode] = dict(found["results"])
    return scores
