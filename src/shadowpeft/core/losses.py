"""Losses for both paths; main and auxiliary loss always share one normaliser."""

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE = -100


def next_token_labels(labels: Tensor) -> Tensor:
    """Labels [B, T] moved one to the left, so that position t carries the token after it; the last is ignored."""
    return F.pad(labels[..., 1:], (0, 1), value=IGNORE)


def causal_lm_loss(logits: Tensor, labels: Tensor, num_items: Tensor | int | None = None) -> Tensor:
    """Cross-entropy of the next token (Eq. 8, either term).

    Args:
        logits: [B, T, V].
        labels: [B, T], unshifted, -100 where there is nothing to learn.
        num_items: labels of the whole optimizer step; the sum is divided by it, so that gradient
            accumulation does not change the weight of either loss. None: labels of this batch.

    Returns:
        A scalar in fp32 or wider. Zero (not NaN) where no position carries a label.
    """
    targets = next_token_labels(labels).to(logits.device).view(-1)
    logits = logits.view(-1, logits.shape[-1])
    logits = logits if logits.dtype == torch.float64 else logits.float()
    total = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
    return total / _count(targets, num_items)


def sequence_classification_loss(logits: Tensor, labels: Tensor, num_items: Tensor | int | None = None) -> Tensor:
    """Eq. 9, either term: [B, C] against labels [B] (classes), [B, C] (several classes) or [B] floats with C = 1."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    labels = labels.to(logits.device)
    if logits.shape[-1] == 1:
        total = F.mse_loss(logits.squeeze(-1), labels.to(logits.dtype).view(-1), reduction="sum")
        return total / _rows(labels, num_items)
    if labels.is_floating_point():
        total = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none").mean(-1).sum()
        return total / _rows(labels, num_items)
    total = F.cross_entropy(logits, labels.view(-1), ignore_index=IGNORE, reduction="sum")
    return total / _count(labels.view(-1), num_items)


def combine(main: Tensor, auxiliary: Tensor, weight: float) -> Tensor:
    """Eq. 8 and 9: ``main + lambda * auxiliary``."""
    return main + weight * auxiliary.to(main.device)


def pool_last_token(hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
    """[B, T, d] -> [B, d]: the state of the last token that is not padding, whichever side is padded."""
    if attention_mask is None:
        return hidden[:, -1]
    positions = torch.arange(attention_mask.shape[-1], device=hidden.device)
    last = (attention_mask.to(hidden.device).ne(0) * positions).argmax(-1)
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), last]


def _count(targets: Tensor, num_items: Tensor | int | None) -> Tensor | int:
    if num_items is None:
        return (targets != IGNORE).sum().clamp(min=1)
    return num_items.to(targets.device) if isinstance(num_items, Tensor) else num_items


def _rows(labels: Tensor, num_items: Tensor | int | None) -> Tensor | int:
    return labels.shape[0] if num_items is None else num_items
