"""Rows as token ids: one prompt for training and generation, loss on the answer only, padding."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from shadowpeft.core.head_loss import IGNORE
from shadowpeft.errors import DataError
from shadowpeft.train.answers import Row
from shadowpeft.train.sources import open_source, read_split
from shadowpeft.train.tasks import SPLITS, Task


def load_rows(task: Task, split: str, *, source: Path | None = None, limit: int | None = None, seed: int = 0) -> list[Row]:
    """The rows of ``train``, ``validation`` or ``test``.

    Args:
        source: None for the hub (or the task's built-in rows); a folder with ``{split}.jsonl`` (or ``.json``,
            ``.gz``, and any name in ``task.splits``); or a single file. What a source lacks is carved out of
            its training rows by a hash, the same rows every time: see
            :func:`shadowpeft.train.sources.locate`.
        limit: keep a random sample of this size, in the order of the source.
        seed: of that sample.

    Raises:
        DataError: missing, empty or malformed data; the message says where and what to do.
        MissingPackageError: the hub is asked for and ``datasets`` is not installed.
    """
    if split not in SPLITS:
        raise DataError(f"unknown split {split!r}; choose from {', '.join(SPLITS)}")
    if limit is not None and limit < 1:
        raise DataError(f"limit={limit} is not valid: expected at least 1, or None for all rows")
    rows = read_split(task, split, open_source(task, None if source is None else Path(source)))
    if limit is None or limit >= len(rows):
        return rows
    return [rows[index] for index in sorted(random.Random(seed).sample(range(len(rows)), limit))]


# ---------------------------------------------------------------- token ids


@dataclass(frozen=True, kw_only=True)
class EncodingReport:
    """What had to give for rows to fit; nothing is cut without being counted.

    Attributes:
        num_rows: rows given.
        num_prompts_truncated: prompts (or classified texts) that lost tokens.
        num_targets_truncated: answers longer than the limit on their own.
        num_dropped: rows with nothing to learn: an empty answer under a tokenizer without an end token.
        longest: tokens of the longest example.
    """

    num_rows: int
    num_prompts_truncated: int = 0
    num_targets_truncated: int = 0
    num_dropped: int = 0
    longest: int = 0


def uses_chat(tokenizer: PreTrainedTokenizerBase) -> bool:
    return getattr(tokenizer, "chat_template", None) is not None


def prompt_ids(task: Task, tokenizer: PreTrainedTokenizerBase, row: Row, max_length: int | None = None) -> list[int]:
    """The ids that a row's answer follows, the same in training and generation.

    With a chat template the prompt is the user's message and thinking is off; special tokens are the
    template's. Without one, BOS comes first if the tokenizer has it. Prompts longer than ``max_length`` lose
    tokens at the left, but not BOS.

    Raises:
        DataError: the prompt is empty.
    """
    return cut_left(tokenizer, all_prompt_ids(task, tokenizer, [row])[0], max_length)


def all_prompt_ids(task: Task, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> list[list[int]]:
    """:func:`prompt_ids` of many rows, uncut."""
    texts = [task.prompt(row) for row in rows]
    start: list[int] = []
    if uses_chat(tokenizer) and task.kind != "classification":
        texts = [as_chat(tokenizer, text) for text in texts]
    elif tokenizer.bos_token_id is not None:
        start = [tokenizer.bos_token_id]  # type: ignore[list-item]
    prompts = [start + ids for ids in _encode(tokenizer, texts)]
    for number, ids in enumerate(prompts, start=1):
        if not ids:
            raise DataError(f"row {number}: the prompt of task {task.name!r} is empty; remove or complete the row")
    return prompts


def as_chat(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """What a chat template makes of a user's only message, up to where the answer starts."""
    messages = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(  # type: ignore[return-value]
        messages, add_generation_prompt=True, tokenize=False, enable_thinking=False
    )


def target_ids(tokenizer: PreTrainedTokenizerBase, targets: Sequence[str]) -> list[list[int]]:
    """Ids of answers, without an end token.

    They are encoded apart from their prompts, so that a prompt's ids are exactly what generation starts from.
    The leading space is left out where a chat turn starts or the tokenizer writes one itself.
    """
    if uses_chat(tokenizer) or _adds_space(tokenizer):
        targets = [target.lstrip(" ") for target in targets]
    return _encode(tokenizer, targets)


def _adds_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether texts get a space in front, as in Llama's tokenizers; ``▁`` is how those write it."""
    tokens = tokenizer.convert_ids_to_tokens(_encode(tokenizer, ["a"])[0])
    return tokens[0].startswith("▁")


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    # verbose: no remark on texts beyond the model's length, they are cut later.
    encoded: Any = tokenizer(list(texts), add_special_tokens=False, verbose=False) if texts else {"input_ids": []}
    return encoded["input_ids"]


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of one text, without special tokens and however long."""
    return _encode(tokenizer, [text])[0]


def cut_left(tokenizer: PreTrainedTokenizerBase, ids: list[int], max_length: int | None) -> list[int]:
    """The last ``max_length`` ids; a BOS in front keeps its place."""
    if max_length is None or len(ids) <= max_length:
        return ids
    if ids[0] == tokenizer.bos_token_id:
        return [ids[0], *ids[len(ids) - max_length + 1 :]]
    return ids[len(ids) - max_length :]


def encode_generation(
    task: Task, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], max_length: int
) -> tuple[list[dict[str, Any]], EncodingReport]:
    """Examples ``{"input_ids", "labels"}`` of prompt, answer and end token; labels are -100 on the prompt.

    Too long: the prompt is cut from the left, so that the answer survives whole. Only an answer that leaves
    no room for one token of prompt is cut, at the right.

    Raises:
        DataError: ``max_length`` below 2, an empty prompt, or nothing left to learn.
    """
    if max_length < 2:
        raise DataError(f"max_length={max_length} is not valid: expected at least 2, one of prompt, one of answer")
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    prompts = all_prompt_ids(task, tokenizer, rows)
    answers = [ids + end for ids in target_ids(tokenizer, [task.target(row) for row in rows])]
    examples, prompts_cut, targets_cut = [], 0, 0
    for prompt, answer in zip(prompts, answers, strict=True):
        if not answer:
            continue
        kept = answer[: max_length - 1]
        context = cut_left(tokenizer, prompt, max_length - len(kept))
        targets_cut += len(kept) < len(answer)
        prompts_cut += len(context) < len(prompt)
        examples.append({"input_ids": context + kept, "labels": [IGNORE] * len(context) + kept})
    if rows and not examples:
        raise DataError(f"none of the {len(rows)} rows has an answer to learn; check the data of {task.name!r}")
    return examples, EncodingReport(
        num_rows=len(rows),
        num_prompts_truncated=prompts_cut,
        num_targets_truncated=targets_cut,
        num_dropped=len(rows) - len(examples),
        longest=_longest(examples),
    )


def encode_classification(
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    label_names: Sequence[str],
    max_length: int,
) -> tuple[list[dict[str, Any]], EncodingReport]:
    """Examples ``{"input_ids", "labels"}``: raw text cut at the right, the label's place in ``label_names``.

    Raises:
        DataError: ``max_length`` below 1, an empty text, or a label that is not in ``label_names``.
    """
    if max_length < 1:
        raise DataError(f"max_length={max_length} is not valid: expected at least 1")
    labels = label_indices(task, rows, label_names)
    texts = all_prompt_ids(task, tokenizer, rows)
    examples: list[dict[str, Any]] = [
        {"input_ids": ids[:max_length], "labels": label} for ids, label in zip(texts, labels, strict=True)
    ]
    num_cut = sum(len(ids) > max_length for ids in texts)
    report = EncodingReport(num_rows=len(rows), num_prompts_truncated=num_cut, longest=_longest(examples))
    return examples, report


def label_indices(task: Task, rows: Sequence[Row], label_names: Sequence[str]) -> list[int]:
    """The place of each row's label in ``label_names``.

    Raises:
        DataError: a label that the training rows do not have.
    """
    places = {name: index for index, name in enumerate(label_names)}
    for number, row in enumerate(rows, start=1):
        if task.target(row) not in places:
            raise DataError(
                f"row {number}: the label {task.target(row)!r} is not among those of the training rows: "
                f"{', '.join(label_names)}. Add training rows with it, or remove or correct this row"
            )
    return [places[task.target(row)] for row in rows]


def _longest(examples: Sequence[dict[str, Any]]) -> int:
    return max((len(example["input_ids"]) for example in examples), default=0)


# ---------------------------------------------------------------- batches


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The pad token, else the end token.

    Raises:
        DataError: the tokenizer has neither.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token  # type: ignore[return-value]
    raise DataError("the tokenizer has no pad and no end token to fill batches with; set tokenizer.pad_token")


@dataclass
class AnswerCollator:
    """Pads examples to one batch.

    ``input_ids`` and ``attention_mask`` [B, T]; ``labels`` [B, T] for lists of tokens, [B] for classes,
    absent if the examples have none. ``side`` is the side that is filled up.
    """

    tokenizer: PreTrainedTokenizerBase
    side: Literal["right", "left"] = "right"
    pad_to_multiple_of: int | None = None

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        ids = [example["input_ids"] for example in examples]
        width = max(len(row) for row in ids)
        width += -width % (self.pad_to_multiple_of or 1)
        batch = {
            "input_ids": self._pad(ids, width, padding_id(self.tokenizer)),
            "attention_mask": self._pad([[1] * len(row) for row in ids], width, 0),
        }
        if "labels" in examples[0]:
            labels = [example["labels"] for example in examples]
            is_class = isinstance(labels[0], int)
            batch["labels"] = torch.tensor(labels) if is_class else self._pad(labels, width, IGNORE)
        return batch

    def _pad(self, rows: Sequence[list[int]], width: int, value: int) -> Tensor:
        fills = [[value] * (width - len(row)) for row in rows]
        pairs = zip(fills, rows, strict=True) if self.side == "left" else zip(rows, fills, strict=True)
        return torch.tensor([first + second for first, second in pairs])
