"""Answers to a list of prompts through the server's own batches, without a server: the same tokens, and their facts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from shadowpeft.deploy.serve import batch as batches
from shadowpeft.deploy.serve.batch import Batch
from shadowpeft.deploy.serve.errors import ApiError
from shadowpeft.deploy.serve.exported import Served
from shadowpeft.deploy.serve.mixed import Path
from shadowpeft.deploy.serve.sampling import TokenFacts
from shadowpeft.deploy.serve.sequence import Event, Job, Piece
from shadowpeft.deploy.serve.sequence import Sequence as Row
from shadowpeft.evaluate.batches import check_batch_size


@dataclass(frozen=True, kw_only=True)
class Said:
    """One greedy answer: its text, and what is known of every token (an end token included)."""

    text: str
    facts: tuple[TokenFacts, ...]


def answer_all(
    model: Served,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    path: Path,
    *,
    max_tokens: int,
    ends: tuple[int, ...],
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> list[Said]:
    """Greedy answers in the order of ``prompts``; finished rows make room for the next at once.

    Args:
        prompts: which fit, with ``max_tokens`` of an answer, into :func:`most_tokens` of the model.

    Raises:
        ConfigError: ``batch_size`` below 1.
        ApiError: the model returned values that are not finite.
    """
    check_batch_size(batch_size)
    heard: list[list[Event]] = [[] for _ in prompts]
    rows = []
    for prompt, events in zip(prompts, heard, strict=True):
        job = Job(prompt=tuple(prompt), path=path, max_tokens=max_tokens, ends=ends, num_top=0)
        rows.append(Row(job, events.append, tokenizer))
    # Long prompts first, so that rows of like length run together.
    waiting = sorted(rows, key=lambda row: len(row.job.prompt))
    running = Batch()
    while waiting or len(running):
        room = batch_size - len(running)
        # Joining a few rows at a time costs a pass each; a quarter of the batch makes it worth while.
        if waiting and room >= min(batch_size / 4, len(waiting)):
            joining = [waiting.pop() for _ in range(min(room, len(waiting)))]
            running = batches.merge(running, batches.prefill(model, joining))
        if len(running):
            running = batches.step(model, running)
        if progress is not None:
            progress(sum(row.told for row in rows), len(rows))
    return [_said(events) for events in heard]


def _said(events: list[Event]) -> Said:
    if isinstance(events[-1], ApiError):
        raise events[-1]
    pieces = [event for event in events if isinstance(event, Piece)]
    return Said(
        text="".join(piece.text for piece in pieces), facts=tuple(fact for piece in pieces for fact in piece.tokens)
    )
