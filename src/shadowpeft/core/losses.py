"""Losses for both paths; main and auxiliary loss always share one normaliser."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shadowpeft.core.head_loss import IGNORE, HeadLosses, LossSpec, head_losses
from shadowpeft.core.lean import PLAIN
from shadowpeft.errors import ConfigError


def next_token_labels(labels: Tensor, shift_labels: Tensor | None = None) -> Tensor:
    """Labels [B, T] moved one to the left, so that position t carries the token after it; the last is ignored.

    Args:
        shift_labels: [B, T], where the caller has moved them: with a row cut over several processes (context parallelism), the
            token after the last one here is on another.
    """
    if shift_labels is not None:
        return shift_labels
    return F.pad(labels[..., 1:], (0, 1), value=IGNORE)


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor,
    num_items: Tensor | int | None = None,
    *,
    label_smoothing: float = 0.0,
    shift_labels: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of the next token (Eq. 8, either term).

    Args:
        logits: [B, T, V].
        labels: [B, T], unshifted, -100 where there is nothing to learn.
        num_items: labels of the whole optimizer step; the sum is divided by it, so that gradient
            accumulation does not change the weight of either loss. None: labels of this batch.
        label_smoothing: share of the target that is spread evenly over the vocabulary.
        shift_labels: as in :func:`next_token_labels`.

    Returns:
        A scalar in fp32 or wider. Zero (not NaN) where no position carries a label.
    """
    targets = next_token_labels(labels, shift_labels).to(logits.device).reshape(-1)
    logits = logits.view(-1, logits.shape[-1])
    logits = logits if logits.dtype == torch.float64 else logits.float()
    total = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum", label_smoothing=label_smoothing)
    return total / label_count(targets, num_items)


def distillation_loss(
    teacher: Tensor,
    student: Tensor,
    labels: Tensor,
    num_items: Tensor | int | None = None,
    *,
    temperature: float = 1.0,
    shift_labels: Tensor | None = None,
) -> Tensor:
    """``T^2 KL(teacher || student)`` of the next-token distributions, softened by ``temperature``.

    Taken where there is a label, and divided as :func:`causal_lm_loss` divides. The teacher gets no gradient.

    Args:
        teacher, student: logits [B, T, V]. The others as there.
    """
    targets = next_token_labels(labels, shift_labels).to(student.device).reshape(-1)
    wide = torch.float64 if student.dtype == torch.float64 else torch.float32
    target = torch.log_softmax(teacher.detach().to(wide) / temperature, -1)
    guess = torch.log_softmax(student.to(wide) / temperature, -1)
    divergence = (target.exp() * (target - guess)).sum(-1).view(-1)
    return (divergence * (targets != IGNORE)).sum() * temperature**2 / label_count(targets, num_items)


def shared_head_losses(
    spec: LossSpec,
    head: nn.Module,
    hidden: Tensor,
    initial: Tensor,
    labels: Tensor,
    num_items: Tensor | int | None = None,
    *,
    shift_labels: Tensor | None = None,
) -> HeadLosses:
    """Main, shadow and distillation loss behind one head, with no logits kept where the head is a plain linear map.

    Args:
        head: of base and shadow, frozen or trained.
        hidden, initial: the attached model's last hidden states and s(0), [B, T, d].
        labels, num_items, shift_labels: as in :func:`causal_lm_loss`.
    """
    needs_shadow = spec.shadow_weight > 0 or spec.distillation_weight > 0
    if not is_plain_linear(head):
        state = initial if needs_shadow else None
        return _losses_through(spec, head, hidden, state, labels, num_items, shift_labels)
    hidden = hidden.to(head.weight.device)  # type: ignore[arg-type]
    targets = next_token_labels(labels, shift_labels).to(hidden.device).reshape(-1)
    width = hidden.shape[-1]
    return head_losses(
        spec,
        hidden=hidden.reshape(-1, width),
        shadow=initial.to(hidden.device).reshape(-1, width) if needs_shadow else None,
        targets=targets,
        weight=head.weight,  # type: ignore[arg-type]
        bias=head.bias,  # type: ignore[arg-type]
        count=label_count(targets, num_items),
    )


def is_plain_linear(head: nn.Module) -> bool:
    """Whether ``head`` is ``x W + b`` and nothing else: no quantised, adapted, sharded or hooked layer."""
    if type(head) is not nn.Linear or head._forward_hooks or head._forward_pre_hooks:
        return False
    return type(head.weight) in PLAIN and head.weight.device.type != "meta"


def _losses_through(
    spec: LossSpec,
    head: nn.Module,
    hidden: Tensor,
    initial: Tensor | None,
    labels: Tensor,
    num_items: Tensor | int | None,
    shift_labels: Tensor | None,
) -> HeadLosses:
    """The same losses through whatever ``head`` is, with logits kept for backward."""
    entropy = partial(causal_lm_loss, label_smoothing=spec.label_smoothing, shift_labels=shift_labels)
    logits = spec.finish(head(hidden))
    total = main = entropy(logits, labels, num_items)
    shadow = distillation = None
    if initial is not None:
        guess = spec.finish(head(initial))
        shadow = entropy(guess, labels, num_items)
        total = combine(main, shadow, spec.shadow_weight)
        if spec.distillation_weight > 0:
            distillation = distillation_loss(
                logits, guess, labels, num_items, temperature=spec.temperature, shift_labels=shift_labels
            )
            total = combine(total, distillation, spec.distillation_weight)
    return HeadLosses(total, main.detach(), without_gradient(shadow), without_gradient(distillation))


def without_gradient(loss: Tensor | None) -> Tensor | None:
    return None if loss is None else loss.detach()


def sequence_classification_loss(
    logits: Tensor,
    labels: Tensor,
    num_items: Tensor | int | None = None,
    *,
    problem_type: str | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Eq. 9, either term.

    Args:
        logits: [B, C].
        labels: [B] classes, -100 where there is nothing to learn; [B, C] floats (several classes, or values to regress
            on); or [B] floats with C = 1.
        num_items: labels of the whole optimizer step, every number of [B, C] one; the sum is divided by it. None: of this
            batch.
        problem_type: as in a transformers config; None: regression with C = 1, else by whether labels are floats.
        label_smoothing: share of the target that is spread evenly over the classes, of which a row has one.

    Raises:
        ValueError: float labels of another shape than the logits.
        ConfigError: label smoothing where a row has not one class.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    labels = labels.to(logits.device)
    kind = problem_type or problem_type_of(logits.shape[-1], labels)
    if kind == "single_label_classification":
        total = F.cross_entropy(
            logits, labels.view(-1), ignore_index=IGNORE, reduction="sum", label_smoothing=label_smoothing
        )
        return total / label_count(labels.view(-1), num_items)
    if label_smoothing:
        raise ConfigError(f"label_smoothing={label_smoothing} is for one class a row, and this is {kind}; leave it 0")
    targets = (labels.view(-1, 1) if logits.shape[-1] == 1 else labels).to(logits.dtype)
    if targets.shape != logits.shape:
        raise ValueError(f"labels of shape {tuple(labels.shape)} do not fit logits {tuple(logits.shape)}: give one per logit")
    loss = F.mse_loss if kind == "regression" else F.binary_cross_entropy_with_logits
    each = loss(logits, targets, reduction="none")
    return each.mean() if num_items is None else each.sum() / num_items


def problem_type_of(num_labels: int, labels: Tensor) -> str:
    """What transformers takes a problem for whose config does not say it."""
    if num_labels == 1:
        return "regression"
    return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"


def combine(main: Tensor, auxiliary: Tensor, weight: float) -> Tensor:
    """Eq. 8 and 9: ``main + lambda * auxiliary``."""
    return main + weight * auxiliary.to(main.device)


def pool_last_token(hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
    """[B, T, d] -> [B, d]: the state of the last token that is not padding, whichever side is padded."""
    if attention_mask is None:
        return hidden[:, -1]
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), _last_position(attention_mask.to(hidden.device))]


def _last_position(attention_mask: Tensor) -> Tensor:
    positions = torch.arange(attention_mask.shape[-1], device=attention_mask.device)
    return (attention_mask.ne(0) * positions).argmax(-1)


def last_token(tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
    """[B, T], bool: the position of every row that :func:`pool_last_token` reads, for ids [B, T] or embeddings [B, T, d]."""
    chosen = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    if attention_mask is None:
        chosen[:, -1] = True
        return chosen
    return chosen.scatter_(1, _last_position(attention_mask.to(tokens.device)).unsqueeze(1), True)


def label_count(targets: Tensor, num_items: Tensor | int | None) -> Tensor | int:
    """What a sum over ``targets`` is divided by: ``num_items``, else the targets that are not ignored; at least 1."""
    if num_items is None:
        num_items = (targets != IGNORE).sum()
    return num_items.to(targets.device).clamp(min=1) if isinstance(num_items, Tensor) else max(num_items, 1)

