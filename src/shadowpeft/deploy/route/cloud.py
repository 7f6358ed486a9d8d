"""Asking the cloud, with patience that ends."""

import asyncio
import random
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import httpx

from shadowpeft.deploy.route.breaker import CircuitBreaker
from shadowpeft.deploy.serve.metrics import Metrics
from shadowpeft.deploy.serve.protocol import ChatRequest, Request
from shadowpeft.deploy.serve.text import holds_half_a_character
from shadowpeft.errors import ConfigError, ShadowPeftError

# The same request again would end the same way: it was refused, the key or address is wrong, or a well-formed answer is none
# that the device can carry out (the edge asks for what it decodes itself, greedily as a rule).
_FINAL = {"refused", "misconfigured", "unusable"}
# These say nothing against the cloud's health; one that is busy answers others.
_HARMLESS = {"refused", "unusable", "busy"}


class CloudError(ShadowPeftError):
    """The cloud gave no answer that can be used.

    Attributes:
        kind: why, one word for counters.
        retry_after: seconds for which the cloud asks to be left alone.
    """

    def __init__(self, kind: str, message: str, *, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.kind, self.retry_after = kind, retry_after


@dataclass(frozen=True, kw_only=True)
class CloudAnswer:
    """What the cloud said. ``num_drafted``, ``num_accepted``: where it says that it speculated, else None."""

    text: str
    finish_reason: str
    num_tokens: int
    num_attempts: int
    num_drafted: int | None = None
    num_accepted: int | None = None


@dataclass(frozen=True, kw_only=True)
class CloudSettings:
    """Where the cloud is and how long it is waited for.

    Attributes:
        url: its address, without ``/v1``.
        model: asked for by this name.
        api_key: sent along if given.
        total_seconds: for all attempts and pauses together.
        max_attempts: calls for one answer.
        first_pause, max_pause: seconds between attempts, doubled each time, half of it at random.

    Raises:
        ConfigError: an address that is none, no time, or no attempt.
    """

    url: str
    model: str
    api_key: str | None = None
    total_seconds: float = 10.0
    max_attempts: int = 3
    first_pause: float = 0.1
    max_pause: float = 2.0

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")) or self.url.rstrip("/").endswith("/v1"):
            raise ConfigError(f"cloud={self.url!r} is not valid: expected an address without /v1, such as http://127.0.0.1:8000")
        if self.total_seconds <= 0:
            raise ConfigError(f"cloud_seconds={self.total_seconds} is not valid: expected more than 0")
        if self.max_attempts < 1:
            raise ConfigError(f"cloud_attempts={self.max_attempts} is not valid: expected at least 1")


class Cloud:
    """A client of one server.

    Args:
        settings: see there.
        metrics: counts every attempt by outcome.
        breaker: shared by all requests.
        transport: for tests.
    """

    def __init__(
        self,
        settings: CloudSettings,
        metrics: Metrics,
        *,
        breaker: CircuitBreaker | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._settings, self._metrics, self._sleep = settings, metrics, sleep
        self.breaker = breaker or CircuitBreaker()
        headers = {} if settings.api_key is None else {"authorization": f"Bearer {settings.api_key}"}
        limits = httpx.Limits(max_connections=256, max_keepalive_connections=64)
        self._client = httpx.AsyncClient(
            base_url=settings.url, headers=headers, transport=transport, limits=limits, trust_env=False
        )

    async def close(self) -> None:
        await self._client.aclose()

    async def ask(self, request: Request, is_acceptable: Callable[[str], bool]) -> CloudAnswer:
        """The cloud's answer to a client's request.

        Args:
            is_acceptable: whether a text can be used; another one is not asked for again.

        Raises:
            CloudError: the breaker is open, or no attempt within the time gave an answer that can be used.
        """
        settings, deadline = self._settings, time.monotonic() + self._settings.total_seconds
        failure = CloudError("late", "there was no time for a single attempt")
        for attempt in range(1, settings.max_attempts + 1):
            left = deadline - time.monotonic()
            if left <= 0:
                break
            permit = self.breaker.admit()
            if permit is None:
                self._count("not_asked")
                raise CloudError("breaker_open", "the cloud failed several times and is left alone for now")
            try:
                answer = await self._attempt(request, left, attempt, is_acceptable)
            except CloudError as error:
                failure = error
                self._count(error.kind)
                (self.breaker.succeeded if error.kind in _HARMLESS else self.breaker.failed)(permit)
                if error.kind in _FINAL:
                    raise
            except BaseException:
                self.breaker.released(permit)
                raise
            else:
                self.breaker.succeeded(permit)
                self._count("answered")
                return answer
            finally:
                self._metrics.breaker_open.set(self.breaker.is_open)
            if attempt < settings.max_attempts:
                pause = max(self._pause(attempt), failure.retry_after)
                if pause >= deadline - time.monotonic():  # nobody would be asked behind it, and the client waits
                    break
                await self._sleep(pause)
        raise failure

    def _pause(self, attempt: int) -> float:
        longest = min(self._settings.first_pause * 2 ** (attempt - 1), self._settings.max_pause)
        return longest * (0.5 + random.random() / 2)

    def _count(self, outcome: str) -> None:
        self._metrics.cloud_attempts.labels(outcome=outcome).inc()

    async def _attempt(
        self, request: Request, seconds: float, attempt: int, is_acceptable: Callable[[str], bool]
    ) -> CloudAnswer:
        route = "/v1/chat/completions" if isinstance(request, ChatRequest) else "/v1/completions"
        try:
            reply = await asyncio.wait_for(
                self._client.post(route, json=body_for(request, self._settings.model), timeout=seconds), seconds
            )
        except (httpx.TimeoutException, asyncio.TimeoutError) as error:
            raise CloudError("late", "the cloud did not answer in time") from error
        except httpx.DecodingError as error:
            raise CloudError("wrong", "the cloud's answer is not in the encoding it names") from error
        except (httpx.RequestError, httpx.InvalidURL) as error:
            raise CloudError("down", f"the cloud cannot be reached: {type(error).__name__}") from error
        if reply.status_code in (408, 429) or reply.status_code >= 500:
            kind = "busy" if reply.status_code == 429 else "failed"
            retry_after = _retry_after(reply) if reply.status_code in (429, 503) else 0.0
            raise CloudError(kind, f"the cloud answered with status {reply.status_code}", retry_after=retry_after)
        if reply.status_code in (401, 403, 404):
            raise CloudError("misconfigured", f"the cloud does not know this key, model or address: status {reply.status_code}")
        if reply.status_code != 200:
            raise CloudError("refused", f"the cloud refused with status {reply.status_code}")
        answer = _read(reply, isinstance(request, ChatRequest), attempt)
        if not is_acceptable(answer.text):
            raise CloudError("unusable", "the cloud's answer is none that can be carried out")
        return answer


def body_for(request: Request, model: str) -> dict[str, Any]:
    """A client's request as it goes on to the cloud: another model name, in one piece."""
    values = request.model_dump(exclude_none=True, exclude={"stream", "stream_options"})
    return {**values, "model": model}


def _retry_after(reply: httpx.Response) -> float:
    """Seconds of ``Retry-After``; 0 where there are none or a date, whose clock need not be this one."""
    text = reply.headers.get("retry-after", "").strip()
    return float(text) if re.fullmatch("[0-9]+", text) else 0.0


def _read(reply: httpx.Response, is_chat: bool, attempt: int) -> CloudAnswer:
    try:
        values = reply.json()
        choice = values["choices"][0]
        text = choice["message"]["content"] if is_chat else choice["text"]
        reason, num_tokens = choice["finish_reason"], values["usage"]["completion_tokens"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise CloudError("wrong", "the cloud's answer is not of OpenAI's shape") from error
    is_counted = isinstance(num_tokens, int) and num_tokens >= 0
    if not _is_text(text) or not _is_text(reason) or not is_counted:
        raise CloudError("wrong", "the cloud's answer is not of OpenAI's shape")
    drafted, accepted = _drafts(values["usage"])
    return CloudAnswer(
        text=text,
        finish_reason=reason,
        num_tokens=num_tokens,
        num_attempts=attempt,
        num_drafted=drafted,
        num_accepted=accepted,
    )


def _is_text(value: Any) -> bool:
    """Whether a value is a text that can be passed on."""
    return isinstance(value, str) and not holds_half_a_character(value)


def _drafts(usage: dict[str, Any]) -> tuple[int | None, int | None]:
    """(drafted, accepted) by OpenAI's counts of predicted tokens; an answer is none the worse for odd ones."""
    details = usage.get("completion_tokens_details")
    if not isinstance(details, dict):
        return None, None
    accepted, rejected = (details.get(f"{kind}_prediction_tokens") for kind in ("accepted", "rejected"))
    if not isinstance(accepted, int) or not isinstance(rejected, int) or min(accepted, rejected) < 0 or not accepted + rejected:
        return None, None
    return accepted + rejected, accepted
