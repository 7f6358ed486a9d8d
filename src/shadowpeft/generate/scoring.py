"""From logits to tokens: one set of processors for what the shadow drafts and what the base verifies."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PrefixConstrainedLogitsProcessor

from shadowpeft.generate.config import DraftProcessor


@dataclass(frozen=True, kw_only=True)
class Drafted:
    """One draft a row.

    Attributes:
        tokens: [B].
        q: [B, V], the distribution they were drawn from; None if greedy.
        confidence: [B], probability of each token; None where nobody asked.
        is_possible: [B], false where no token that may be drafted was allowed; None where that cannot be.
    """

    tokens: Tensor
    q: Tensor | None = None
    confidence: Tensor | None = None
    is_possible: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How this call turns logits into tokens.

    Processors see every place with its own prefix and run only if there are any; they must depend on nothing but
    what they are given, since they are called for drafts too.

    Attributes:
        do_sample: draw tokens instead of taking the most likely one.
        processors: those of ``generate`` (temperature, top-k, repetition penalty, ...).
        draft_processor: runs on the draft's logits before them.
        num_tokens: V, size of the vocabulary.
        draft_ids: [V'], the tokens that draft logits stand for; None: all.
        ends: which tokens end a row, where a processor may refuse to be asked behind them; None elsewhere.
    """

    do_sample: bool
    processors: LogitsProcessorList
    draft_processor: DraftProcessor | None
    num_tokens: int
    draft_ids: Tensor | None = None
    ends: "Ends | None" = None

    @property
    def drafts_need_prefix(self) -> bool:
        return bool(self.processors) or self.draft_processor is not None

    def draft(self, logits: Tensor, prefix: Tensor | None, *, with_confidence: bool) -> Drafted:
        """One draft a row.

        Args:
            logits: [B, V'] of the shadow.
            prefix: [B, T], the tokens before; None where :attr:`drafts_need_prefix` is false.
            with_confidence: compute it, else None.
        """
        if not (self.do_sample or self.drafts_need_prefix or with_confidence):
            best = comparable(logits).argmax(-1)
            return Drafted(tokens=best if self.draft_ids is None else self.draft_ids[best])
        scores = self._over_all_tokens(logits.float())
        if self.draft_processor is not None:
            assert prefix is not None  # as drafts_need_prefix asked
            scores = self.draft_processor(prefix, scores)
        if self.processors:
            scores = self.processors(prefix, scores)  # type: ignore[arg-type]  # any integer dtype will do
        is_possible = None
        if self.draft_ids is not None and self.drafts_need_prefix:
            # Processors may forbid every token that can be drafted; what such a row draws only has to be a number.
            is_possible = ~scores.isneginf().all(-1)
            scores = scores.masked_fill(~is_possible[:, None], 0.0)
        q = scores.softmax(-1) if self.do_sample or with_confidence else None
        token = torch.multinomial(q, 1).squeeze(1) if self.do_sample else scores.argmax(-1)  # type: ignore[arg-type]
        confidence = q.gather(1, token[:, None]).squeeze(1) if with_confidence and q is not None else None
        return Drafted(tokens=token, q=q if self.do_sample else None, confidence=confidence, is_possible=is_possible)

    def _over_all_tokens(self, logits: Tensor) -> Tensor:
        if self.draft_ids is None:
            return logits
        scores = logits.new_full((logits.shape[0], self.num_tokens), -torch.inf)
        return scores.index_copy_(1, self.draft_ids, logits)

    def target(self, logits: Tensor, sequences: Tensor, window: Tensor, *, is_over: bool = False) -> Tensor:
        """Scores [B, T, V] of the base at the T tokens of ``window``; the first of them ends ``sequences``.

        Args:
            is_over: no row goes on behind the window; processors are not asked for its last place.
        """
        if not self.processors:
            return logits.float() if self.do_sample else comparable(logits)
        logits = logits.to(torch.float32, copy=True)
        prefix = torch.cat([sequences, window[:, 1:]], 1)
        start = sequences.shape[1]
        process: Any = self.processors
        num_asked = window.shape[1] - is_over
        places = [process(prefix[:, : start + place], logits[:, place]) for place in range(num_asked)]
        return torch.stack([*places, *logits[:, num_asked:].unbind(1)], 1)

    def choose(self, scores: Tensor) -> Tensor:
        """[B, V] -> [B]: what plain decoding does with processed scores."""
        return torch.multinomial(scores.softmax(-1), 1).squeeze(1) if self.do_sample else scores.argmax(-1)


@dataclass(frozen=True, kw_only=True)
class Ends:
    """Tokens that end a row, and the padding behind them, as plain decoding writes it.

    Attributes:
        ids: [E], the end tokens.
        pad: [], the padding.
    """

    ids: Tensor
    pad: Tensor

    @classmethod
    def where_asked(cls, config: GenerationConfig, processors: LogitsProcessorList) -> "Ends | None":
        """The ends of a call, if one of its processors may take no prefix beyond them: a constraint, or a user's own.

        The others of transformers take any prefix, and to know whether all rows ended is to wait for the device.
        """
        ids, pad = config._eos_token_tensor, config._pad_token_tensor
        if ids is None or pad is None or all(_takes_any_prefix(processor) for processor in processors):
            return None
        return cls(ids=ids, pad=pad)

    def pad_behind(self, has_ended: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """``tokens`` [B], padding in rows that have ended [B], and which rows have ended with them."""
        tokens = torch.where(has_ended, self.pad, tokens)
        return tokens, has_ended | torch.isin(tokens, self.ids)


def _takes_any_prefix(processor: object) -> bool:
    is_constraint = isinstance(processor, PrefixConstrainedLogitsProcessor)
    return type(processor).__module__.startswith("transformers.") and not is_constraint


def comparable(logits: Tensor) -> Tensor:
    """Logits whose argmax is that of plain decoding, which rounds to fp32 first; narrower types lose nothing by it."""
    return logits.float() if logits.dtype == torch.float64 else logits
