"""How long prefill and each further token take, all methods in turn in one process."""

import copy
import inspect
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shadowpeft.evaluate.batches import evaluating
from shadowpeft.generate import collect_statistics
from shadowpeft.train.answers import Row
from shadowpeft.train.data import AnswerCollator, cut_left, padding_id, prompt_ids
from shadowpeft.train.tasks import Task

Variants = dict[str, tuple[Any, dict[str, Any]]]
DRAFTED = 4


def measure_latency(
    base: PreTrainedModel,
    adapted: dict[str, Any],
    kinds: dict[str, str],
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    rows: Sequence[Row],
    settings: dict[str, Any],
) -> list[dict[str, Any]]:
    """One entry for each variant and batch size: median milliseconds of prefill and of one further token of the batch.

    Raises:
        RuntimeError: drafting gives other tokens than plain decoding in fp32 or wider, so its time would mean nothing. In
            narrower precisions two tokens can be level (docs/speculative.md, Ties); there ``equal_tokens`` says how many agree.

    Of a drafting variant an entry also has ``tokens_a_pass``: what a row gains in a pass of the base, from 1 (no draft stands)
    to one more than the drafts; None where ``generate`` did not draft.

    Args:
        adapted: method -> trained model.
        settings: ``prompt_tokens`` (prompts are cut or repeated to it), ``new_tokens``, ``batch_sizes``, ``rounds``.

    Every round times every variant once, in turn, so that a machine's drift meets all alike. A further token's time is that of
    the whole answer less the prefill's, divided by the number of further tokens; of a drafting variant, whose first drafts
    are checked in the pass that reads the prompt, the prefill is that of plain decoding.
    """
    variants = variants_of(base, adapted, kinds)
    new_tokens, rounds = settings.get("new_tokens", 32), settings.get("rounds", 5)
    entries = []
    for batch_size in settings.get("batch_sizes", (1, 8)):
        batch = prompt_batch(tokenizer, task, rows, batch_size, settings.get("prompt_tokens", 64))
        drafting = _check_drafting(variants, batch, new_tokens, tokenizer)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
        for round_index in range(rounds + 1):
            for name, (model, options) in variants.items():
                taken = _timed(model, batch, new_tokens, tokenizer, options)
                if round_index:  # the first round warms up
                    times[name].append(taken)
        for name, taken in times.items():
            prefill = statistics.median(first for first, _ in taken)
            whole = statistics.median(rest for _, rest in taken)
            entries.append(
                {
                    "variant": name,
                    "batch_size": batch_size,
                    "prompt_tokens": batch["input_ids"].shape[1],
                    "new_tokens": new_tokens,
                    "prefill_ms": round(1000 * prefill, 3),
                    "token_ms": round(1000 * (whole - prefill) / (new_tokens - 1), 3),
                    "rounds": rounds,
                    **drafting.get(name, {}),
                }
            )
    return entries


def variants_of(base: PreTrainedModel, adapted: dict[str, Any], kinds: dict[str, str]) -> Variants:
    """Name -> (model, options of ``generate``): merged and unmerged LoRA; the shadow attached, drafting, detached."""
    variants: Variants = {"base": (base, {})}
    for name, model in adapted.items():
        if kinds[name] in ("lora", "dora"):
            variants[f"{name} (unmerged)"] = (model, {})
            variants[f"{name} (merged)"] = (copy.deepcopy(model).merge_and_unload(), {})
            continue
        variants[f"{name} (attached)"] = (model, {})
        if can_draft(model):
            variants[f"{name} (attached, speculative)"] = (model, {"speculative": DRAFTED})
        variants[f"{name} (detached)"] = (model.detach(), {})
    return variants


def can_draft(model: Any) -> bool:
    return "speculative" in inspect.signature(type(model).generate).parameters


def prompt_batch(
    tokenizer: PreTrainedTokenizerBase, task: Task, rows: Sequence[Row], batch_size: int, num_tokens: int
) -> dict[str, torch.Tensor]:
    """``batch_size`` prompts of the task, all of ``num_tokens``: repeated until they are long enough, then cut from the left.

    So every batch size has prompts of one length and none has padding, which backends treat differently.
    """
    chosen = [rows[index % len(rows)] for index in range(batch_size)]
    ids = [prompt_ids(task, tokenizer, row) for row in chosen]
    ids = [cut_left(tokenizer, each * math.ceil(num_tokens / len(each)), num_tokens) for each in ids]
    return AnswerCollator(tokenizer, side="left")([{"input_ids": each} for each in ids])


def _timed(
    model: Any,
    batch: dict[str, torch.Tensor],
    new_tokens: int,
    tokenizer: PreTrainedTokenizerBase,
    options: dict[str, Any],
) -> tuple[float, float]:
    """(seconds to the first token, seconds to the last of ``new_tokens``), greedy and never stopped by an end token."""
    with evaluating(model), torch.inference_mode():
        first = _seconds(lambda: _generate(model, batch, 1, tokenizer, {}))
        return first, _seconds(lambda: _generate(model, batch, new_tokens, tokenizer, options))


def _generate(
    model: Any, batch: dict[str, torch.Tensor], count: int, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]
) -> torch.Tensor:
    """Prompt and ``count`` new tokens [B, T + count]."""
    return model.generate(
        **{name: part.to(model.device) for name, part in batch.items()},
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=padding_id(tokenizer),
        use_cache=True,
        **options,
    )


def _check_drafting(
    variants: Variants, batch: dict[str, torch.Tensor], count: int, tokenizer: PreTrainedTokenizerBase
) -> dict[str, dict[str, float | None]]:
    """Drafting variant -> share of its new tokens that are those of plain decoding, and the tokens of a pass."""
    found = {}
    for name, (model, options) in variants.items():
        if not options:
            continue
        with evaluating(model), torch.inference_mode():
            plain = _generate(model, batch, count, tokenizer, {})
            with collect_statistics() as collected:
                drafted = _generate(model, batch, count, tokenizer, options)
        equal = (drafted == plain)[:, -count:].float().mean().item()
        if equal < 1 and torch.finfo(model.dtype).bits >= 32:
            raise RuntimeError(f"{name} generates other tokens than plain decoding; its time says nothing")
        gained = round(collected[0].mean_accepted_length, 3) if collected else None
        found[name] = {"equal_tokens": round(equal, 4), "tokens_a_pass": gained}
    return found


def _seconds(call: Callable[[], Any]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started
