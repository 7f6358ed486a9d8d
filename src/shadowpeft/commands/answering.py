"""`shadowpeft generate`: answer prompts with a saved adapter."""

from contextlib import nullcontext
from typing import Any

import torch
from rich.console import Console
from transformers import GenerationConfig, PreTrainedTokenizerBase

from shadowpeft.commands.scoring import check_kind
from shadowpeft.core.config import require
from shadowpeft.errors import ConfigError, DataError
from shadowpeft.evaluate.modes import MODES
from shadowpeft.generate import SpeculativeConfig, as_speculative, collect_statistics
from shadowpeft.model.load import load_with_tokenizer
from shadowpeft.train.data import prompt_ids
from shadowpeft.train.run import task_named


def generate(
    adapter: str,
    prompts: list[str],
    console: Console,
    *,
    task: str | None,
    mode: str,
    base: str | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    speculative: str | None = None,
    allow_other_weights: bool,
    device: str | None = None,
) -> None:
    """Prints one answer for each prompt, and with ``speculative`` how the drafts fared; a classifier's answer is a label.

    Raises:
        ConfigError: a setting out of its range, or ``speculative`` where there is no shadow beside its base.
        DataError: an empty prompt.
    """
    require(mode in MODES, "mode", mode, f"one of {', '.join(MODES)}")
    require(max_new_tokens >= 1, "max_new_tokens", max_new_tokens, "at least 1")
    require(temperature >= 0, "temperature", temperature, "at least 0")
    require(0 < top_p <= 1, "top_p", top_p, "a share above 0, up to 1")
    options = {} if speculative is None else {"speculative": _drafts(speculative, mode)}
    model, tokenizer = load_with_tokenizer(adapter, base=base, allow_other_weights=allow_other_weights, device=device)
    if task is not None:
        check_kind(task_named(task), model)
    torch.manual_seed(seed)
    config = _generation_config(tokenizer, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
    speaker = model.detach() if mode == "detached" else model
    with collect_statistics() as collected:
        for number, prompt in enumerate(prompts, start=1):
            ids = torch.tensor([_prompt_ids(prompt, task, tokenizer)], device=model.device)
            if not ids.numel():
                raise DataError(f"prompt {number} is empty; write something to answer")
            with model.disable_adapter() if mode == "base" else nullcontext():
                answer = _answer(speaker, tokenizer, ids, generation_config=config, **options)
            console.print(answer, markup=False, highlight=False, soft_wrap=True)
    num_drafted, num_accepted = sum(s.num_drafted for s in collected), sum(s.num_accepted for s in collected)
    if num_drafted:
        console.print(f"{num_accepted} of {num_drafted} drafted tokens accepted", style="dim")


def _generation_config(
    tokenizer: PreTrainedTokenizerBase, *, max_new_tokens: int, temperature: float, top_p: float
) -> GenerationConfig:
    """Greedy at temperature 0."""
    sampling: dict[str, Any] = {"temperature": temperature, "top_p": top_p} if temperature > 0 else {}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        **sampling,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


@torch.no_grad()
def _answer(model: Any, tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor, **options: Any) -> str:
    mask = torch.ones_like(ids)
    if not model.can_generate():
        return model.config.id2label[int(model(ids, attention_mask=mask).logits.argmax())]
    answer = model.generate(ids, attention_mask=mask, **options)
    return str(tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True))


def _drafts(speculative: str, mode: str) -> SpeculativeConfig:
    if mode != "attached":
        raise ConfigError(f"--speculative drafts for the attached model, but --mode is {mode}; leave one of them out")
    is_number = speculative.removeprefix("-").isdecimal()
    return as_speculative(int(speculative) if is_number else speculative)


def _prompt_ids(prompt: str, task: str | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if task is None:
        return tokenizer(prompt)["input_ids"]
    chosen = task_named(task)
    if not chosen.asks_one_text:
        raise ConfigError(f"task {task!r} asks with more than one text; leave --task out and write the whole prompt")
    return prompt_ids(chosen, tokenizer, dict.fromkeys(chosen.fields, prompt))
