"""How likely a model finds the right answers: a graded measure where exact answers are all wrong."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from shadowpeft.core.head_loss import IGNORE
from shadowpeft.evaluate.batches import evaluating
from shadowpeft.model.positions import within_positions
from shadowpeft.train.answers import Row
from shadowpeft.train.data import AnswerCollator, encode_classification, encode_generation
from shadowpeft.train.tasks import Task


def answer_loss(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    rows: Sequence[Row],
    *,
    labels: Sequence[str] | None,
    max_length: int,
    batch_size: int,
) -> float:
    """Mean cross-entropy of the rows' answers, in nats a token of the answer (a row, for classes).

    Only the prediction that is used counts: a shadow's auxiliary loss is no part of it.
    """
    length = within_positions(max_length, model.config)
    if labels is None:
        examples, _ = encode_generation(task, tokenizer, rows, length)
    else:
        examples, _ = encode_classification(task, tokenizer, rows, labels, length)
    examples = sorted(examples, key=lambda example: len(example["input_ids"]))
    collate = AnswerCollator(tokenizer)
    total, count = 0.0, 0
    with evaluating(model), torch.inference_mode():
        for start in range(0, len(examples), batch_size):
            batch = collate(examples[start : start + batch_size])
            batch = {name: part.to(model.device) for name, part in batch.items()}
            wanted = batch.pop("labels")
            logits = model(**batch).logits
            if wanted.dim() == 2:
                logits, wanted = logits[:, :-1], wanted[:, 1:]
            kept = wanted != IGNORE
            total += F.cross_entropy(logits[kept].float(), wanted[kept], reduction="sum").item()
            count += int(kept.sum())
    return total / max(count, 1)
