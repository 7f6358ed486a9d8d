"""The shadow's turn: tokens ahead of the base, and their s(0), which the base will need."""

from dataclasses import dataclass

import torch
from torch import Tensor

from shadowpeft.generate.compiled import CompiledPasses
from shadowpeft.generate.passes import Passes
from shadowpeft.generate.scoring import Scoring


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where the next tokens go.

    Attributes:
        position_ids: [B or 1, T] of the pending token and those behind it.
        attention_mask: [B, cached + T], or None without padding.
        is_fixed: the mask spans a whole static cache instead, ones behind the tokens, which causality hides.
    """

    position_ids: Tensor
    attention_mask: Tensor | None
    is_fixed: bool = False

    def at(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Positions of the tokens ``start`` to ``stop`` and the mask up to the last of them."""
        positions = self.position_ids[:, start:stop]
        if self.attention_mask is None or self.is_fixed:
            return positions, self.attention_mask
        num_seen = self.attention_mask.shape[1] - self.position_ids.shape[1] + stop
        return positions, self.attention_mask[:, :num_seen]


@dataclass(frozen=True, kw_only=True)
class Known:
    """Tokens that are settled but not yet in the cache, as other rows are not that far.

    Attributes:
        tokens: [B, W], those behind the pending token.
        count: [B], how many of them are settled.
    """

    tokens: Tensor
    count: Tensor

    @classmethod
    def nothing_behind(cls, sequences: Tensor) -> "Known":
        return cls(tokens=sequences[:, :0], count=sequences.new_zeros(sequences.shape[0]))

    def instead_of(self, drafted: Tensor, place: int) -> Tensor:
        """[B] -> [B]: the settled token at ``place`` (0: behind the pending one), where there is one."""
        if place >= self.tokens.shape[1]:
            return drafted
        return torch.where(place < self.count, self.tokens[:, place], drafted)

    def forced(self, num_drafts: int) -> Tensor:
        """[B, k]: which of a round's drafts are settled."""
        return torch.arange(num_drafts, device=self.count.device) < self.count[:, None]


@dataclass(frozen=True, kw_only=True)
class Draft:
    """One round's proposal.

    Attributes:
        lead: [B, n - 1], the tokens in front of the window that are in no cache yet either: a prompt's, or none.
        window: [B, k + 1], the last token that is settled and k drafts.
        states: [B, n + k, d], s(0) of both.
        q: [B, k, V], what the drafts were drawn from; None if greedy.
        is_over: every row has ended with these drafts; only known where processors may not be asked behind the ends.
    """

    lead: Tensor
    window: Tensor
    states: Tensor
    q: Tensor | None
    is_over: bool = False


def draft(
    passes: Passes | CompiledPasses,
    scoring: Scoring,
    sequences: Tensor,
    places: Places,
    *,
    num_pending: int = 1,
    num_drafts: int,
    confidence_threshold: float = 0.0,
    known: Known | None = None,
    at_work: Tensor | None = None,
) -> Draft:
    """Drafts at most ``num_drafts`` tokens behind ``sequences`` [B, T], whose last ``num_pending`` are in no cache yet.

    The shadow runs once for every token, the last draft included; the last needs no head. Drafting ends in front of a token
    that a row cannot draft at all, as processors forbid its whole draft vocabulary: they are to see no prefix that cannot be.

    Args:
        at_work: [B], rows that have not ended; None: all.
    """
    pending = tokens = sequences[:, -num_pending:]
    drafts, states, drawn_from = [], [], []
    start, is_sure, is_over, is_read = 0, True, False, False
    has_ended = torch.zeros_like(sequences[:, 0], dtype=torch.bool) if at_work is None else ~at_work
    for place in range(num_drafts):
        if is_over or not is_sure:
            break
        stop = start + tokens.shape[1]
        state, logits = passes.draft_step(tokens, *places.at(start, stop), with_head=True)
        assert logits is not None
        states.append(state)
        prefix = torch.cat([sequences, *drafts], 1) if scoring.drafts_need_prefix else None
        found = scoring.draft(logits[:, -1], prefix, with_confidence=confidence_threshold > 0)
        is_read = found.is_possible is not None and _is_any_stuck(found.is_possible | has_ended, known, place)
        if is_read:
            break
        is_sure = found.confidence is None or _is_any_sure(found.confidence, confidence_threshold, known, place)
        token = found.tokens if known is None else known.instead_of(found.tokens, place)
        if scoring.ends is not None:
            token, has_ended = scoring.ends.pad_behind(has_ended, token)
            is_over = bool(has_ended.all())
        tokens, start = token[:, None], stop
        drafts.append(tokens)
        drawn_from.append(found.q)
    if not is_read:
        states.append(passes.draft_step(tokens, *places.at(start, start + tokens.shape[1]), with_head=False)[0])
    return Draft(
        lead=pending[:, :-1],
        window=torch.cat([pending[:, -1:], *drafts], 1),
        states=torch.cat(states, 1),
        q=torch.stack(drawn_from, 1) if drawn_from and drawn_from[0] is not None else None,
        is_over=is_over,
    )


def _is_any_stuck(is_possible: Tensor, known: Known | None, place: int) -> bool:
    """Whether a row that really drafts has nothing to draft."""
    drafts = torch.ones_like(is_possible) if known is None else place >= known.count
    return bool((drafts & ~is_possible).any())


def _is_any_sure(confidence: Tensor, threshold: float, known: Known | None, place: int) -> bool:
    """Whether a row that really drafts is confident, or none drafts here; while it is so, drafting goes on for all."""
    sure = confidence >= threshold
    if known is None:
        return bool(sure.any())
    drafts = place >= known.count
    return bool((sure & drafts).any() | ~drafts.any())
