"""Scoring of any causal language model or classifier of transformers' shape, by the tasks' own prompts."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from shadowpeft.errors import DataError
from shadowpeft.evaluate.batches import Progress, in_batches
from shadowpeft.evaluate.result import Answers, Evaluation, metrics_of, row_scores, scored
from shadowpeft.model.positions import num_positions, within_positions
from shadowpeft.train.answers import Row
from shadowpeft.train.data import (
    AnswerCollator,
    all_prompt_ids,
    cut_left,
    encode_classification,
    padding_id,
    target_ids,
)
from shadowpeft.train.tasks import Task

__all__ = [
    "Evaluation",
    "evaluate",
    "evaluate_choice",
    "evaluate_classification",
    "evaluate_generation",
    "majority_baseline",
]


def evaluate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    rows: Sequence[Row],
    *,
    label_names: Sequence[str] | None = None,
    max_length: int,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Scores ``model`` on ``rows`` in the way the task's kind asks for.

    Args:
        label_names: the classifier's labels in the order of its logits; needed for classification only.
        max_length: tokens of a prompt at most.
        max_new_tokens: of a generated answer; default: the task's.
        progress: called with (number done, number of distinct prompts) after every batch.

    Raises:
        DataError: no rows, labels the model does not know, or missing ``label_names``.
    """
    shared: dict[str, Any] = {"max_length": max_length, "batch_size": batch_size, "progress": progress}
    if task.kind == "classification":
        if label_names is None:
            raise DataError(
                f"task {task.name!r} is a classification: pass label_names, in the order of the logits"
            )
        return evaluate_classification(model, tokenizer, task, rows, label_names, **shared)
    if task.kind == "choice":
        return evaluate_choice(model, tokenizer, task, rows, **shared)
    return evaluate_generation(model, tokenizer, task, rows, max_new_tokens=max_new_tokens, **shared)


# ---------------------------------------------------------------- generation


def evaluate_generation(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    rows: Sequence[Row],
    *,
    batch_size: int = 16,
    max_length: int,
    max_new_tokens: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Greedy answers, extracted and scored. Rows with the same prompt are answered once.

    Prompt and answer stay within the positions the model has: the answer gets ``max_new_tokens``, but at most
    half of the positions, the prompt ``max_length``, but at most the rest.
    """
    _check_rows(task, rows)
    positions = num_positions(model.config)
    num_new = int(min(max_new_tokens or task.max_new_tokens, positions / 2))
    room = int(min(max_length, positions - num_new))
    prompts = all_prompt_ids(task, tokenizer, rows)
    asked = [tuple(cut_left(tokenizer, ids, room)) for ids in prompts]
    distinct = list(dict.fromkeys(asked))
    ends = _end_tokens(model, tokenizer)

    def answer(batch: list[Sequence[int]]) -> list[list[int]]:
        generated = _generate(model, tokenizer, batch, ends, num_new)
        return [_until_end(ids, ends) for ids in generated.tolist()]

    new_ids, seconds = in_batches(model, distinct, answer, batch_size, progress)
    texts = {
        prompt: str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        for prompt, ids in zip(distinct, new_ids, strict=True)
    }
    answers = Answers(
        texts=[texts[ids] for ids in asked],
        num_truncated=sum(len(ids) > room for ids in prompts),
        seconds=seconds,
        num_tokens=sum(map(len, new_ids)),
    )
    return scored(task, rows, answers)


def _generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Sequence[int]],
    ends: list[int],
    num_new: int,
    **options: Any,
) -> Any:
    """New ids [B, T'] under greedy decoding (what ``generate`` returns, if ``options`` ask for more).

    Every setting that could make a model's own generation config sample, punish repetition or complain is
    given here; that config is not touched.
    """
    batch = AnswerCollator(tokenizer, side="left")([{"input_ids": list(ids)} for ids in prompts])
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    output = model.generate(
        **batch,
        max_new_tokens=num_new,
        max_length=None,
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        repetition_penalty=1.0,
        pad_token_id=padding_id(tokenizer),
        eos_token_id=ends or None,
        use_cache=True,
        **options,
    )
    return output[:, batch["input_ids"].shape[1] :] if isinstance(output, Tensor) else output


def _end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokenizer's end token and those of the model's generation config."""
    others = model.generation_config.eos_token_id
    ends = [tokenizer.eos_token_id, *(others if isinstance(others, list) else [others])]
    return sorted({token for token in ends if token is not None})


def _until_end(ids: list[int], ends: list[int]) -> list[int]:
    """The ids up to the first end token, with it; what follows is padding."""
    stop = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    return ids[: stop + 1]


# ---------------------------------------------------------------- choice


def evaluate_choice(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    rows: Sequence[Row],
    *,
    batch_size: int = 16,
    max_length: int,
    progress: Progress | None = None,
) -> Evaluation:
    """The option whose letter is the likeliest next token after the prompt."""
    _check_rows(task, rows)
    assert task.choices is not None
    options = [task.choices(row) for row in rows]
    letters = {choices: choice_tokens(tokenizer, choices) for choices in set(map(tuple, options))}
    prompts = all_prompt_ids(task, tokenizer, rows)
    room = int(min(max_length, num_positions(model.config) - 1))
    leads = [letters[tuple(choices)][0] for choices in options]
    asked = [
        [*cut_left(tokenizer, ids, room - len(lead)), *lead] for ids, lead in zip(prompts, leads, strict=True)
    ]
    ends = _end_tokens(model, tokenizer)
    kept = sorted({token for _, tokens in letters.values() for token in tokens})

    def answer(batch: list[Sequence[int]]) -> list[list[int]]:
        output = _generate(model, tokenizer, batch, ends, 1, return_dict_in_generate=True, output_logits=True)
        return output.logits[0][:, kept].argsort(descending=True).tolist()

    rankings, seconds = in_batches(model, asked, answer, batch_size, progress)
    texts: list[str] = []
    for choices, ranking in zip(options, rankings, strict=True):
        tokens = letters[tuple(choices)][1]
        best = next(kept[place] for place in ranking if kept[place] in tokens)
        texts.append(choices[tokens.index(best)])
    answers = Answers(
        texts=texts,
        num_truncated=sum(len(ids) + len(lead) > room for ids, lead in zip(prompts, leads, strict=True)),
        seconds=seconds,
        num_tokens=len(rows),
    )
    return scored(task, rows, answers)


def choice_tokens(tokenizer: PreTrainedTokenizerBase, choices: Sequence[str]) -> tuple[list[int], list[int]]:
    """(ids that all choices start with, the one id in which each differs).

    Raises:
        DataError: the choices differ in more than their last token.
    """
    encoded = target_ids(tokenizer, choices)
    lead = encoded[0][:-1]
    tokens = [ids[-1] for ids in encoded]
    if any(ids[:-1] != lead for ids in encoded) or len(set(tokens)) < len(tokens):
        raise DataError(
            f"this tokenizer has no single token for each of {', '.join(map(str.strip, choices))}"
        )
    return lead, tokens


# ---------------------------------------------------------------- classification


def evaluate_classification(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    rows: Sequence[Row],
    label_names: Sequence[str],
    *,
    batch_size: int = 16,
    max_length: int,
    progress: Progress | None = None,
) -> Evaluation:
    """The label with the largest logit, from one pass over the text."""
    _check_rows(task, rows)
    room = within_positions(max_length, model.config)
    examples, report = encode_classification(task, tokenizer, rows, label_names, room)
    collate = AnswerCollator(tokenizer)

    def answer(batch: list[Sequence[int]]) -> list[int]:
        inputs = collate([{"input_ids": list(ids)} for ids in batch])
        output = model(**{name: tensor.to(model.device) for name, tensor in inputs.items()})
        return output.logits.argmax(-1).tolist()

    texts = [example["input_ids"] for example in examples]
    predicted, seconds = in_batches(model, texts, answer, batch_size, progress)
    answers = Answers(
        texts=[str(label_names[index]) for index in predicted],
        num_truncated=report.num_prompts_truncated,
        seconds=seconds,
        num_tokens=sum(map(len, texts)),
    )
    return scored(task, rows, answers)


# ---------------------------------------------------------------- baseline


def majority_baseline(task: Task, train_rows: Sequence[Row], rows: Sequence[Row]) -> float:
    """The headline metric of always giving the most frequent answer of the training rows."""
    _check_rows(task, train_rows)
    _check_rows(task, rows)
    counts = Counter(task.extract(task.target(row)) for row in train_rows)
    answers = [counts.most_common(1)[0][0]] * len(rows)
    return metrics_of(task, row_scores(task, answers, rows), answers, rows)[task.metric]


def _check_rows(task: Task, rows: Sequence[Row]) -> None:
    if not rows:
        raise DataError(f"there are no rows of task {task.name!r} to score")
