"""Passes through torch.compile: whole graphs of static shape, so that a GPU can replay them as CUDA graphs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from shadowpeft.generate.passes import Passes


@dataclass(frozen=True, kw_only=True)
class CompiledPasses:
    """As :class:`Passes`, compiled; graphs are kept by torch for later calls with like shapes.

    Shapes stay the same from round to round only with a static cache and a constant number of drafts; with others this
    compiles again and again.

    Attributes:
        options: keywords of ``torch.compile``, for instance ``{"mode": "reduce-overhead"}`` for CUDA graphs.
        width: tokens of the verification that is compiled, None for any number. Others (the last rounds, in front of
            the longest allowed length), and passes over a prompt, are not worth a graph each and run as they are.
    """

    eager: Passes
    options: Mapping[str, Any]
    width: int | None = None

    @property
    def cache(self) -> Cache:
        return self.eager.cache

    def draft_step(
        self, tokens: Tensor, position_ids: Tensor, attention_mask: Tensor | None, *, with_head: bool
    ) -> tuple[Tensor, Tensor | None]:
        if tokens.shape[1] > 1:
            return self.eager.draft_step(tokens, position_ids, attention_mask, with_head=with_head)
        # A replayed graph writes its results to the same memory again, and the states of a round are needed together.
        _mark_step(tokens)
        tokens, position_ids = _packed(tokens), _packed(position_ids)
        state, logits = self._compiled(_draft_step)(self.eager, tokens, position_ids, attention_mask, with_head)
        return state.clone(), (None if logits is None else logits.clone())

    def verify(
        self, tokens: Tensor, states: Tensor, position_ids: Tensor, attention_mask: Tensor | None, *, num_logits: int
    ) -> Tensor:
        if tokens.shape[1] > num_logits or self.width not in (None, num_logits):
            return self.eager.verify(tokens, states, position_ids, attention_mask, num_logits=num_logits)
        _mark_step(tokens)
        tokens, position_ids = _packed(tokens), _packed(position_ids)
        return self._compiled(_verify)(self.eager, tokens, states, position_ids, attention_mask).clone()

    def _compiled(self, function: Any) -> Any:
        return torch.compile(function, fullgraph=True, dynamic=False, **self.options)


def _packed(values: Tensor) -> Tensor:
    """A copy with the strides of a fresh tensor: graphs are specialised on strides, slices would have many."""
    return values.clone(memory_format=torch.contiguous_format)


def _mark_step(tokens: Tensor) -> None:
    if tokens.is_cuda:
        torch.compiler.cudagraph_mark_step_begin()


def _draft_step(
    passes: Passes, tokens: Tensor, position_ids: Tensor, attention_mask: Tensor | None, with_head: bool
) -> tuple[Tensor, Tensor | None]:
    return passes.draft_step(tokens, position_ids, attention_mask, with_head=with_head)


def _verify(
    passes: Passes, tokens: Tensor, states: Tensor, position_ids: Tensor, attention_mask: Tensor | None
) -> Tensor:
    return passes.verify(tokens, states, position_ids, attention_mask, num_logits=tokens.shape[1])
