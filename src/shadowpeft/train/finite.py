"""Stops a run at the first loss or gradient that is no number, before it reaches the weights."""

from typing import Any

import torch
from torch import Tensor, nn

from shadowpeft.errors import ShadowPeftError
from shadowpeft.model.sharded import whole

MOST_NAMES = 3
MOST_IDS = 16
WAY_OUT = (
    "nothing was updated and the last checkpoint is kept. Look at that batch, lower learning_rate or clip, or use "
    "float32 or bfloat16 for the base, then go on with --resume"
)


class NotFiniteError(ShadowPeftError, ArithmeticError):
    """A loss or a gradient was NaN or infinite; the weights are still those of the step before."""


def check_loss(loss: Tensor, inputs: dict[str, Any], *, step: int, batch: int) -> None:
    """Raises NotFiniteError, naming step and batch, for a loss that is not finite.

    Args:
        inputs: the batch, of which the error shows the first token ids.
        step: optimizer step, from 1. ``batch``: forward pass within it, from 1.
    """
    if not torch.isfinite(loss).all():
        raise NotFiniteError(f"the loss is {loss.item()} in step {step}, batch {batch} ({describe(inputs)}); {WAY_OUT}")


def check_gradients(model: nn.Module, *, step: int, batches: int) -> None:
    """Raises NotFiniteError, naming step and weights, if any gradient is not finite. To be called before clipping."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norm = whole(nn.utils.get_total_norm(gradients.values()))
    if torch.isfinite(norm):
        return
    broken = [name for name, gradient in gradients.items() if not whole(torch.isfinite(gradient).all())]
    first = f", first {', '.join(broken[:MOST_NAMES])}" if broken else ""
    raise NotFiniteError(
        f"the gradient norm is {norm.item()} in step {step} (batches 1 to {batches}): {len(broken)} of {len(gradients)} "
        f"weights have a gradient that is not finite{first}; {WAY_OUT}"
    )


def describe(inputs: dict[str, Any]) -> str:
    """Shape and first token ids of a batch."""
    ids = inputs.get("input_ids")
    if ids is None:
        return "without input_ids"
    return f"input_ids {list(ids.shape)} from {ids[0, :MOST_IDS].tolist()}"
