"""Models and rigged drafts for the tests of speculative decoding."""

import torch
from torch import Tensor

from models import randomise, tiny_base, tiny_config
from shadowpeft import ShadowModelForCausalLM, get_shadow_model


def adapted(model_type: str = "llama", *, config: dict | None = None, **overrides: object) -> ShadowModelForCausalLM:
    """An attached tiny model in float64 whose shadow acts on the base."""
    model = get_shadow_model(tiny_base(model_type, **overrides), tiny_config(**(config or {})))
    randomise(model.network())
    return model


def oracle(sequences: Tensor, *, wrong_every: int | None = None):
    """A draft processor that makes the shadow draft ``sequences`` [B, T], with a wrong token now and then.

    Args:
        wrong_every: one in so many places is wrong, at other places in each row; None: none; 1: all.
    """

    def draft(prefix: Tensor, logits: Tensor) -> Tensor:
        place = prefix.shape[1]
        wanted = sequences[:, min(place, sequences.shape[1] - 1)].clone()
        if wrong_every is not None:
            rows = torch.arange(len(wanted))
            wanted += ((place + 2 * rows) % wrong_every == 0).long()
        return torch.full_like(logits, -50.0).scatter_(1, (wanted % logits.shape[1])[:, None], 50.0)

    return draft
