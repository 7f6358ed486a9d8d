"""One answer in the making: what was asked, what was said so far, and what its listener hears."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from shadowpeft.deploy.serve.errors import ApiError
from shadowpeft.deploy.serve.mixed import Path
from shadowpeft.deploy.serve.sampling import Sampling, TokenFacts
from shadowpeft.deploy.serve.text import AnswerText


@dataclass(frozen=True, kw_only=True)
class Job:
    """One answer that is wanted.

    Attributes:
        prompt: token ids.
        path: the networks that answer.
        max_tokens: tokens at most.
        sampling: how they are drawn.
        stops: stop sequences.
        ends: ids that end the answer.
        strip_start: leave out white space in front of the answer.
        num_top: likeliest tokens to report for each place; None: report no token at all.
        deadline: ``time.monotonic()`` after which the answer is given up.
        num_drafts: tokens the shadow drafts at a time; 0: no speculation.
    """

    prompt: tuple[int, ...]
    path: Path
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stops: tuple[str, ...] = ()
    ends: tuple[int, ...] = ()
    strip_start: bool = False
    num_top: int | None = None
    deadline: float | None = None
    num_drafts: int = 0

    @property
    def length(self) -> int:
        """Tokens of prompt and answer at most."""
        return len(self.prompt) + self.max_tokens


@dataclass(frozen=True, kw_only=True)
class Piece:
    """New text of an answer, with the tokens behind it where they were asked for."""

    text: str
    tokens: tuple[TokenFacts, ...] = ()


@dataclass(frozen=True, kw_only=True)
class End:
    """An answer is complete.

    Attributes:
        reason: ``stop`` (end token or stop sequence) or ``length``.
        num_tokens: tokens generated, an end token included.
        num_drafted, num_accepted: tokens the shadow proposed, and those of them that are in the answer; None without
            speculation.
    """

    reason: str
    num_tokens: int
    num_drafted: int | None = None
    num_accepted: int | None = None


Event = Piece | End | ApiError


@dataclass(eq=False)
class Sequence:
    """A job with its progress. Only the worker changes it, but for ``cancelled``, which anyone may set.

    Attributes:
        emit: hears every event; the last is an ``End`` or an ``ApiError``, unless the job was cancelled.
        told: whether that last event was sent.
        num_tokens: generated so far.
        num_drafted, num_accepted: tokens that the shadow proposed so far; those that became part of the answer.
    """

    job: Job
    emit: Callable[[Event], None]
    tokenizer: PreTrainedTokenizerBase
    cancelled: bool = False
    told: bool = False
    num_tokens: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    submitted: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.generator = self.job.sampling.generator()
        self.text = AnswerText(self.tokenizer, self.job.stops, strip_start=self.job.strip_start)

    def take(self, token: int, facts: TokenFacts | None) -> bool:
        """Adds one token and tells the listener; True if the answer goes on."""
        self.num_tokens += 1
        is_end = token in self.job.ends
        is_full = self.num_tokens >= self.job.max_tokens
        new = "" if is_end else self.text.push(token)
        if (is_end or is_full) and not self.text.stopped:
            new += self.text.finish()
        if new or facts is not None:
            self.emit(Piece(text=new, tokens=() if facts is None else (facts,)))
        if is_end or self.text.stopped:
            return self.end("stop")
        return self.end("length") if is_full else True

    def end(self, reason: str) -> bool:
        drafts = {}
        if self.job.num_drafts:
            drafts = {"num_drafted": self.num_drafted, "num_accepted": self.num_accepted}
        self._tell(End(reason=reason, num_tokens=self.num_tokens, **drafts))
        return False

    def fail(self, error: ApiError) -> None:
        if not self.told:
            self._tell(error)

    def _tell(self, event: Event) -> None:
        self.told = True
        self.emit(event)
