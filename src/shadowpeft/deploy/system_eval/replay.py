"""Sending rows to a server as clients do, and timing every answer."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from shadowpeft.errors import ShadowPeftError

Prompt = str | list[int]


class ReplayError(ShadowPeftError):
    """A request that was not answered."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """One answer. ``seconds``: from request to complete answer; ``info``: the server's ``shadow`` field."""

    identity: str
    text: str
    seconds: float
    num_tokens: int
    info: dict[str, Any]
    logprobs: list[float] | None


@dataclass(frozen=True, kw_only=True)
class Replay:
    """Answers in the order of the prompts, and the time for all of them."""

    replies: list[Reply]
    seconds: float


def replay(
    url: str,
    model: str,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int,
    concurrency: int = 1,
    with_logprobs: bool = False,
    timeout: float = 120.0,
) -> Replay:
    """Greedy answers to all prompts, ``concurrency`` at a time.

    Raises:
        ReplayError: a request that was refused or not answered; the first such ends the replay.
    """
    return asyncio.run(
        _replay(url, model, prompts, max_tokens, max(concurrency, 1), with_logprobs=with_logprobs, timeout=timeout)
    )


async def _replay(
    url: str,
    model: str,
    prompts: Sequence[Prompt],
    max_tokens: int,
    concurrency: int,
    *,
    with_logprobs: bool,
    timeout: float,
) -> Replay:
    replies: list[Reply | None] = [None] * len(prompts)
    waiting = iter(range(len(prompts)))
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=timeout, limits=limits, trust_env=False) as client:

        async def work() -> None:
            for index in waiting:
                body = {"model": model, "prompt": prompts[index], "max_tokens": max_tokens, "temperature": 0}
                if with_logprobs:
                    body["logprobs"] = 0
                replies[index] = await _ask(client, body)

        started = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(concurrency)))
        seconds = time.perf_counter() - started
    return Replay(replies=[reply for reply in replies if reply is not None], seconds=seconds)


async def _ask(client: httpx.AsyncClient, body: dict[str, Any]) -> Reply:
    started = time.perf_counter()
    try:
        answer = await client.post("/v1/completions", json=body)
    except httpx.TransportError as error:
        raise ReplayError(f"a request got no answer: {type(error).__name__}") from error
    seconds = time.perf_counter() - started
    if answer.status_code != 200:
        raise ReplayError(f"a request got status {answer.status_code}: {answer.text[:200]}")
    values = answer.json()
    choice = values["choices"][0]
    logprobs = choice["logprobs"]
    return Reply(
        identity=values["id"],
        text=choice["text"],
        seconds=seconds,
        num_tokens=values["usage"]["completion_tokens"],
        info=values["shadow"],
        logprobs=None if logprobs is None else logprobs["token_logprobs"],
    )


def quantile(values: Sequence[float], share: float) -> float:
    """By linear interpolation between the two nearest values."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
