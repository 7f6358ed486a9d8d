"""Positions and padding of the tokens behind the cache."""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import StaticLayer

from shadowpeft.generate.draft import Places


class Timeline:
    """Where the next tokens of a call go.

    Args:
        position_ids: [B or 1, 1], the pending token's.
        attention_mask: [B, cached], or [B, length of the cache] where that is fixed, or None without padding.
    """

    def __init__(self, position_ids: Tensor, attention_mask: Tensor | None, *, is_fixed: bool) -> None:
        self._position_ids = position_ids
        self._mask = attention_mask
        self._is_fixed = is_fixed

    @classmethod
    def at_prompt(cls, input_ids: Tensor, cache: Cache, model_kwargs: dict[str, Any]) -> "tuple[Timeline, Tensor]":
        """(the timeline at the last token of a prompt [B, T] none of which is cached, positions of the others)."""
        mask, positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
        if positions is None:
            ones = torch.ones_like(input_ids[:1]) if mask is None else mask.long()
            positions = (ones.cumsum(-1) - 1).clamp(min=0)
        fixed = is_fixed(cache)
        if mask is not None:
            mask = _lengthen(mask, cache.get_max_length() - mask.shape[1]) if fixed else mask[:, :-1]
        return cls(positions[:, -1:], mask, is_fixed=fixed), positions[:, :-1]

    @classmethod
    def behind_prefill(cls, cache: Cache, model_kwargs: dict[str, Any]) -> "Timeline":
        num_cached = int(cache.get_seq_length())
        mask, positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
        if positions is None:
            first: Any = cache.layers[0]
            positions = torch.full((1, 1), num_cached - 1, device=first.keys.device)
        fixed = is_fixed(cache)
        if mask is not None:
            mask = mask[:, :num_cached]
            mask = _lengthen(mask, cache.get_max_length() - num_cached) if fixed else mask
        return cls(positions[:, -1:] + 1, mask, is_fixed=fixed)

    def places(self, num_tokens: int, *, before: Tensor | None = None) -> Places:
        """Places of the pending token and those behind it, and in front of them those at positions ``before`` [B or 1, n]."""
        positions = self._position_ids + torch.arange(num_tokens, device=self._position_ids.device)
        if before is not None:
            positions = torch.cat([before, positions], 1)
        mask = self._mask if self._is_fixed else _lengthen(self._mask, num_tokens)
        return Places(position_ids=positions, attention_mask=mask, is_fixed=self._is_fixed)

    def advance(self, num_tokens: int) -> None:
        """Moves past ``num_tokens`` tokens that the cache holds now."""
        self._position_ids = self._position_ids + num_tokens
        if not self._is_fixed:
            self._mask = _lengthen(self._mask, num_tokens)


def is_fixed(cache: Cache) -> bool:
    """Whether the cache has its whole length from the start."""
    return any(isinstance(layer, StaticLayer) for layer in cache.layers)


def _lengthen(mask: Tensor | None, num_tokens: int) -> Tensor | None:
    return None if mask is None else torch.cat([mask, mask.new_ones((mask.shape[0], num_tokens))], 1)
