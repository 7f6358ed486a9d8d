"""How long a cloud is waited for that says when it wants to be asked again."""

import asyncio
import json

import httpx
import pytest

from shadowpeft.deploy.route.breaker import CircuitBreaker
from shadowpeft.deploy.route.cloud import Cloud, CloudError, CloudSettings
from shadowpeft.deploy.serve.metrics import Metrics
from shadowpeft.deploy.serve.protocol import ChatRequest, parse

ASKED = parse(ChatRequest, json.dumps({"model": "edge", "messages": [{"role": "user", "content": "Sit"}]}).encode())


def refused_by(status, headers, *, num_requests=1, **settings):
    """(kinds of the failures, pauses made, the breaker) of requests to a cloud that always answers so."""
    pauses, kinds = [], []

    async def sleep(seconds):
        pauses.append(seconds)

    async def run():
        transport = httpx.MockTransport(lambda request: httpx.Response(status, headers=headers))
        breaker = CircuitBreaker(max_failures=3, open_seconds=60)
        cloud = Cloud(
            CloudSettings(url="http://127.0.0.1:1", model="m", first_pause=0.1, max_pause=0.4, **settings),
            Metrics(),
            breaker=breaker,
            transport=transport,
            sleep=sleep,
        )
        for _ in range(num_requests):
            with pytest.raises(CloudError) as caught:
                await cloud.ask(ASKED, lambda text: True)
            kinds.append(caught.value.kind)
        await cloud.close()
        return breaker

    return kinds, pauses, asyncio.run(run())


@pytest.mark.parametrize(("status", "kind"), [(429, "busy"), (503, "failed")])
def test_a_cloud_that_says_when_is_not_asked_before(status, kind):
    kinds, pauses, _ = refused_by(status, {"retry-after": "2"})
    assert kinds == [kind] and pauses == [2.0, 2.0]


@pytest.mark.parametrize("said", ["0", "-5", "nan", "soon", "²", "Fri, 31 Dec 2100 23:59:59 GMT"])
def test_what_says_no_later_time_leaves_the_own_pauses(said):
    _, pauses, _ = refused_by(503, {"retry-after": said.encode("latin-1")})
    assert len(pauses) == 2 and all(0.05 <= pause <= 0.2 for pause in pauses)


def test_a_time_that_lies_behind_the_patience_is_not_waited_for():
    kinds, pauses, _ = refused_by(429, {"retry-after": "30"}, total_seconds=20.0)
    assert kinds == ["busy"] and pauses == []


def test_a_busy_cloud_does_not_open_the_breaker_and_a_failing_one_does():
    kinds, _, breaker = refused_by(429, {"retry-after": "1"}, num_requests=3)
    assert kinds == ["busy"] * 3 and not breaker.is_open
    kinds, _, breaker = refused_by(503, {}, num_requests=2)
    assert kinds == ["failed", "breaker_open"] and breaker.is_open
