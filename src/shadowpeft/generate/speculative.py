"""Lossless speculative decoding with the shadow as draft of the model it is attached to.

A round: the shadow drafts k tokens behind the pending one; the base looks at all k + 1 places in one pass that *reuses*
the s(0) made while drafting; drafts are accepted by Algorithm 1 of Leviathan et al. 2023; the joint cache gives up the
rest. In the first round the whole prompt is pending: the shadow reads it and drafts, and the base sees it together with
the drafts, so that no pass of the base is spent on the prompt alone.

Several rows accept different numbers, but their cache is one rectangle. All rows advance by the smallest number, and
what a row accepted beyond it is kept as settled: it takes the place of drafts in the next round and is not tested
again. So columns of the cache stay those of the sequences, for windows and static layers too, and no keys are moved;
the price is that both networks look at surplus tokens twice.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from shadowpeft.core import ShadowNetwork
from shadowpeft.generate.acceptance import accept_greedy, accept_sampled
from shadowpeft.generate.compiled import CompiledPasses
from shadowpeft.generate.config import SpeculativeConfig
from shadowpeft.generate.draft import Known, draft
from shadowpeft.generate.length import DraftLength
from shadowpeft.generate.passes import Passes, draft_cost, make_passes
from shadowpeft.generate.rollback import recording, roll_back
from shadowpeft.generate.scoring import Ends, Scoring
from shadowpeft.generate.statistics import SpeculativeOutput, SpeculativeStatistics, report
from shadowpeft.generate.timeline import Timeline
from shadowpeft.generate.written import Written
from shadowpeft.model.architectures import head_of
from shadowpeft.model.cache import CACHE
from shadowpeft.model.tasks import ShadowModelForCausalLM

# Keywords of a call that both passes set themselves.
_OWN = ("attention_mask", "position_ids", CACHE, "use_cache", "logits_to_keep", "inputs_embeds", "adapter")


def decode(
    model: ShadowModelForCausalLM,
    network: ShadowNetwork,
    input_ids: Tensor,
    *,
    speculative: SpeculativeConfig,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: BaseStreamer | None,
    model_kwargs: dict[str, Any],
) -> SpeculativeOutput | Tensor:
    """Rounds until every row is finished; arguments as ``generate`` hands them to a decoding method."""
    cache: Cache = model_kwargs[CACHE]
    written = Written(input_ids, stopping_criteria, generation_config, streamer)
    options = {name: value for name, value in model_kwargs.items() if name not in _OWN and not name.startswith("output_")}
    passes = make_passes(
        model, network, cache, options=options, draft_vocabulary=speculative.draft_vocabulary, device=input_ids.device
    )
    scoring = Scoring(
        do_sample=bool(generation_config.do_sample),
        processors=logits_processor,
        draft_processor=speculative.draft_processor,
        num_tokens=head_of(model).weight.shape[0],
        draft_ids=passes.draft_ids,
        ends=Ends.where_asked(generation_config, logits_processor),
    )
    if _is_prompt_alone(input_ids, cache, generation_config, model_kwargs):
        timeline, before = Timeline.at_prompt(input_ids, cache, model_kwargs)
    else:
        generating: Any = model
        logits = generating._prefill(input_ids, generation_config, model_kwargs).logits[:, -1:].to(input_ids.device)
        # The first token is plain; only its prefix is the prompt itself.
        process: Any = logits_processor
        scores = process(input_ids, logits[:, -1].to(torch.float32, copy=True))
        written.append(scoring.choose(scores)[:, None], scores[:, None], logits)
        timeline, before = Timeline.behind_prefill(cache, model_kwargs), None
    compiled = None
    if speculative.compile_options is not None:
        width = None if speculative.adaptive else speculative.num_draft_tokens + 1
        compiled = CompiledPasses(eager=passes, options=speculative.compile_options, width=width)
    with recording(cache):
        statistics = _rounds(
            compiled or passes,
            scoring,
            written,
            timeline,
            speculative,
            before=before,
            length=DraftLength(speculative.num_draft_tokens, adaptive=speculative.adaptive, draft_cost=draft_cost(passes)),
            max_length=generation_config.max_length,
        )
    report(statistics)
    return written.output(cache, statistics)


def _is_prompt_alone(
    input_ids: Tensor, cache: Cache, config: GenerationConfig, model_kwargs: dict[str, Any]
) -> bool:
    """Whether token ids alone are still to be read, in one go; what is special about a prompt is left to ``generate``.

    So are a single token, whose pass could not be told from a draft's where these are compiled, and a masked last token.
    """
    mask = model_kwargs.get("attention_mask")
    is_plain = model_kwargs.get("inputs_embeds") is None and config.prefill_chunk_size is None and input_ids.shape[1] > 1
    return is_plain and int(cache.get_seq_length()) == 0 and (mask is None or bool(mask[:, -1].all()))


def _rounds(
    passes: Passes | CompiledPasses,
    scoring: Scoring,
    written: Written,
    timeline: Timeline,
    speculative: SpeculativeConfig,
    *,
    before: Tensor | None,
    length: DraftLength,
    max_length: int,
) -> SpeculativeStatistics:
    """Rounds until every row is finished; ``before``: positions of pending tokens in front of the last one, if any."""
    # A row may have finished with its first token.
    known = written.remaining(Known.nothing_behind(written.sequences), 0, max_drafts=speculative.num_draft_tokens)
    totals = dict.fromkeys(("num_rounds", "num_drafted", "num_tested", "num_accepted", "num_generated", "num_row_rounds"), 0)
    drafting, started = 0.0, time.perf_counter()
    while not written.is_finished:
        sequences, at_start = written.sequences, time.perf_counter()
        # A round adds one token more than it drafts; what would lie past the end is not drafted.
        num_drafts = max(min(length.next(), max_length - sequences.shape[1] - 1), 0)
        num_pending = 1 if before is None else before.shape[1] + 1
        proposal = draft(
            passes,
            scoring,
            sequences,
            timeline.places(num_drafts + 1, before=before),
            num_pending=num_pending,
            num_drafts=num_drafts,
            confidence_threshold=speculative.confidence_threshold,
            known=known,
            at_work=written.at_work,
        )
        drafting += time.perf_counter() - at_start
        window = proposal.window
        width = window.shape[1]
        places = timeline.places(width, before=before).at(0, num_pending - 1 + width)
        tokens = torch.cat([proposal.lead, window], 1)
        logits = passes.verify(tokens, proposal.states, *places, num_logits=width)
        scores = scoring.target(logits, sequences, window, is_over=proposal.is_over)
        forced = None if known is None else known.forced(width - 1)
        if scoring.do_sample:
            q = scores.new_zeros((window.shape[0], 0, scores.shape[-1])) if proposal.q is None else proposal.q
            num_accepted, behind = accept_sampled(window[:, 1:], q, scores.softmax(-1), forced)
        else:
            num_accepted, behind = accept_greedy(window[:, 1:], scores.argmax(-1), forced)
        settled = _settle(window, num_accepted, behind, known)
        counts = _count(num_accepted, settled, known, written, width - 1)
        num_written = written.append(settled.tokens[:, : counts.advance], scores, logits)
        roll_back(passes.cache, width - num_written)
        timeline.advance(num_written)
        before = None
        known = written.remaining(settled, num_written, max_drafts=speculative.num_draft_tokens)
        length.observe(counts.num_accepted, counts.num_tested)
        totals["num_rounds"] += 1
        totals["num_drafted"] += counts.num_drafted
        totals["num_tested"] += counts.num_tested
        totals["num_accepted"] += counts.num_accepted
        totals["num_generated"] += num_written * counts.num_rows
        totals["num_row_rounds"] += counts.num_rows
    return SpeculativeStatistics(**totals, seconds=time.perf_counter() - started, seconds_drafting=drafting)


def _settle(window: Tensor, num_accepted: Tensor, behind: Tensor, known: Known | None) -> Known:
    """All that is settled behind the pending token: what was known, accepted drafts, the base's own token."""
    tokens = torch.cat([window[:, 1:], behind[:, None]], 1).scatter_(1, num_accepted[:, None], behind[:, None])
    count = num_accepted + 1
    if known is None:
        return Known(tokens=tokens, count=count)
    extra = known.tokens.shape[1] - tokens.shape[1]
    if extra > 0:
        tokens = torch.nn.functional.pad(tokens, (0, extra))
    # A row may know more than this round looked at; its tokens were drawn once and stay.
    width = known.tokens.shape[1]
    tokens[:, :width] = torch.where(known.forced(width), known.tokens, tokens[:, :width])
    return Known(tokens=tokens, count=torch.maximum(count, known.count))


@dataclass(frozen=True, kw_only=True)
class _Counts:
    """One round in numbers: tokens to write, rows at work, their drafts, those tested and accepted."""

    advance: int
    num_rows: int
    num_drafted: int
    num_tested: int
    num_accepted: int


def _count(num_accepted: Tensor, settled: Known, known: Known | None, written: Written, num_drafts: int) -> _Counts:
    before = torch.zeros_like(num_accepted) if known is None else known.count
    table = torch.stack([settled.count, num_accepted, before, written.at_work.long()]).tolist()
    rows = [row for row in zip(*table, strict=True) if row[3]]
    # A test ends at the first draft that falls.
    tested = [min(accepted + 1, num_drafts) - min(lead, num_drafts) for _, accepted, lead, _ in rows]
    return _Counts(
        # Rows may have settled more than this round looked at, but the caches hold no more.
        advance=min(num_drafts + 1, *(count for count, *_ in rows)),
        num_rows=len(rows),
        num_drafted=sum(max(num_drafts - lead, 0) for _, _, lead, _ in rows),
        num_tested=sum(max(number, 0) for number in tested),
        num_accepted=sum(max(accepted - lead, 0) for _, accepted, lead, _ in rows),
    )
