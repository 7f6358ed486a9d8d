"""What the load benchmark calls equal, a tie, wrong and lost; a verdict that cannot fail would prove nothing."""

import asyncio
import json
import sys
from pathlib import Path

import httpx
import pytest

from deploy.running import free_port, running
from deploy.tiny import byte_tokenizer, shadow_model
from shadowpeft.deploy.serve.app import create_app
from shadowpeft.deploy.serve.catalogue import catalogue
from shadowpeft.deploy.serve.service import LocalService, Settings

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))

import serve_load
import serving

ASKED = serving.Asked(model="robot", prompt="Sit down", max_tokens=12)


@pytest.fixture(scope="module")
def address():
    model = shadow_model()
    service = LocalService(model, byte_tokenizer(), catalogue(model.networks), Settings(temperature=0.0))
    with running(create_app(service)) as url:
        yield url


def with_client(url, act):
    async def run():
        async with httpx.AsyncClient(base_url=url, timeout=30, trust_env=False) as client:
            return await act(client)

    return asyncio.run(run())


def answer(text):
    return serving.Answer(identity="x", text=text, seconds=1.0, first_seconds=1.0, num_tokens=1, info={})


@pytest.mark.parametrize("name", ["robot", "robot:speculative", "base"])
def test_a_stream_and_a_whole_answer_are_read_alike(address, name):
    asked = serving.Asked(model=name, prompt="Sit down", max_tokens=12)
    streamed = with_client(address, lambda client: serving.ask_streaming(client, asked))
    whole = with_client(address, lambda client: serving.ask(client, asked))
    assert (streamed.text, streamed.num_tokens) == (whole.text, whole.num_tokens)
    assert streamed.identity != whole.identity and 0 < streamed.first_seconds <= streamed.seconds


def test_an_answer_of_another_request_is_wrong_and_one_that_parts_at_a_tie_is_not(address, monkeypatch):
    alone = with_client(address, lambda client: serving.ask(client, ASKED))
    other = serving.Asked(model="home", prompt="Stand up", max_tokens=12)
    mixed = with_client(address, lambda client: serving.ask(client, other))

    def verdict(one, two):
        return with_client(address, lambda client: serve_load.judge(client, ASKED, one, two))

    assert verdict(alone, alone) == "equal" and verdict(alone, mixed) == "wrong"
    assert verdict(alone, answer(alone.text[:-1])) == "wrong"
    assert verdict(alone, serving.Lost(why="gone")) == "lost" == verdict(serving.Lost(why="gone"), alone)
    monkeypatch.setattr(serve_load, "TIE", 1e9)
    assert verdict(alone, mixed) == "tie"


def test_the_gap_is_that_of_the_token_where_the_texts_part(address):
    facts = httpx.post(f"{address}/v1/completions", json=ASKED.body(logprobs=2)).json()["choices"][0]
    text, logprobs = facts["text"], facts["logprobs"]
    place = 6  # characters; the tokens of this tokenizer are bytes, so some are parts of a character
    token = max(i for i, offset in enumerate(logprobs["text_offset"]) if offset <= place)
    other = text[:place] + ("x" if text[place] != "x" else "y") + text[place + 1 :]
    gaps = [max(top.values()) - min(top.values()) for top in logprobs["top_logprobs"][token - 1 : token + 1]]
    found = with_client(address, lambda client: serving.gap_where_they_part(client, ASKED, other))
    assert found == pytest.approx(min(gaps))
    assert with_client(address, lambda client: serving.gap_where_they_part(client, ASKED, text)) is None


def stream_of(*chunks):
    lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
    return httpx.MockTransport(lambda request: httpx.Response(200, text="".join([*lines, "data: [DONE]\n\n"])))


def test_chunks_of_two_answers_a_missing_end_and_no_server_are_lost_answers():
    def chunk(identity, reason=None, **more):
        return {"id": identity, "model": "robot", "choices": [{"text": "a", "finish_reason": reason}], **more}

    end = {"id": "1", "model": "robot", "choices": [], "usage": {"completion_tokens": 2}, "shadow": {}}
    for chunks, is_lost in (
        ([chunk("1"), chunk("1", "stop"), end], False),
        ([chunk("2"), chunk("1", "stop"), end], True),
        ([chunk("1"), end], True),
        ([chunk("1"), {"error": {"message": "too late"}}], True),
    ):

        async def run(chunks=chunks):
            async with httpx.AsyncClient(base_url="http://server", transport=stream_of(*chunks)) as client:
                return await serving.ask_streaming(client, ASKED)

        assert isinstance(asyncio.run(run()), serving.Lost) == is_lost
    nobody = f"http://127.0.0.1:{free_port()}"
    assert isinstance(with_client(nobody, lambda client: serving.ask(client, ASKED)), serving.Lost)
