"""The edge: answers itself, and hands over what it cannot do or is not sure of."""

import time
from collections import Counter, deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from shadowpeft.deploy.route.artefact import Router
from shadowpeft.deploy.route.cloud import Cloud, CloudError
from shadowpeft.deploy.route.grammar import reason_to_escalate
from shadowpeft.deploy.route.scores import all_scores
from shadowpeft.deploy.serve.errors import ApiError
from shadowpeft.deploy.serve.protocol import CompletionRequest, Request
from shadowpeft.deploy.serve.sampling import TokenFacts
from shadowpeft.deploy.serve.sequence import End, Piece
from shadowpeft.deploy.serve.service import LocalAnswer, LocalService

EDGE_NAME = "edge"
LOCAL_NAME = "edge:local"
# Answers that the live curve is drawn from.
_NUM_RECENT = 500


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Whether an answer is kept, and why: ``confident`` or a reason to escalate; its confidence and scores."""

    escalate: bool
    reason: str
    confidence: float
    scores: dict[str, float]


def decide(router: Router, text: str, facts: list[TokenFacts]) -> Decision:
    """The grammar first, then the threshold."""
    scores = all_scores(facts)
    confidence = router.confidence(scores)
    reason = reason_to_escalate(text, router.skills)
    if reason is None and confidence < router.point.threshold:
        reason = "low_confidence"
    return Decision(escalate=reason is not None, reason=reason or "confident", confidence=confidence, scores=scores)


class EdgeService:
    """A device's model with a router in front of a cloud.

    Args:
        local: the detached shadow, under the name ``edge``.
        router: decides.
        cloud: None: nothing is ever escalated.
        never_escalate: the privacy switch; nothing leaves the device, whatever the router says.
    """

    def __init__(
        self, local: LocalService, router: Router, cloud: Cloud | None, *, never_escalate: bool = False
    ) -> None:
        self.local, self.router = local, router
        self.cloud = None if never_escalate else cloud
        self.never_escalate = never_escalate
        self.metrics, self.tokenizer = local.metrics, local.tokenizer
        self.seen: Counter[str] = Counter()
        self.recent: deque[tuple[float, bool]] = deque(maxlen=_NUM_RECENT)
        self._cloud_calibration = router.cloud_calibration()

    def model_names(self) -> list[str]:
        return [EDGE_NAME, LOCAL_NAME]

    def health(self) -> str | None:
        return self.local.health()

    async def close(self) -> None:
        await self.local.close()
        if self.cloud is not None:
            await self.cloud.close()

    def describe(self) -> dict[str, Any]:
        """For the page: the expected curve, the threshold on it, and what happened so far.

        ``live`` is about the latest answers, as if each side were right with its calibrated probability.
        """
        return {
            "kind": "edge",
            "models": self.model_names(),
            "never_escalate": self.never_escalate,
            "has_cloud": self.cloud is not None,
            "breaker_open": self.cloud is not None and self.cloud.breaker.is_open,
            "score": self.router.score,
            "point": self.router.point.to_dict(),
            "curve": self.router.curve(),
            "live": self.router.live(list(self.recent), self._cloud_calibration),
            "seen": dict(self.seen),
        }

    async def ask(self, request: Request) -> "RoutedAnswer | LocalAnswer":
        """Starts the local answer; the decision falls when it is complete.

        What a router cannot judge (several choices, logprobs) is answered under the name ``edge:local`` alone, without a
        confidence.

        Raises:
            ApiError: unknown model, or something a router cannot do.
        """
        if request.model not in self.model_names():
            known = ", ".join(self.model_names())
            raise ApiError(
                f"there is no model {request.model!r}; there are: {known}",
                status=404,
                code="model_not_found",
                param="model",
            )
        has_many = request.n > 1 or (isinstance(request, CompletionRequest) and len(request.prompts) > 1)
        if request.model == LOCAL_NAME and (has_many or request.num_top is not None):
            answer = await self.local.ask(request.model_copy(update={"model": EDGE_NAME}))
            answer.info |= {"answered_by": "edge", "kept_private": True}
            return answer
        if has_many:
            said = f"a router judges one answer a request; ask again for more, or ask {LOCAL_NAME!r}"
            raise ApiError(said, code="unsupported")
        if request.num_top is not None:
            raise ApiError(f"a router gives a confidence, no logprobs; leave them out, or ask {LOCAL_NAME!r}", param="logprobs")
        started = time.monotonic()
        local = await self.local.ask(request.model_copy(update={"model": EDGE_NAME}), with_facts=True)
        may_escalate = self.cloud is not None and request.model != LOCAL_NAME
        return RoutedAnswer(service=self, request=request, local=local, may_escalate=may_escalate, started=started)


@dataclass(eq=False, kw_only=True)
class RoutedAnswer:
    """One answer on its way through the router. Held back until it is decided who gives it."""

    service: EdgeService
    request: Request
    local: LocalAnswer
    may_escalate: bool
    started: float
    info: dict[str, Any] = field(default_factory=dict)
    num_choices: int = 1

    @property
    def model(self) -> str:
        return self.request.model

    @property
    def num_prompt_tokens(self) -> int:
        return self.local.num_prompt_tokens

    def cancel(self) -> None:
        self.local.cancel()

    async def events(self) -> AsyncIterator[tuple[int, Piece | End]]:
        text, facts, end = await self._from_edge()
        decision = decide(self.service.router, text, facts)
        edge_ms = round(1000 * (time.monotonic() - self.started), 2)
        self.info |= {"mode": "edge", "answered_by": "edge", "reason": decision.reason, "degraded": False}
        self.service.recent.append((decision.confidence, decision.reason not in ("confident", "low_confidence")))
        self.info |= {"confidence": decision.confidence, "scores": decision.scores, "edge_ms": edge_ms}
        if decision.escalate:
            if self.may_escalate and self.service.cloud is not None:
                text, end = await self._from_cloud(self.service.cloud, text, end)
            else:
                self.info["kept_private"] = True
        self._count()
        yield 0, Piece(text=text)
        yield 0, end

    async def _from_edge(self) -> tuple[str, list[TokenFacts], End]:
        text, facts = "", []
        async for _, event in self.local.events():
            if isinstance(event, End):
                return text, facts, event
            text += event.text
            facts.extend(event.tokens)
        raise AssertionError("a local answer ends with an End")

    async def _from_cloud(self, cloud: Cloud, text: str, end: End) -> tuple[str, End]:
        """The cloud's answer, or the edge's own where there is none."""
        started = time.monotonic()
        try:
            answer = await cloud.ask(self.local.request, partial(is_acceptable, self.service.router))
        except CloudError as error:
            self.info |= {"degraded": True, "cloud_error": error.kind}
        else:
            self.info |= {"answered_by": "cloud", "attempts": answer.num_attempts}
            if answer.num_drafted is not None:
                self.info |= {"drafted": answer.num_drafted, "accepted": answer.num_accepted}
            text, end = answer.text, End(reason=answer.finish_reason, num_tokens=answer.num_tokens)
        self.info["cloud_ms"] = round(1000 * (time.monotonic() - started), 2)
        return text, end

    def _count(self) -> None:
        info, metrics, seen = self.info, self.service.metrics, self.service.seen
        metrics.routed.labels(answered_by=info["answered_by"], reason=info["reason"]).inc()
        if info["degraded"]:
            metrics.degraded.inc()
        seen["answers"] += 1
        seen[info["answered_by"]] += 1
        seen["degraded"] += info["degraded"]
        seen["escalated"] += info["answered_by"] == "cloud" or info["degraded"]


def is_acceptable(router: Router, text: str) -> bool:
    """Whether the device can carry the cloud's answer out; that the cloud says ``[REMOTE]`` itself is an answer."""
    return reason_to_escalate(text, router.skills) in (None, "remote")
