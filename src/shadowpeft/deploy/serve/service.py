"""From a request to running jobs, and from their events to one stream that a route can read."""

import asyncio
import time
import warnings
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from shadowpeft.deploy.serve.batch import most_tokens
from shadowpeft.deploy.serve.catalogue import Entry, find
from shadowpeft.deploy.serve.characters import characters_per_token
from shadowpeft.deploy.serve.errors import ApiError
from shadowpeft.deploy.serve.exported import Served
from shadowpeft.deploy.serve.joining import new_cache
from shadowpeft.deploy.serve.metrics import Metrics
from shadowpeft.deploy.serve.prompts import chat_ids, check_ids, text_ids
from shadowpeft.deploy.serve.protocol import ChatRequest, Request
from shadowpeft.deploy.serve.sampling import Sampling
from shadowpeft.deploy.serve.scheduler import MAX_TOKENS, Scheduler
from shadowpeft.deploy.serve.sequence import End, Event, Job, Piece, Sequence
from shadowpeft.generate import SpeculativeFallbackWarning
from shadowpeft.generate.rollback import why_not_draftable
from shadowpeft.model import ShadowModel
from shadowpeft.model.positions import num_positions
from shadowpeft.train.data import token_ids
from shadowpeft.train.tasks import Task


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a server allows.

    Attributes:
        max_batch, max_waiting: see :class:`Scheduler`.
        max_new_tokens: of a request that names no limit.
        temperature: of a request that names none.
        max_context: tokens of prompt and answer; None: what the model was made for. Never more than a batch can have
            (:func:`most_tokens`).
        max_batch_tokens: rows decoded together times the longest of them, prompt and answer; see :class:`Scheduler`.
        request_seconds: an answer is given up after so long.
        num_drafts: tokens drafted at a time in speculative mode.
        task: wraps chat messages in its training prompt; None: chat template or transcript.
    """

    max_batch: int = 32
    max_waiting: int = 256
    max_new_tokens: int = 256
    temperature: float = 1.0
    max_context: int | None = None
    max_batch_tokens: int = MAX_TOKENS
    request_seconds: float = 300.0
    num_drafts: int = 4
    task: Task | None = None


class Answer(Protocol):
    """A request on its way.

    ``info`` holds what is said about the answer beside OpenAI's fields; complete once ``events`` has ended.
    """

    num_choices: int
    info: dict[str, Any]

    @property
    def model(self) -> str: ...

    @property
    def num_prompt_tokens(self) -> int: ...

    def events(self) -> AsyncIterator[tuple[int, Piece | End]]:
        """(choice, event) until every choice has ended. Raises ApiError if one fails."""
        ...

    def cancel(self) -> None: ...


class Service(Protocol):
    """What the routes need of whatever answers."""

    metrics: Metrics
    tokenizer: PreTrainedTokenizerBase

    def model_names(self) -> list[str]: ...

    async def ask(self, request: Request) -> Answer: ...

    def health(self) -> str | None:
        """None if well, else what is wrong."""
        ...

    def describe(self) -> dict[str, Any]: ...

    async def close(self) -> None: ...


@dataclass(eq=False, kw_only=True)
class LocalAnswer:
    """Choices that the scheduler decodes.

    ``request``: as it was understood, with the settings' temperature and length where it named none.
    """

    scheduler: Scheduler
    request: Request
    model: str
    num_prompt_tokens: int
    num_choices: int
    info: dict[str, Any]
    inbox: asyncio.Queue[tuple[int, Event]]
    sequences: list[Sequence] = field(default_factory=list)

    async def events(self) -> AsyncIterator[tuple[int, Piece | End]]:
        left = self.num_choices
        while left:
            choice, event = await self.inbox.get()
            if isinstance(event, ApiError):
                raise event
            if isinstance(event, End):
                left -= 1
                if event.num_drafted is not None:
                    self.info["drafted"] = self.info.get("drafted", 0) + event.num_drafted
                    self.info["accepted"] = self.info.get("accepted", 0) + (event.num_accepted or 0)
            yield choice, event

    def cancel(self) -> None:
        self.scheduler.cancel(self.sequences)


class LocalService:
    """Answers with a model of this process.

    Args:
        model: a shadow model with its adapters, a plain causal language model, or an exported one.
        tokenizer: the model's.
        entries: names that clients may use.
    """

    def __init__(
        self,
        model: Served,
        tokenizer: PreTrainedTokenizerBase,
        entries: dict[str, Entry],
        settings: Settings,
        *,
        metrics: Metrics | None = None,
    ) -> None:
        self.tokenizer, self.entries, self.settings = tokenizer, entries, settings
        self.metrics = metrics or Metrics()
        self.context = _context(model, settings)
        most = characters_per_token(tokenizer)
        self._most_characters = None if most is None else most * self.context
        # The first call takes off a stored truncation or padding, which fails while other threads tokenise.
        token_ids(tokenizer, "")
        self._vocabulary = model.config.vocab_size
        self._ends = end_ids(model, tokenizer)
        self._num_drafts = {name: self._drafts_of(model, entry) for name, entry in entries.items()}
        self._scheduler = Scheduler(
            model,
            tokenizer,
            self.metrics,
            max_batch=settings.max_batch,
            max_waiting=settings.max_waiting,
            max_tokens=settings.max_batch_tokens,
        )

    def _drafts_of(self, model: Served, entry: Entry) -> int:
        """Tokens that an entry's shadow drafts at a time; 0, with a warning, where this transformers does not let it."""
        if entry.mode != "speculative" or entry.path.adapter is None or not isinstance(model, ShadowModel):
            return 0
        reason = why_not_draftable(new_cache(model.network(entry.path.adapter).backbone.config), self.context)
        if reason is None:
            return self.settings.num_drafts
        warnings.warn(f"{entry.name} decodes without speculation: {reason}", SpeculativeFallbackWarning, stacklevel=4)
        return 0

    def model_names(self) -> list[str]:
        return list(self.entries)

    def health(self) -> str | None:
        return None if self._scheduler.is_alive else "the decoder has stopped"

    def describe(self) -> dict[str, Any]:
        return {"kind": "server", "models": self.model_names()}

    async def close(self) -> None:
        await asyncio.to_thread(self._scheduler.close, self.settings.request_seconds)

    async def ask(self, request: Request, *, with_facts: bool = False) -> LocalAnswer:
        """Queues a request.

        Args:
            with_facts: report every token, for a confidence, even if the client asked for none.

        Raises:
            ApiError: unknown model, a prompt that does not fit, too many waiting.
        """
        entry = find(self.entries, request.model)
        prompts = await asyncio.to_thread(self._prompts, request)
        jobs = []
        for prompt in prompts:
            base = self._job(request, entry, prompt)
            num_top = (base.num_top or 0) if with_facts else base.num_top
            for copy in range(request.n):
                jobs.append(_copy(base, seed_offset=copy, num_top=num_top))
        loop = asyncio.get_running_loop()
        answer = LocalAnswer(
            scheduler=self._scheduler,
            request=_completed(request, jobs[0]),
            model=request.model,
            num_prompt_tokens=sum(map(len, prompts)),
            num_choices=len(jobs),
            info={"mode": entry.mode, "adapter": entry.path.adapter, "answered_by": "server"},
            inbox=asyncio.Queue(),
        )

        def emit(choice: int, event: Event) -> None:
            loop.call_soon_threadsafe(answer.inbox.put_nowait, (choice, event))

        answer.sequences = self._scheduler.submit(jobs, [partial(emit, choice) for choice in range(len(jobs))])
        return answer

    def _prompts(self, request: Request) -> list[list[int]]:
        if isinstance(request, ChatRequest):
            most = self._most_characters
            prompts = [chat_ids(self.tokenizer, request.messages, self.settings.task, most_characters=most)]
        else:
            prompts = [self._text_or_ids(prompt) for prompt in request.prompts]
        if not prompts or not all(prompts):
            raise ApiError("the prompt is empty", param="prompt", code="invalid_value")
        if len(prompts) > 128:
            raise ApiError(f"{len(prompts)} prompts in one request; at most 128 may be", param="prompt")
        return prompts

    def _text_or_ids(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            return text_ids(self.tokenizer, prompt, most_characters=self._most_characters)
        return check_ids(prompt, self._vocabulary)

    def _job(self, request: Request, entry: Entry, prompt: list[int]) -> Job:
        settings = self.settings
        room = self.context - len(prompt)
        if room < 1 or (request.limit or 0) > room:
            raise ApiError(
                f"the prompt has {len(prompt)} tokens and the answer may have {request.limit or 'some'}, but both must "
                f"fit into the context of {self.context}; shorten the prompt or lower max_tokens",
                code="context_length_exceeded",
                param="messages" if isinstance(request, ChatRequest) else "prompt",
            )
        temperature = settings.temperature if request.temperature is None else request.temperature
        return Job(
            prompt=tuple(prompt),
            path=entry.path,
            max_tokens=request.limit or min(settings.max_new_tokens, room),
            sampling=Sampling(temperature=temperature, top_p=request.top_p or 1.0, seed=request.seed),
            stops=request.stops,
            ends=self._ends,
            strip_start=isinstance(request, ChatRequest),
            num_top=request.num_top,
            deadline=time.monotonic() + settings.request_seconds,
            num_drafts=self._num_drafts[entry.name],
        )


def _context(model: Served, settings: Settings) -> int:
    """Tokens of prompt and answer, with a warning where they are fewer than were asked for."""
    wanted = min(num_positions(model.config), settings.max_context or 2**31)
    context = min(wanted, most_tokens(model))
    if context < wanted:
        warnings.warn(
            f"prompt and answer may have {context} tokens together instead of {wanted}: longer texts turn the positions of all "
            "rows in a batch by the long factors of this model's rope. For those call generate() on the attached model",
            stacklevel=3,
        )
    return int(context)


def _completed(request: Request, job: Job) -> Request:
    """The request with what it left open, for whoever else is to answer it under the same terms."""
    limit = {} if request.limit else {"max_tokens": job.max_tokens}
    return request.model_copy(update={"temperature": job.sampling.temperature, **limit})


def _copy(job: Job, *, seed_offset: int, num_top: int | None) -> Job:
    """The same job for another choice: its seed moves on, so that choices differ."""
    seed = None if job.sampling.seed is None else job.sampling.seed + seed_offset
    return replace(job, sampling=replace(job.sampling, seed=seed), num_top=num_top)


def end_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    others = model.generation_config.eos_token_id
    ids = [tokenizer.eos_token_id, *(others if isinstance(others, list) else [others])]
    return tuple(sorted({token for token in ids if token is not None}))
