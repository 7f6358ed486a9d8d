"""The server as clients see it: the official client, raw sockets, and everything that a client can do wrong."""

import asyncio
import json
import socket
import threading
from typing import Any
from unittest.mock import Mock

import httpx
import openai
import pytest
import torch
import uvicorn
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoModelForCausalLM, BloomConfig
from typer.testing import CliRunner
from uvicorn.server import ServerState

from deploy.running import free_port, held_steps, running, wait_until
from deploy.tiny import byte_tokenizer, shadow_model
from shadowpeft.cli import app
from shadowpeft.deploy.serve import prompts
from shadowpeft.deploy.serve.app import create_app
from shadowpeft.deploy.serve.catalogue import catalogue
from shadowpeft.deploy.serve.errors import ApiError
from shadowpeft.deploy.serve.loading import load_edge, load_served
from shadowpeft.deploy.serve.prompts import chat_ids
from shadowpeft.deploy.serve.protocol import ChatRequest, CompletionRequest, Message, parse
from shadowpeft.deploy.serve.replies import Replies
from shadowpeft.deploy.serve.run import check_free, http_protocol
from shadowpeft.deploy.serve.scheduler import Scheduler
from shadowpeft.deploy.serve.sequence import Piece
from shadowpeft.deploy.serve.service import LocalService, Settings
from shadowpeft.deploy.server_commands import _run
from shadowpeft.errors import ArchitectureError, ConfigError
from shadowpeft.train.data import token_ids
from shadowpeft.train.tasks import TASKS

TOKENIZER = byte_tokenizer()
MODEL = shadow_model()
MODEL.base.lm_head.weight.data[2] = 0  # the end token's logit, 0, is never the largest: greedy answers never end early
KEY = "a-key"


def local_service(**settings):
    options = {"max_new_tokens": 12, "temperature": 0.0} | settings
    return LocalService(MODEL, TOKENIZER, catalogue(MODEL.networks), Settings(**options))


@pytest.fixture(scope="module")
def service():
    return local_service()


@pytest.fixture(scope="module")
def address(service):
    with running(create_app(service, api_key=KEY, max_bytes=20_000)) as url:
        yield url


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0) as made:
        yield made


@pytest.fixture
def raw(address):
    with httpx.Client(base_url=address, headers={"authorization": f"Bearer {KEY}"}, timeout=30) as made:
        yield made


@torch.no_grad()
def expected_text(prompt, name="robot", length=12, **options):
    ids = torch.tensor([[1, *TOKENIZER(prompt)["input_ids"]]])
    new = []
    adapter, _, mode = name.partition(":")
    asked = MODEL.detach(adapter) if mode == "detached" else MODEL
    chosen = {} if mode == "detached" else {"adapter": "__base__" if name == "base" else adapter}
    while len(new) < length and (not new or new[-1] != 2):
        new.append(int(asked(ids, use_cache=False, **chosen).logits[0, -1].argmax()))
        ids = torch.cat([ids, torch.tensor([[new[-1]]])], 1)
    return TOKENIZER.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)


# ---------------------------------------------------------------- the official client


@pytest.mark.parametrize("name", ["robot", "home", "robot:attached", "robot:speculative", "home:detached", "base"])
def test_the_official_client_gets_the_greedy_answer_of_the_model_it_names(client, name):
    answer = client.completions.create(model=name, prompt="Sit down", max_tokens=12)
    assert answer.choices[0].text == expected_text("Sit down", name)
    assert answer.usage.prompt_tokens == 9 and answer.usage.total_tokens == 9 + answer.usage.completion_tokens
    assert answer.choices[0].finish_reason in ("stop", "length")


def test_a_stream_says_what_the_whole_answer_says(client):
    asked = {"model": "robot", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 15}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-2].shadow["answered_by"] == whole.shadow["answered_by"] == "server"


def test_a_chat_without_template_is_a_transcript(client):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    answer = client.chat.completions.create(model="base", messages=messages)
    said = expected_text("System: Be brief.\nUser: Hi\nAssistant:", "base")
    assert answer.choices[0].message.content == said.lstrip()


def test_models_are_listed_and_found(client):
    names = [model.id for model in client.models.list()]
    assert names[:2] == ["robot", "home"] and "home:speculative" in names and names[-1] == "base"
    assert client.models.retrieve("robot:detached").id == "robot:detached"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_logprobs_are_those_of_the_model(client):
    answer = client.chat.completions.create(
        model="robot", messages=[{"role": "user", "content": "x"}], logprobs=True, top_logprobs=3, max_tokens=4
    )
    first = answer.choices[0].logprobs.content[0]
    ids = torch.tensor([[1, *TOKENIZER("User: x\nAssistant:")["input_ids"]]])
    best = MODEL(ids, adapter="robot").logits[0, -1].log_softmax(-1).topk(3).values.tolist()
    assert [top.logprob for top in first.top_logprobs] == pytest.approx(best)
    assert first.logprob == pytest.approx(best[0]) and len(answer.choices[0].logprobs.content) == 4
    plain = client.completions.create(model="robot", prompt="x", logprobs=2, max_tokens=3)
    assert len(plain.choices[0].logprobs.token_logprobs) == 3
    assert all(len(top) <= 2 for top in plain.choices[0].logprobs.top_logprobs)


def test_a_seed_repeats_an_answer_and_choices_differ(client):
    asked = {"model": "home", "prompt": "Once", "temperature": 1.5, "top_p": 0.95, "max_tokens": 20}
    first = client.completions.create(**asked, seed=7, n=3)
    again = client.completions.create(**asked, seed=7, n=3)
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in again.choices] and len(set(texts)) == 3
    assert [choice.index for choice in first.choices] == [0, 1, 2]


def test_several_prompts_and_token_ids_are_answered_in_order(client):
    ids = [1, *TOKENIZER("two")["input_ids"]]
    texts = client.completions.create(model="robot", prompt=["one", "two"]).choices
    assert [choice.text for choice in texts] == [expected_text("one"), expected_text("two")]
    assert client.completions.create(model="robot", prompt=ids).choices[0].text == texts[1].text


def test_an_answer_ends_in_front_of_a_stop_sequence(client):
    whole = expected_text("Tell me", length=40)
    stop = whole[5:7]
    for stream in (False, True):
        got = client.completions.create(
            model="robot", prompt="Tell me", max_tokens=40, stop=[stop, "\0\0"], stream=stream
        )
        if stream:
            chunks = list(got)
            text, reason = "".join(c.choices[0].text for c in chunks), chunks[-1].choices[0].finish_reason
        else:
            text, reason = got.choices[0].text, got.choices[0].finish_reason
        assert text == whole[: whole.index(stop)] and reason == "stop"


def counted_submissions(monkeypatch):
    """A list that grows with every request that reaches a scheduler."""
    submitted, submit = [], Scheduler.submit

    def counting(scheduler, jobs, emits):
        rows = submit(scheduler, jobs, emits)
        submitted.append(rows)
        return rows

    monkeypatch.setattr(Scheduler, "submit", counting)
    return submitted


def test_answers_that_are_asked_for_together_are_decoded_together(service, client, monkeypatch):
    before = service.metrics.value("batch_rows_count")
    names, texts = ["robot", "home", "base", "home:detached", "home:speculative", "robot:speculative"], {}

    def ask(i):
        name, prompt = names[i % 6], f"number {i}"
        texts[i] = client.completions.create(model=name, prompt=prompt, max_tokens=30).choices[0].text

    submitted = counted_submissions(monkeypatch)
    threads = [threading.Thread(target=ask, args=(i,)) for i in range(12)]
    with held_steps(monkeypatch):
        for thread in threads:
            thread.start()
        wait_until(lambda: len(submitted) == 12)
    for thread in threads:
        thread.join()
    assert texts == {i: expected_text(f"number {i}", names[i % 6], 30) for i in range(12)}
    # One by one it were 12 x 29; the first row is a step ahead, and drafting rows are a batch of their own.
    assert service.metrics.value("batch_rows_count") - before <= 2 * (29 + 1)


# ---------------------------------------------------------------- what clients do wrong


CHAT = {"model": "robot", "messages": [{"role": "user", "content": "x"}]}
WRONG = {
    "not JSON": (b'{"model": ', 400),
    "binary rubbish": (bytes(range(256)), 400),
    "no object": (b"[1, 2]", 400),
    "nothing": (b"", 400),
    "deep nesting": (b'{"a":' * 3000, 400),
    "an unknown model": ({**CHAT, "model": "gpt"}, 404),
    "no messages": ({"model": "robot"}, 400),
    "empty messages": ({**CHAT, "messages": []}, 400),
    "negative max_tokens": ({**CHAT, "max_tokens": -1}, 400),
    "zero max_tokens": ({**CHAT, "max_tokens": 0}, 400),
    "max_tokens as text": ({**CHAT, "max_tokens": "many"}, 400),
    "more than fits": ({**CHAT, "max_tokens": 100_000}, 400),
    "a prompt over the context": ({**CHAT, "messages": [{"role": "user", "content": "x" * 300}]}, 400),
    "temperature": ({**CHAT, "temperature": 3}, 400),
    "temperature that is no number": (
        b'{"model":"robot","messages":[{"role":"user","content":"x"}],"temperature":NaN}',
        400,
    ),
    "a field nobody knows": ({**CHAT, "temprature": 1}, 400),
    "tools": ({**CHAT, "tools": [{"type": "function"}]}, 400),
    "half a character": (b'{"model":"robot","messages":[{"role":"user","content":"\\ud800"}]}', 400),
    "an empty stop": ({**CHAT, "stop": [""]}, 400),
    "too many choices": ({**CHAT, "n": 1000}, 400),
    "a body over the limit": ({**CHAT, "user": "x" * 30_000}, 413),
    "an image": ({**CHAT, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400),
}


@pytest.mark.parametrize("what", WRONG)
def test_bad_input_gets_a_status_and_openais_error_and_the_server_lives(raw, what):
    body, status = WRONG[what]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = raw.post("/v1/chat/completions", content=content)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["message"] and error["type"] and {"param", "code"} <= error.keys()
    assert raw.get("/healthz").json() == {"status": "ok"}


def test_prompts_are_tokenised_beside_the_event_loop(monkeypatch):
    service, gate = local_service(), threading.Event()

    def held(*arguments):
        assert gate.wait(10), "the event loop waits for the tokenizer"
        return token_ids(*arguments)

    async def ask():
        asking = asyncio.ensure_future(service.ask(parse(ChatRequest, json.dumps(CHAT).encode())))
        await asyncio.sleep(0)
        gate.set()
        answer = await asking
        await service.close()  # which writes into this loop
        return answer

    monkeypatch.setattr(prompts, "token_ids", held)
    answer = asyncio.run(ask())
    assert answer.num_prompt_tokens == len(chat_ids(TOKENIZER, parse(ChatRequest, json.dumps(CHAT).encode()).messages, None))


def test_a_stored_truncation_is_taken_off_before_several_threads_tokenise():
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(4)
    LocalService(MODEL, tokenizer, catalogue(MODEL.networks), Settings())
    assert tokenizer.backend_tokenizer.truncation is None


@pytest.mark.parametrize("template", [None, "{{ messages[0].content }}"])
def test_texts_that_are_certainly_too_long_are_refused_without_being_tokenised(service, monkeypatch, template):
    # The longest of this tokenizer's tokens is <pad>: 256 of it fit into the context.
    most = 5 * service.context
    for request, text in (
        (ChatRequest(model="robot", messages=[Message(role="user", content="x" * (most + 1))]), "messages"),
        (CompletionRequest(model="robot", prompt="x" * (most + 1)), "prompt"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(TOKENIZER, "chat_template", template)
            patch.setattr(prompts, "token_ids", Mock(side_effect=AssertionError("it was tokenised")))
            with pytest.raises(ApiError, match=rf"none of more than {most} fits") as refusal:
                asyncio.run(service.ask(request))
        assert refusal.value.status == 400 and refusal.value.code == "context_length_exceeded", text
    with pytest.raises(ApiError, match=f"the prompt has {most + 1} tokens"):
        asyncio.run(service.ask(CompletionRequest(model="robot", prompt="x" * most)))


def test_a_fault_of_the_servers_own_is_told_in_the_same_shape_and_counted(monkeypatch):
    service = local_service()

    async def broken(request):
        raise RuntimeError("a secret of the server")

    monkeypatch.setattr(service, "ask", broken)
    with running(create_app(service)) as url:
        answer = httpx.post(f"{url}/v1/chat/completions", json=CHAT, timeout=120)
        assert answer.status_code == 500 and "secret" not in answer.text
        assert answer.json()["error"] == {
            "message": "the server failed on this request; its log says why",
            "type": "server_error", "param": None, "code": "internal_error",
        }  # fmt: skip
        assert service.metrics.value("requests_total", route="/v1/chat/completions", status="500") == 1


@pytest.mark.parametrize("template", ["{{ raise_exception('turns must alternate') }}", "{{ messages[7].content }}"])
def test_messages_that_the_chat_template_refuses_are_the_clients_fault(template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ApiError, match="chat template refuses") as refusal:
        chat_ids(tokenizer, parse(ChatRequest, json.dumps(CHAT).encode()).messages, None)
    assert refusal.value.status == 400 and refusal.value.param == "messages"


ASKED = [Message(role="user", content="How high?")]


@pytest.mark.parametrize("name", sorted(name for name, task in TASKS.items() if task.kind == "generation"))
def test_a_message_takes_the_place_of_a_tasks_only_text_and_of_no_second_one(name):
    if name == "squad_v2":
        with pytest.raises(ApiError, match="'squad_v2' is made of context and question"):
            chat_ids(TOKENIZER, ASKED, TASKS[name])
    else:
        assert TOKENIZER.decode(chat_ids(TOKENIZER, ASKED, TASKS[name])).count("How high?") == 1


def test_serving_a_task_of_several_texts_is_refused_at_the_start():
    refused = CliRunner().invoke(app, ["serve", "--base", "no/base", "--task", "squad_v2", "--port", str(free_port())])
    assert isinstance(refused.exception, ConfigError)
    assert "made of context and question" in str(refused.exception) and "/v1/completions" in str(refused.exception)


@pytest.mark.parametrize("load", [lambda place: load_served([], base=place), load_edge], ids=["serve", "edge"])
def test_a_model_that_no_request_could_be_answered_with_is_refused_when_it_is_loaded(tmp_path, load):
    config = BloomConfig(vocab_size=9, hidden_size=8, n_layer=1, n_head=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ArchitectureError, match="model type 'bloom' is not supported"):
        load(str(tmp_path))


def test_a_token_id_outside_the_vocabulary_is_refused(raw):
    answer = raw.post("/v1/completions", json={"model": "robot", "prompt": [5, 259]})
    assert answer.status_code == 400 and "0 to 258" in answer.json()["error"]["message"]


def test_wrong_paths_and_methods_answer_in_the_same_shape(raw):
    assert raw.get("/v1/nothing").json()["error"]["type"] == "not_found_error"
    assert raw.get("/v1/completions").status_code == 405


def test_a_missing_or_wrong_key_is_refused_but_health_is_open(address):
    for headers in ({}, {"authorization": "Bearer other"}):
        answer = httpx.get(f"{address}/v1/models", headers=headers)
        assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
    assert httpx.get(f"{address}/healthz").status_code == 200


def test_a_client_that_sends_its_body_too_slowly_is_told_so():
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"
    # A server of its own: where bodies may take half a second, a busy machine would make other clients too slow.
    with running(create_app(local_service(), body_seconds=0.5)) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=120) as slow:
            slow.sendall(head)
            assert b" 408 " in slow.recv(1000).splitlines()[0]


def test_binary_rubbish_on_the_socket_does_no_harm(address, raw):
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=120) as rubbish:
        rubbish.sendall(bytes(range(256)) * 4)
        rubbish.recv(1000)
    assert raw.get("/healthz").status_code == 200


@pytest.mark.parametrize("name", ["robot", "robot:speculative"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place(service, address, stream, name, monkeypatch):
    # Greedy answers never hold the end token (see MODEL) and stand still until the server knows that the client left.
    left, cancel = threading.Event(), Scheduler.cancel
    monkeypatch.setattr(Scheduler, "cancel", lambda scheduler, rows: (cancel(scheduler, rows), left.set()))
    value = service.metrics.value
    before, rows = value("cancelled_total"), value("batch_rows_count")
    asked = {"model": name, "prompt": "x", "max_tokens": 250, "stream": stream, "temperature": 0}
    host, port = address.removeprefix("http://").split(":")
    body = json.dumps(asked)
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
    head += f"Authorization: Bearer {KEY}\r\nContent-Length: {len(body)}\r\n\r\n"
    with held_steps(monkeypatch):
        with socket.create_connection((host, int(port)), timeout=120) as leaving:
            leaving.sendall((head + body).encode())
            wait_until(lambda: value("batch_rows_count") > rows)
            assert value("cancelled_total") == before
            if stream:
                leaving.recv(100)
        wait_until(left.is_set)
    wait_until(lambda: value("cancelled_total") > before)
    assert value("cancelled_total") == before + 1 and value("batch_rows_count") == rows + 1


class Endless:
    """An answer that is longer than any buffer between the server and its client."""

    num_choices, num_prompt_tokens, model = 1, 1, "robot"

    def __init__(self):
        self.info, self.cancelled = {}, threading.Event()

    async def events(self):
        while True:
            await asyncio.sleep(0)
            yield 0, Piece(text="a" * 100_000)

    def cancel(self):
        self.cancelled.set()


def test_a_client_that_stops_reading_is_cut_off_and_frees_its_place(monkeypatch):
    service, answer = local_service(), Endless()

    async def ask(request):
        return answer

    monkeypatch.setattr(service, "ask", ask)
    with running(create_app(service), send_seconds=0.5) as url:
        host, port = url.removeprefix("http://").split(":")
        body = b'{"model": "robot", "prompt": "x", "stream": true}'
        with socket.create_connection((host, int(port)), timeout=120) as stalled:
            stalled.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
            assert stalled.recv(100).startswith(b"HTTP/1.1 200")
            assert answer.cancelled.wait(120)
            wait_until(lambda: service.metrics.value("request_seconds_count") == 1)


def test_a_client_that_reads_on_in_time_is_not_cut_off(service):
    async def run():
        transport = Mock(**{"get_extra_info.return_value": None})
        config = uvicorn.Config(create_app(service), log_level="error")
        settings = {"server_state": ServerState(), "app_state": {}, "_loop": asyncio.get_running_loop()}
        protocol: Any = http_protocol(0.01)(config=config, **settings)
        protocol.connection_made(transport)
        protocol.pause_writing()
        protocol.resume_writing()
        await asyncio.sleep(0.1)
        assert not transport.abort.called
        protocol.pause_writing()
        while not transport.abort.called:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(run(), 120))


def test_too_many_requests_are_refused_with_a_time_to_come_back(monkeypatch):
    crowded, asked, got = local_service(max_batch=1, max_waiting=1), {"model": "base", "prompt": "a"}, []
    submitted = counted_submissions(monkeypatch)
    with running(create_app(crowded)) as url:

        def ask():
            return httpx.post(f"{url}/v1/completions", json=asked, timeout=240)

        with held_steps(monkeypatch) as let_go:
            asking = [threading.Thread(target=lambda: got.append(ask().status_code)) for _ in range(2)]
            asking[0].start()
            wait_until(lambda: crowded.metrics.value("batch_rows_count") > 0)  # one is answered, and stands still
            asking[1].start()
            wait_until(lambda: len(submitted) == 2)  # one waits
            answer = ask()
            assert answer.status_code == 429 and answer.headers["retry-after"]
            assert answer.json()["error"]["type"] == "rate_limit_error"
            let_go()
            for thread in asking:
                thread.join()
        assert got == [200, 200] and ask().status_code == 200


def test_a_request_that_may_never_wait_is_not_told_to_come_back():
    with running(create_app(local_service(max_batch=1, max_waiting=4))) as url:
        answer = httpx.post(f"{url}/v1/completions", json={"model": "base", "prompt": ["a"] * 5}, timeout=120)
        assert answer.status_code == 400 and "at most 4" in answer.json()["error"]["message"]


def test_an_answer_that_takes_too_long_is_a_gateway_timeout():
    hasty = local_service(request_seconds=0.02)
    with running(create_app(hasty)) as url:
        asked = {"model": "robot", "prompt": "a", "max_tokens": 250, "temperature": 0}
        assert httpx.post(f"{url}/v1/completions", json=asked, timeout=30).status_code == 504


class FailsInTheMiddle:
    """An answer of two choices, the second of which the model fails on."""

    num_choices, num_prompt_tokens, model, info, is_cancelled = 2, 1, "robot", {}, False

    async def events(self):
        yield 0, Piece(text="a")
        raise ApiError("the model failed", status=500)

    def cancel(self):
        self.is_cancelled = True


def test_a_choice_that_fails_in_a_stream_gives_up_the_others():
    async def said(answer):
        request = parse(CompletionRequest, b'{"model": "robot", "prompt": "x", "n": 2, "stream": true}')
        return [event async for event in Replies(request, answer, TOKENIZER).stream()]

    answer = FailsInTheMiddle()
    events = asyncio.run(said(answer))
    assert len(events) == 2 and b"the model failed" in events[-1]
    assert answer.is_cancelled


def test_going_down_finishes_the_answers_that_run(monkeypatch):
    leaving = local_service()
    submitted, got = counted_submissions(monkeypatch), []
    asked = {"model": "robot", "prompt": "a", "max_tokens": 200, "temperature": 0}
    with held_steps(monkeypatch) as let_go:
        with running(create_app(leaving)) as url:
            threads = [
                threading.Thread(target=lambda: got.append(httpx.post(f"{url}/v1/completions", json=asked, timeout=120)))
                for _ in range(3)
            ]
            for thread in threads:
                thread.start()
            wait_until(lambda: len(submitted) == 3)
            assert not got
            # Not before the server was told to go down, which happens at the end of this block.
            threading.Timer(0.5, let_go).start()
        for thread in threads:
            thread.join()
    assert [answer.status_code for answer in got] == [200] * 3
    assert {answer.json()["usage"]["completion_tokens"] for answer in got} == {200}
    assert leaving.health() is not None


# ---------------------------------------------------------------- drafts


def test_speculative_answers_are_the_attached_ones_and_say_how_the_drafts_fared(client, service):
    before = [service.metrics.value(f"{name}_tokens_total") for name in ("drafted", "accepted")]
    answer = client.completions.create(model="home:speculative", prompt="Sit down", max_tokens=20, logprobs=1)
    assert answer.choices[0].text == expected_text("Sit down", "home", 20)
    assert len(answer.choices[0].logprobs.tokens) == answer.usage.completion_tokens
    drafted, accepted = answer.shadow["drafted"], answer.shadow["accepted"]
    assert answer.shadow["mode"] == "speculative" and drafted > 0
    details = answer.usage.completion_tokens_details
    assert details.accepted_prediction_tokens == accepted and details.rejected_prediction_tokens == drafted - accepted
    after = [service.metrics.value(f"{name}_tokens_total") for name in ("drafted", "accepted")]
    assert [new - old for new, old in zip(after, before, strict=True)] == [drafted, accepted]


def test_the_last_event_of_a_speculative_stream_counts_the_drafts_of_all_choices(client):
    asked = {"model": "robot:speculative", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 15, "n": 2}
    asked |= {"temperature": 0.7, "seed": 3}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    for choice in whole.choices:
        pieces = [c.choices[0].delta.content or "" for c in chunks if c.choices and c.choices[0].index == choice.index]
        assert "".join(pieces) == choice.message.content
    assert chunks[-1].usage == whole.usage
    last = [chunk for chunk in chunks if chunk.choices][-1]
    assert (last.shadow["drafted"], last.shadow["accepted"]) == (whole.shadow["drafted"], whole.shadow["accepted"])


def test_a_speculative_answer_ends_in_front_of_a_stop_sequence(client):
    whole = expected_text("Tell me", length=40)
    answer = client.completions.create(model="robot:speculative", prompt="Tell me", max_tokens=40, stop=whole[5:7])
    assert answer.choices[0].text == whole[: whole.index(whole[5:7])] and answer.choices[0].finish_reason == "stop"


def test_a_plain_answer_says_nothing_of_drafts(raw):
    answer = raw.post("/v1/chat/completions", json={**CHAT, "max_tokens": 4}).json()
    assert "drafted" not in answer["shadow"] and "completion_tokens_details" not in answer["usage"]


# ---------------------------------------------------------------- what operators see


def test_metrics_are_prometheus_text_and_count_exactly(raw, service):
    names = {"prompt": service.metrics.value("prompt_tokens_total", model="home")}
    names["new"] = service.metrics.value("new_tokens_total", model="home")
    usage = raw.post("/v1/completions", json={"model": "home", "prompt": "abc", "max_tokens": 5}).json()["usage"]
    text = raw.get("/metrics").text
    families = {family.name for family in text_string_to_metric_families(text)}
    assert {"shadowpeft_requests", "shadowpeft_running_rows", "shadowpeft_request_seconds"} <= families
    assert service.metrics.value("prompt_tokens_total", model="home") == names["prompt"] + usage["prompt_tokens"]
    assert service.metrics.value("new_tokens_total", model="home") == names["new"] + usage["completion_tokens"]
    missing = {"route": "/v1/chat/completions", "status": "404"}
    before = service.metrics.value("requests_total", **missing)
    assert raw.post("/v1/chat/completions", json={**CHAT, "model": "gpt"}).status_code == 404
    wait_until(lambda: service.metrics.value("requests_total", **missing) == before + 1)


def test_the_page_is_served_without_a_key(address):
    page = httpx.get(address)
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_an_ipv6_address_is_served(monkeypatch):
    said, port = [], free_port()
    check_free("::1", port)
    monkeypatch.setattr("shadowpeft.deploy.server_commands.run_app", lambda *args, **options: True)
    console = Mock(print=lambda text, **options: said.append(text))
    _run(Mock(model_names=lambda: ["base"]), console, "::1", port, None, 1, 1.0)
    assert said[0] == f"serving base at http://[::1]:{port}"
    with socket.create_server(("::1", port), family=socket.AF_INET6), pytest.raises(ConfigError, match=f"::1:{port}"):
        check_free("::1", port)
