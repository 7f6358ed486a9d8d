"""The two halves of an attached pass, run apart: the shadow over single tokens, the base over several at once."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache

from shadowpeft.core import ShadowNetwork, ShadowRun
from shadowpeft.errors import ConfigError
from shadowpeft.model.architectures import architecture_of, blocks_of, decoder_of, head_of
from shadowpeft.model.attach import RUN_KEYWORD
from shadowpeft.model.cache import CACHE
from shadowpeft.model.tasks import ShadowModelForCausalLM


@dataclass(frozen=True, kw_only=True)
class Passes:
    """Shadow pass, draft head and verification pass over one cache.

    Attributes:
        cache: holds the base's layers, then the shadow's; both passes write to their own.
        options: further keywords of the call, handed to both passes.
        draft_ids: [V'], the token ids that may be drafted, ascending, where the tokens are; None for all.
        draft_weight: [V', d], the head's rows of these tokens, where the head is.
    """

    model: ShadowModelForCausalLM
    network: ShadowNetwork
    cache: Cache
    options: dict[str, Any] = field(default_factory=dict)
    draft_ids: Tensor | None = None
    draft_weight: Tensor | None = None
    draft_bias: Tensor | None = None

    def draft_step(
        self, tokens: Tensor, position_ids: Tensor, attention_mask: Tensor | None, *, with_head: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The shadow over ``tokens`` [B, T] behind what it has seen: s(0) [B, T, d], and if asked for, its last logits.

        Logits are [B, 1, V], or [B, 1, V'] where the draft's vocabulary is cut, on the device of ``tokens``.
        """
        inputs = {"position_ids": position_ids, "attention_mask": attention_mask, "use_cache": True, **self.options}
        states = self.model._initial_state(self.network, tokens, None, self.cache, inputs)
        return states, (self._draft_logits(states[:, -1:]).to(tokens.device) if with_head else None)

    def _draft_logits(self, states: Tensor) -> Tensor:
        if self.draft_weight is None:
            return self.model.lm_logits(states)
        logits = F.linear(states.to(self.draft_weight.device), self.draft_weight, self.draft_bias)
        return architecture_of(self.model.config).finish_logits(self.model.config, logits)

    def verify(
        self, tokens: Tensor, states: Tensor, position_ids: Tensor, attention_mask: Tensor | None, *, num_logits: int
    ) -> Tensor:
        """Logits [B, num_logits, V] of the attached model at the last of ``tokens`` [B, T].

        It is given their s(0) [B, T, d]: the shadow does not run. The logits go to the device of ``tokens``, where they become
        tokens: with a ``device_map`` the head may lie elsewhere.
        """
        decoder, run = decoder_of(self.model.base), ShadowRun(self.network, states)
        output = decoder(
            input_ids=tokens,
            position_ids=position_ids,
            attention_mask=attention_mask,
            use_cache=True,
            **{CACHE: self.cache, RUN_KEYWORD: run},
            **self.options,
        )
        run.check(len(blocks_of(decoder)))
        return self.model.lm_logits(output.last_hidden_state[:, -num_logits:]).to(tokens.device)


def make_passes(
    model: ShadowModelForCausalLM,
    network: ShadowNetwork,
    cache: Cache,
    *,
    options: dict[str, Any],
    draft_vocabulary: Sequence[int] | None,
    device: torch.device,
) -> Passes:
    """Passes of one call. Rows of the head are copied for this call only, so they are always those of the head.

    Args:
        device: where the tokens of the call are.

    Raises:
        ConfigError: the shadow reads another vocabulary than the head writes, or ``draft_vocabulary`` leaves it.
    """
    head = head_of(model)
    num_tokens = head.weight.shape[0]
    if not network.config.shares_embeddings:
        num_known = network.backbone.get_input_embeddings().num_embeddings
        if num_known != num_tokens:
            raise ConfigError(
                f"the shadow knows {num_known} tokens and the base's head {num_tokens}; to draft, both need the same "
                "vocabulary: generate without speculative="
            )
    if draft_vocabulary is None:
        return Passes(model=model, network=network, cache=cache, options=options)
    ids = torch.tensor(sorted({int(token) for token in draft_vocabulary}), device=head.weight.device)
    if ids[0] < 0 or ids[-1] >= num_tokens:
        raise ConfigError(
            f"draft_vocabulary has token ids from {int(ids[0])} to {int(ids[-1])}; the base's are 0 to {num_tokens - 1}"
        )
    return Passes(
        model=model,
        network=network,
        cache=cache,
        options=options,
        draft_ids=ids.to(device),
        draft_weight=head.weight[ids],
        draft_bias=None if head.bias is None else head.bias[ids],
    )


def draft_cost(passes: Passes) -> float:
    """Weights read by one draft over those read by one attached step: the ratio of times where reading decides."""
    model, network = passes.model, passes.network
    head = head_of(model).weight
    shadow = _num_bytes(network.backbone)
    if network.projection is not None:
        shadow += network.projection.weight.nbytes
    if not network.config.shares_embeddings:
        shadow -= _num_bytes(network.backbone.get_input_embeddings())
    draft_head = head.nbytes if passes.draft_weight is None else passes.draft_weight.nbytes
    steps = sum(_num_bytes(part) for part in network.step_parts)
    return (shadow + draft_head) / (_num_bytes(blocks_of(decoder_of(model.base))) + steps + shadow + head.nbytes)


def _num_bytes(module: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())
