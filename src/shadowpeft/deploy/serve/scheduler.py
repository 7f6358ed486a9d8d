"""One thread that owns the model and decodes every request that is there, letting new ones join at any step.

transformers' own continuous batching owns one paged cache sized from one config and switches the base's attention
to paged kernels; a second backbone, whose keys are needed too, has no place in it. Hence this scheduler over caches
of both paths.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from shadowpeft.deploy.serve import batch as batches
from shadowpeft.deploy.serve import speculation
from shadowpeft.deploy.serve.batch import Batch
from shadowpeft.deploy.serve.errors import ApiError
from shadowpeft.deploy.serve.exported import Served
from shadowpeft.deploy.serve.metrics import Metrics
from shadowpeft.deploy.serve.sequence import Event, Job, Sequence

logger = logging.getLogger(__name__)

# 32 rows of 4,096 tokens each: 16 GiB of keys and values for an 8B model with grouped heads in 16 bits.
MAX_TOKENS = 2**17


class Scheduler:
    """Decodes jobs together.

    Args:
        model: a shadow model, a plain causal language model, or an exported one.
        tokenizer: its tokenizer.
        metrics: counts what happens.
        max_batch: rows decoded together at most.
        max_waiting: rows waiting for a place at most; one more is refused with status 429.
        max_prefill: prompt tokens read in one pass at most (but always one prompt), so that a long queue of prompts
            does not hold up the rows that are running.
        max_tokens: rows times the longest of them (prompt and answer), over both batches, at most: keys and values are
            rectangles, so that one long prompt makes every row beside it as long. What does not fit waits; one row alone
            always runs.
    """

    def __init__(
        self,
        model: Served,
        tokenizer: PreTrainedTokenizerBase,
        metrics: Metrics,
        *,
        max_batch: int = 32,
        max_waiting: int = 256,
        max_prefill: int = 4096,
        max_tokens: int = MAX_TOKENS,
    ) -> None:
        self._model, self._tokenizer, self._metrics = model, tokenizer, metrics
        self._max_batch, self._max_waiting = max_batch, max_waiting
        self._max_prefill, self._max_tokens = max_prefill, max_tokens
        self._waiting: deque[Sequence] = deque()
        # Rows that advance by one token, and rows whose shadow drafts; see speculation.py for why they are apart.
        self._plain, self._drafting = Batch(), Batch()
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="decoder", daemon=True)
        self._thread.start()

    # ---------------------------------------------------------------- for other threads

    def submit(self, jobs: list[Job], emits: list[Callable[[Event], None]]) -> list[Sequence]:
        """Queues jobs, all or none.

        Raises:
            ApiError: more at once than may ever wait (400), too many are waiting (429), or the server is going down (503).
        """
        if len(jobs) > self._max_waiting:
            raise ApiError(f"{len(jobs)} answers in one request; at most {self._max_waiting} may be", code="invalid_value")
        sequences = [Sequence(job, emit, self._tokenizer) for job, emit in zip(jobs, emits, strict=True)]
        with self._wake:
            if self._closing or not self._thread.is_alive():
                raise ApiError("the server is shutting down", status=503, code="shutting_down", retry_after=5)
            if len(self._waiting) + len(sequences) > self._max_waiting:
                self._metrics.refused.inc()
                raise ApiError(
                    f"{len(self._waiting)} answers are waiting already, at most {self._max_waiting} may; try later",
                    status=429,
                    code="too_many_requests",
                    retry_after=1,
                )
            self._waiting.extend(sequences)
            self._wake.notify()
        return sequences

    def cancel(self, sequences: list[Sequence]) -> None:
        """Gives jobs up; their rows are dropped before the next step."""
        with self._wake:
            for sequence in sequences:
                sequence.cancelled = True
            self._wake.notify()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def close(self, timeout: float | None = None) -> None:
        """Takes no more jobs, finishes those there are and ends the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(timeout)

    # ---------------------------------------------------------------- the worker

    def _work(self) -> None:
        try:
            while self._wait_for_work():
                self._round()
        finally:
            with self._wake:
                self._closing = True
                left = [*self._plain.sequences, *self._drafting.sequences, *self._waiting]
            for sequence in left:
                sequence.fail(ApiError("the decoder has stopped", status=500, code="decoder_stopped"))

    def _wait_for_work(self) -> bool:
        """True once there is work; False when closing and all is done."""
        with self._wake:
            while not self._waiting and not self._num_running:
                if self._closing:
                    return False
                self._wake.wait()
        return True

    def _round(self) -> None:
        """Admits what fits, then a step for all; a fault of the model ends its rows, not the server."""
        self._drop_abandoned()
        joining = self._next_to_join()
        self._plain = self._joined(self._plain, [s for s in joining if not s.job.num_drafts])
        self._drafting = self._joined(self._drafting, [s for s in joining if s.job.num_drafts])
        plain, drafting = self._plain, self._drafting
        self._plain = self._stepped(plain, lambda: batches.step(self._model, plain))
        count = self._metrics.count_drafts
        self._drafting = self._stepped(drafting, lambda: speculation.step(self._model, drafting, count))
        self._tell_sizes()

    def _joined(self, running: Batch, sequences: list[Sequence]) -> Batch:
        """``running`` with new rows, whose prompts are read here."""
        if not sequences:
            return running
        started = time.monotonic()
        fresh = self._guarded(sequences, lambda: batches.prefill(self._model, sequences))
        self._metrics.prefill_seconds.observe(time.monotonic() - started)
        return self._guarded(fresh.sequences, lambda: batches.merge(running, fresh), otherwise=running)

    def _stepped(self, running: Batch, act: Callable[[], Batch]) -> Batch:
        if not len(running):
            return running
        self._metrics.batch_rows.observe(len(running))
        return self._guarded(running.sequences, act)

    @property
    def _num_running(self) -> int:
        return len(self._plain) + len(self._drafting)

    def _guarded(self, sequences: list[Sequence], act: Callable[[], Batch], *, otherwise: Batch | None = None) -> Batch:
        """What ``act`` gives; if it fails, so do ``sequences``, and ``otherwise`` is what goes on."""
        try:
            return act()
        except Exception as error:
            logger.exception("decoding failed")
            text = f"the model failed: {type(error).__name__}"
            failure = error if isinstance(error, ApiError) else ApiError(text, status=500, code="model_failed")
            for sequence in sequences:
                sequence.fail(failure)
            return otherwise or Batch()

    def _drop_abandoned(self) -> None:
        now = time.monotonic()
        with self._wake:
            queued, self._waiting = list(self._waiting), deque()
            self._waiting.extend(s for s in queued if not self._is_over(s, now))
        self._plain, self._drafting = (self._unfinished(batch, now) for batch in (self._plain, self._drafting))

    def _unfinished(self, batch: Batch, now: float) -> Batch:
        return batches.keep(batch, [row for row, s in enumerate(batch.sequences) if not self._is_over(s, now)])

    def _is_over(self, sequence: Sequence, now: float) -> bool:
        deadline = sequence.job.deadline
        if not sequence.cancelled and deadline is not None and now > deadline:
            self._metrics.timed_out.inc()
            sequence.fail(ApiError("the answer took longer than the server allows", status=504, code="timeout"))
        if sequence.cancelled and not sequence.told:
            self._metrics.cancelled.inc()
            sequence.told = True
        return sequence.told

    def _next_to_join(self) -> list[Sequence]:
        """Waiting rows that fit into the batch and into one reading pass, first come first served."""
        chosen: list[Sequence] = []
        with self._wake:
            longest = 0
            while self._waiting and self._num_running + len(chosen) < self._max_batch:
                longest = max(longest, len(self._waiting[0].job.prompt))
                if chosen and longest * (len(chosen) + 1) > self._max_prefill:
                    break
                if (self._num_running or chosen) and not self._has_room([*chosen, self._waiting[0]]):
                    break
                chosen.append(self._waiting.popleft())
        for sequence in chosen:
            self._metrics.queue_seconds.observe(time.monotonic() - sequence.submitted)
        return chosen

    def _has_room(self, joining: list[Sequence]) -> bool:
        """Whether keys and values of all rows, each batch as wide as its longest row may become, stay within the budget."""
        num_tokens = 0
        for batch, is_drafting in ((self._plain, False), (self._drafting, True)):
            rows = [*batch.sequences, *(s for s in joining if bool(s.job.num_drafts) == is_drafting)]
            num_tokens += len(rows) * max((s.job.length for s in rows), default=0)
        return num_tokens <= self._max_tokens

    def _tell_sizes(self) -> None:
        self._metrics.running.set(self._num_running)
        self._metrics.waiting.set(len(self._waiting))
