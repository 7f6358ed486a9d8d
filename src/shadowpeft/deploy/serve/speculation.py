"""Rows whose shadow drafts and whose attached model verifies, a batch of them at a time.

A round: each shadow drafts behind its rows' pending tokens, one column at a time; the base looks at all columns in one
pass that reuses the s(0) made while drafting; every row keeps its own number of drafts (Algorithm 1 of Leviathan et al.
2023) and the base's token behind them. Then keys move to the right, so that every row ends in the last column again.

Such rows form a batch of their own: rows without drafts would pay for every column of the pass and fill only one.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from shadowpeft.deploy.serve import batch as batches
from shadowpeft.deploy.serve import joining
from shadowpeft.deploy.serve.batch import Batch
from shadowpeft.deploy.serve.errors import ApiError
from shadowpeft.deploy.serve.exported import Served
from shadowpeft.deploy.serve.mixed import States, base_hidden, draft_logits, head_logits, initial_states
from shadowpeft.deploy.serve.sampling import Sampling, distribution, draw, facts, uniform
from shadowpeft.deploy.serve.sequence import Sequence
from shadowpeft.generate.rollback import recording
from shadowpeft.model import ShadowModel


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """What the shadows drafted in one round.

    Attributes:
        window: [B, k + 1], the pending token and drafts; 0 behind a row's own drafts.
        mask: [B, W + k + 1], over all columns so far; 0 behind a row's own drafts.
        states: s(0) of the window.
        drafts: of each row.
        drawn_from: the distribution [V] of each draft, for rows that sample.
    """

    window: Tensor
    mask: Tensor
    states: States
    drafts: list[list[int]]
    drawn_from: list[list[Tensor]]


@torch.inference_mode()
def step(model: Served, batch: Batch, count: Callable[[int, int], None]) -> Batch:
    """One round: between 1 and ``num_drafts + 1`` tokens more for every row.

    Args:
        count: told how many tokens were drafted, and how many of them became part of an answer.
    """
    assert isinstance(model, ShadowModel)  # no other has a mode that drafts
    paths = [sequence.job.path for sequence in batch.sequences]
    with contextlib.ExitStack() as stack:
        for cache in batch.caches.values():
            stack.enter_context(recording(cache))
        proposal = _propose(model, batch)
        hidden = base_hidden(model, paths, proposal.states, proposal.window, proposal.mask, batch.caches)
        advances, tokens, going = _take(batch.sequences, proposal, head_logits(model, hidden), count)
        _close_ranks(batch, proposal, advances)
    batch.tokens = torch.tensor(tokens, device=proposal.window.device)
    return batches.keep(batch, going)


def _propose(model: ShadowModel, batch: Batch) -> Proposal:
    assert batch.mask is not None and batch.tokens is not None
    sequences, paths = batch.sequences, [sequence.job.path for sequence in batch.sequences]
    # A round adds one token more than it drafts; what would lie past an answer's end is not drafted.
    numbers = [min(s.job.num_drafts, s.job.max_tokens - s.num_tokens - 1) for s in sequences]
    width, num_cached = max(numbers) + 1, batch.mask.shape[1]
    is_used = torch.arange(width, device=batch.mask.device) <= torch.tensor(numbers, device=batch.mask.device)[:, None]
    mask = torch.cat([batch.mask, is_used.to(batch.mask.dtype)], 1)
    window, columns = [batch.tokens[:, None]], []
    drafts: list[list[int]] = [[] for _ in sequences]
    drawn_from: list[list[Tensor]] = [[] for _ in sequences]
    for place in range(width):
        columns.append(initial_states(model, paths, window[-1], mask[:, : num_cached + place + 1], batch.caches))
        if place + 1 < width:
            logits = draft_logits(model, columns[-1])
            best = logits.argmax(-1).tolist()
            for row, sequence in enumerate(sequences):
                if place < numbers[row]:
                    drafts[row].append(_drafted(logits[row], best[row], sequence, drawn_from[row]))
            newest = [row[place] if place < len(row) else 0 for row in drafts]
            window.append(torch.tensor(newest, device=mask.device)[:, None])
    states = {name: (rows, torch.cat([column[name][1] for column in columns], 1)) for name, (rows, _) in columns[0].items()}
    return Proposal(window=torch.cat(window, 1), mask=mask, states=states, drafts=drafts, drawn_from=drawn_from)


def _drafted(logits: Tensor, best: int, sequence: Sequence, drawn_from: list[Tensor]) -> int:
    sampling = sequence.job.sampling
    if sampling.temperature == 0:
        return best
    drawn_from.append(distribution(logits, sampling))
    return draw(drawn_from[-1], sequence.generator)


def _take(
    sequences: list[Sequence], proposal: Proposal, logits: Tensor, count: Callable[[int, int], None]
) -> tuple[list[int], list[int], list[int]]:
    """Gives every row its tokens: (tokens settled [B], the newest of each [B], rows that go on)."""
    is_sound = (logits.isfinite().all(-1) | (proposal.mask[:, -logits.shape[1] :] == 0)).all(-1).tolist()
    best = logits.argmax(-1).tolist()
    advances, newest, going = [], [], []
    for row, sequence in enumerate(sequences):
        if not is_sound[row]:
            sequence.fail(ApiError("the model returned values that are not finite", status=500, code="model_failed"))
            advances.append(1)
            newest.append(0)
            continue
        drafts, job = proposal.drafts[row], sequence.job
        if job.sampling.temperature == 0:
            settled = accept_greedy(drafts, best[row])
        else:
            settled = accept_sampled(drafts, proposal.drawn_from[row], logits[row], job.sampling, sequence.generator)
        if _tell(sequence, settled, num_drafted=len(drafts), logits=logits[row], count=count):
            going.append(row)
        advances.append(len(settled))
        newest.append(settled[-1])
    return advances, newest, going


def _tell(
    sequence: Sequence, settled: list[int], *, num_drafted: int, logits: Tensor, count: Callable[[int, int], None]
) -> bool:
    """Adds tokens, all but the last of which were drafted, until the answer ends; True if it goes on."""
    num_top, before = sequence.job.num_top, sequence.num_accepted
    sequence.num_drafted += num_drafted
    goes_on = True
    for place, token in enumerate(settled):
        sequence.num_accepted += place + 1 < len(settled)
        goes_on = sequence.take(token, None if num_top is None else facts(logits[place], token, num_top))
        if not goes_on:
            break
    count(num_drafted, sequence.num_accepted - before)
    return goes_on


def accept_greedy(drafts: list[int], best: list[int]) -> list[int]:
    """The drafts that are the attached model's own choices, up to the first that is not, and its choice behind them.

    Args:
        best: the attached model's likeliest token at each draft's place and at the one behind them.
    """
    num_accepted = next((place for place, draft in enumerate(drafts) if draft != best[place]), len(drafts))
    return [*drafts[:num_accepted], best[num_accepted]]


def accept_sampled(
    drafts: list[int], drawn_from: list[Tensor], logits: Tensor, sampling: Sampling, generator: torch.Generator
) -> list[int]:
    """A draft x stands with probability min(1, p(x) / q(x)); the first that falls is redrawn from norm(max(p - q, 0)).

    Args:
        drawn_from: q [V] of each draft.
        logits: [>= k + 1, V] of the attached model at the drafts' places and at the one behind them.

    Returns:
        Accepted drafts and one token more, distributed as if drawn from p one by one.
    """
    for place, (draft, q) in enumerate(zip(drafts, drawn_from, strict=True)):
        p = distribution(logits[place], sampling)
        if uniform(generator) * q[draft] < p[draft]:
            continue
        rest = (p - q).clamp(min=0)
        # p and q equal up to rounding: a rejection has no weight left to draw from, and p itself is right.
        return [*drafts[:place], draw(rest if rest.sum() > 0 else p, generator)]
    return [*drafts, draw(distribution(logits[len(drafts)], sampling), generator)]


def _close_ranks(batch: Batch, proposal: Proposal, advances: list[int]) -> None:
    """Takes what was not accepted out of all caches, and moves rows so that each ends in the last column."""
    assert batch.mask is not None
    num_cached, device = batch.mask.shape[1], batch.mask.device
    advance = torch.tensor(advances, device=device)
    lengths = batch.mask.sum(-1) + advance
    width = int(lengths.max())
    for name, cache in batch.caches.items():
        owners = [row for row, s in enumerate(batch.sequences) if name in s.job.path.caches()]
        joining.realign(cache, num_columns=proposal.mask.shape[1], ends=num_cached + advance[owners], width=width)
    batch.mask = (torch.arange(width, device=device) >= width - lengths[:, None]).to(batch.mask.dtype)
