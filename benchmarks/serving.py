"""What the benchmarks of servers share: adapters to serve, requests to send, answers to compare."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import torch

from shadowpeft import ShadowConfig, get_shadow_model
from shadowpeft.deploy.system_eval.replay import quantile
from shadowpeft.model.bases import EMBEDDED, load_model
from shadowpeft.train.robot import generate_robot_commands
from shadowpeft.train.tasks import TASKS

# Two logits this close (nats) may change places between two batch sizes: their kernels round differently in float32.
TIE = 1e-3
TASK = "robot"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One greedy request."""

    model: str
    prompt: str
    max_tokens: int

    def body(self, **changes: Any) -> dict[str, Any]:
        return {**vars(self), "temperature": 0, **changes}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came back.

    Attributes:
        identity: the answer's id.
        seconds, first_seconds: from the request to its end, and to its first text.
        num_tokens: generated.
        info: the field ``shadow``.
    """

    identity: str
    text: str
    seconds: float
    first_seconds: float
    num_tokens: int
    info: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Lost:
    """A request without a whole answer, and why."""

    why: str


def random_adapters(folder: Path, names: Sequence[str]) -> list[str]:
    """Untrained adapters with random weights on the embedded base, as ``NAME=FOLDER``: enough for load."""
    written = []
    for seed, name in enumerate(names):
        model = get_shadow_model(load_model(EMBEDDED), ShadowConfig())
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in model.network().parameters():
                weight.add_(torch.randn(weight.shape, generator=generator).to(weight), alpha=0.02)
        model.save_pretrained(folder / name)
        written.append(f"{name}={folder / name}")
    return written


def prompts(count: int) -> list[str]:
    """Different commands of the generated robot data under their task's prompt."""
    rows = [row for split in generate_robot_commands().values() for row in split]
    return list(islice(dict.fromkeys(TASKS[TASK].prompt(row) for row in rows), count))


async def ask_streaming(client: httpx.AsyncClient, asked: Asked) -> Answer | Lost:
    """One request by server-sent events; chunks of another answer, or an end that never comes, are a lost answer."""
    started = time.perf_counter()
    identities, text, first, reason, usage, info = set(), "", None, None, None, None
    options = {"stream": True, "stream_options": {"include_usage": True}}
    try:
        async with client.stream("POST", "/v1/completions", json=asked.body(**options)) as reply:
            if reply.status_code != 200:
                return Lost(why=f"status {reply.status_code}: {(await reply.aread())[:200].decode(errors='replace')}")
            async for line in reply.aiter_lines():
                if not line or line == "data: [DONE]":
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    return Lost(why=chunk["error"]["message"])
                identities.add((chunk["id"], chunk["model"]))
                for choice in chunk["choices"]:
                    text += choice["text"]
                    reason = choice["finish_reason"] or reason
                    first = first or time.perf_counter() - started
                usage, info = chunk.get("usage", usage), chunk.get("shadow", info)
    except (httpx.TransportError, httpx.TimeoutException) as error:
        return Lost(why=type(error).__name__)
    seconds = time.perf_counter() - started
    if len(identities) != 1 or reason is None or usage is None or {name for _, name in identities} != {asked.model}:
        return Lost(why=f"a stream of {len(identities)} answers, ended by {reason!r}")
    return Answer(
        identity=identities.pop()[0],
        text=text,
        seconds=seconds,
        first_seconds=first or seconds,
        num_tokens=usage["completion_tokens"],
        info=info or {},
    )


async def ask(client: httpx.AsyncClient, asked: Asked) -> Answer | Lost:
    """One request, answered in one piece."""
    started = time.perf_counter()
    try:
        reply = await client.post("/v1/completions", json=asked.body())
    except (httpx.TransportError, httpx.TimeoutException) as error:
        return Lost(why=type(error).__name__)
    seconds = time.perf_counter() - started
    if reply.status_code != 200:
        return Lost(why=f"status {reply.status_code}: {reply.text[:200]}")
    values = reply.json()
    return Answer(
        identity=values["id"],
        text=values["choices"][0]["text"],
        seconds=seconds,
        first_seconds=seconds,
        num_tokens=values["usage"]["completion_tokens"],
        info=values["shadow"],
    )


async def gap_where_they_part(client: httpx.AsyncClient, asked: Asked, text: str) -> float | None:
    """How far apart (nats) the two likeliest tokens are where ``text`` leaves the answer to ``asked`` alone.

    None if it does not.
    """
    reply = await client.post("/v1/completions", json=asked.body(logprobs=2))
    reply.raise_for_status()
    choice = reply.json()["choices"][0]
    alone, facts = choice["text"], choice["logprobs"]
    if alone == text:
        return None
    place = next((i for i, (a, b) in enumerate(zip(alone, text, strict=False)) if a != b), min(len(alone), len(text)))
    # The token that holds the first other character, or the one behind a text that ends early.
    token = max((i for i, offset in enumerate(facts["text_offset"]) if offset <= place), default=0)
    near = [facts["top_logprobs"][i] for i in (token - 1, token) if i >= 0]
    return min(abs(max(top.values()) - min(top.values())) for top in near)


def milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    """p50, p95 and p99."""
    return {f"p{share}": round(1000 * quantile(seconds, share / 100), 2) for share in (50, 95, 99)}
