"""The edge in front of clouds that answer, refuse, lie, stall and die."""

import asyncio
import contextlib
import json
import socket
import threading

import httpx
import openai
import pytest
import torch

from deploy.running import free_port, running
from deploy.tiny import byte_tokenizer, shadow_model
from shadowpeft.deploy.route.artefact import Router
from shadowpeft.deploy.route.breaker import CircuitBreaker
from shadowpeft.deploy.route.calibrate import observe, skills_of
from shadowpeft.deploy.route.calibration import Temperature
from shadowpeft.deploy.route.cloud import Cloud, CloudError, CloudSettings
from shadowpeft.deploy.route.operating import ALL_TO_CLOUD, Example, OperatingPoint
from shadowpeft.deploy.route.scores import SCORES
from shadowpeft.deploy.route.service import EdgeService
from shadowpeft.deploy.serve.app import create_app
from shadowpeft.deploy.serve.catalogue import catalogue
from shadowpeft.deploy.serve.loading import Loaded
from shadowpeft.deploy.serve.metrics import Metrics
from shadowpeft.deploy.serve.protocol import ChatRequest, parse
from shadowpeft.deploy.serve.service import LocalService, Settings
from shadowpeft.deploy.server_commands import edge_service
from shadowpeft.errors import ConfigError
from shadowpeft.train.tasks import TASKS

MODEL, TOKENIZER = shadow_model(), byte_tokenizer()
DETACHED = MODEL.detach("robot")
ASKED = {"model": "edge", "messages": [{"role": "user", "content": "Sit"}], "max_tokens": 8}
EXAMPLES = tuple(
    Example(scores=dict.fromkeys(SCORES, -0.5 * i), edge=float(i % 2), cloud=1.0, reason=None, is_out_of_scope=False)
    for i in range(6)
)


def router(threshold=0.5, skills=None):
    point = OperatingPoint(
        threshold=threshold,
        cloud_share=0.5,
        cloud_share_interval=(0.4, 0.6),
        normal_cloud_share=None,
        accuracy=0.9,
        accuracy_interval=(0.8, 1.0),
    )
    return Router(
        score="min_logprob",
        calibration=Temperature(temperature=1.0),
        skills=skills,
        task=None,
        point=point,
        examples=EXAMPLES,
        report={},
    )


@contextlib.contextmanager
def edge(
    url=None, threshold=ALL_TO_CLOUD, skills=None, never=False, cloud_model="robot", max_new_tokens=256, task=None, **options
):
    own = Settings(temperature=0.0, max_new_tokens=max_new_tokens, task=task)
    local = edge_service(Loaded(model=DETACHED, tokenizer=TOKENIZER, adapters=[]), own)
    settings = {"model": cloud_model, "total_seconds": 120.0, "max_attempts": 2, "first_pause": 0.01} | options
    breaker = CircuitBreaker(max_failures=settings.pop("max_failures", 50), open_seconds=60)
    cloud = None
    if url is not None:
        cloud = Cloud(CloudSettings(url=url, **settings), local.metrics, breaker=breaker)
    service = EdgeService(local, router(threshold, skills), cloud, never_escalate=never)
    with running(create_app(service)) as address:
        yield address, service


def receive_request(connection):
    """Reads a request to its end: closing a connection with bytes unread would reset it, reply and all."""
    with connection.makefile("rb") as lines:
        head = list(iter(lines.readline, b"\r\n"))
        length = next(int(line.partition(b":")[2]) for line in head if line.lower().startswith(b"content-length:"))
        lines.read(length)


@contextlib.contextmanager
def scripted(*replies):
    """A cloud that gives raw HTTP replies in turn (the last for ever); ``None`` closes, a number waits."""
    taken, stop = [], threading.Event()

    def answer(listener):
        while not stop.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                receive_request(connection)
                reply = replies[min(len(taken), len(replies) - 1)]
                taken.append(reply)
                if isinstance(reply, float):
                    stop.wait(reply)
                elif reply is not None:
                    connection.sendall(reply)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer, args=(listener,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", taken
        stop.set()
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(5)


def http(body, status=200):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%s" % (
        status,
        len(data),
        data,
    )


def said(text):
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return http({"choices": [choice], "usage": {"completion_tokens": 3, "prompt_tokens": 4, "total_tokens": 7}})


# What a cloud may say in JSON and nobody can pass on: half a character.
SIT_IN_HALVES = {
    "choices": [{"message": {"content": "sit()\ud800"}, "finish_reason": "stop"}],
    "usage": {"completion_tokens": 3},
}


def ask(address, **changes):
    answer = httpx.post(f"{address}/v1/chat/completions", json=ASKED | changes, timeout=150)
    assert answer.status_code == 200, answer.text
    return answer.json()


def text_of(answer):
    return answer["choices"][0]["message"]["content"]


@pytest.fixture(scope="module")
def edge_text():
    with edge(threshold=0.0) as (address, _):
        return text_of(ask(address))


def test_a_confident_answer_stays_on_the_edge_and_says_how_sure_it_is():
    with scripted(said("never")) as (url, taken), edge(url, threshold=0.0) as (address, service):
        answer = ask(address)
        assert answer["shadow"]["answered_by"] == "edge" and answer["shadow"]["reason"] == "confident"
        assert 0 < answer["shadow"]["confidence"] <= 1 and not answer["shadow"]["degraded"]
        assert not taken and service.metrics.value("routed_total", answered_by="edge", reason="confident") == 1


def test_an_unsure_answer_comes_from_a_real_cloud_batched_with_others():
    server = LocalService(MODEL, TOKENIZER, catalogue(MODEL.networks), Settings(temperature=0.0))
    with running(create_app(server)) as url, edge(url) as (address, service):
        direct = ask(url, model="robot")
        answer = ask(address)
        assert text_of(answer) == text_of(direct) and answer["usage"] == direct["usage"]
        assert answer["shadow"]["answered_by"] == "cloud" and answer["shadow"]["reason"] == "low_confidence"
        with openai.OpenAI(base_url=f"{address}/v1", api_key="x") as client:
            chunks = list(client.chat.completions.create(**ASKED, stream=True))
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert streamed == text_of(direct) and chunks[-1].shadow["answered_by"] == "cloud"
        assert service.describe()["seen"] == {"answers": 2, "cloud": 2, "degraded": 0, "escalated": 2}


def test_what_a_client_leaves_open_is_the_edges_to_say_not_the_clouds():
    """Else a cloud with defaults of its own would sample, and at another length, what the router was calibrated on greedily."""
    server = LocalService(MODEL, TOKENIZER, catalogue(MODEL.networks), Settings(temperature=2.0, max_new_tokens=3))
    asked = {"model": "edge", "messages": ASKED["messages"]}
    with running(create_app(server)) as url, edge(url, max_new_tokens=11) as (address, _):
        answer = httpx.post(f"{address}/v1/chat/completions", json=asked, timeout=150).json()
        greedy = ask(url, model="robot", temperature=0, max_tokens=11)
        assert answer["shadow"]["answered_by"] == "cloud"
        assert text_of(answer) == text_of(greedy) and answer["usage"] == greedy["usage"]


def test_an_address_or_key_that_the_cloud_does_not_know_opens_the_breaker():
    with scripted(http({"error": {}}, 401)) as (url, taken), edge(url, max_failures=2) as (address, _):
        kinds = [ask(address)["shadow"]["cloud_error"] for _ in range(3)]
        assert kinds == ["misconfigured", "misconfigured", "breaker_open"] and len(taken) == 2


def test_an_answer_that_cannot_be_carried_out_says_nothing_against_the_cloud():
    with scripted(said("I am no skill")) as (url, taken), edge(url, skills=("sit",), max_failures=2) as (address, service):
        assert [ask(address)["shadow"]["cloud_error"] for _ in range(4)] == ["unusable"] * 4
        assert len(taken) == 4 and not service.describe()["breaker_open"]


def test_several_choices_and_logprobs_are_answered_by_the_device_alone():
    with scripted(said("never")) as (url, taken), edge(url) as (address, _):
        answer = ask(address, model="edge:local", n=2, logprobs=True, top_logprobs=1)
        assert len(answer["choices"]) == 2 and answer["shadow"]["answered_by"] == "edge" and not taken
        for choice in answer["choices"]:
            assert choice["logprobs"]["content"] and "confidence" not in answer["shadow"]


def test_drafts_of_a_speculating_cloud_are_passed_on():
    server = LocalService(MODEL, TOKENIZER, catalogue(MODEL.networks), Settings(temperature=0.0))
    with running(create_app(server)) as url, edge(url, cloud_model="robot:speculative") as (address, _):
        answer, direct = ask(address), ask(url, model="robot:speculative")
        assert text_of(answer) == text_of(direct) and answer["usage"] == direct["usage"]
        assert answer["shadow"]["drafted"] == direct["shadow"]["drafted"] > 0
        assert answer["shadow"]["accepted"] == direct["shadow"]["accepted"]


@pytest.mark.parametrize("details", [None, [], {}, {"accepted_prediction_tokens": "many"}])
def test_odd_counts_of_drafts_do_no_harm(details):
    choice = {"index": 0, "message": {"role": "assistant", "content": "sit()"}, "finish_reason": "stop"}
    usage = {"completion_tokens": 3, "completion_tokens_details": details}
    with scripted(http({"choices": [choice], "usage": usage})) as (url, _), edge(url) as (address, _):
        answer = ask(address)
        assert text_of(answer) == "sit()" and "drafted" not in answer["shadow"]


def test_what_is_no_skill_goes_to_the_cloud_however_sure_the_edge_is():
    with scripted(said("sit()")) as (url, _), edge(url, threshold=0.0, skills=("sit",)) as (address, _):
        answer = ask(address)
        assert text_of(answer) == "sit()" and answer["shadow"]["reason"] == "no_call"


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (None, "down"),
        (120.0, "late"),
        (http({"error": {}}, 500), "failed"),
        (http({"error": {}}, 429), "busy"),
        (http({"error": {}}, 400), "refused"),
        (http({"error": {}}, 401), "misconfigured"),
        (http({"error": {}}, 404), "misconfigured"),
        (http(b"\xff\x00 rubbish"), "wrong"),
        (http({"choices": []}), "wrong"),
        (http([1]), "wrong"),
        (said("I am no skill"), "unusable"),
        (said("sit()").replace(b'"completion_tokens": 3', b'"completion_tokens":-3'), "wrong"),
        (http(b"[" * 100_000), "wrong"),
        (http(json.dumps(SIT_IN_HALVES).encode()), "wrong"),
        (said("sit()").replace(b"\r\n\r\n", b"\r\ncontent-encoding: gzip\r\n\r\n"), "wrong"),
        (b"\x00\x01\x02 no http at all", "down"),
    ],
)
def test_a_cloud_that_is_down_slow_or_wrong_leaves_the_edge_answer_flagged(reply, kind, edge_text):
    options = {"total_seconds": 1.0} if kind == "late" else {}
    with scripted(reply) as (url, taken), edge(url, skills=("sit",), **options) as (address, service):
        answer = ask(address)
        assert text_of(answer) == edge_text
        assert answer["shadow"]["degraded"] and answer["shadow"]["answered_by"] == "edge"
        assert answer["shadow"]["cloud_error"] == kind
        attempts = 1 if kind in ("refused", "misconfigured", "unusable", "late") else 2
        assert len(taken) == attempts or kind == "late"  # the edge may hang up before its connection is taken up here
        assert service.metrics.value("cloud_attempts_total", outcome=kind) == attempts
        assert service.metrics.value("degraded_total") == 1
        assert service.describe()["seen"]["escalated"] == 1


def test_a_cloud_that_recovers_between_attempts_is_used():
    with scripted(None, said("sit()")) as (url, _), edge(url) as (address, service):
        answer = ask(address)
        assert text_of(answer) == "sit()" and answer["shadow"]["attempts"] == 2 and not answer["shadow"]["degraded"]
        assert service.metrics.value("cloud_attempts_total", outcome="answered") == 1


def test_an_open_breaker_answers_at_once_without_asking():
    with edge(f"http://127.0.0.1:{free_port()}", max_failures=3) as (address, service):
        kinds = [ask(address)["shadow"]["cloud_error"] for _ in range(4)]
        assert kinds == ["down", "breaker_open", "breaker_open", "breaker_open"]
        assert service.metrics.value("cloud_attempts_total", outcome="down") == 3
        assert service.metrics.value("breaker_open") == 1 and service.describe()["breaker_open"]


def test_nothing_leaves_the_device_under_the_privacy_switch(edge_text):
    with scripted(said("never")) as (url, taken), edge(url, never=True) as (address, _):
        answer = ask(address)
        assert text_of(answer) == edge_text and answer["shadow"]["kept_private"] and not answer["shadow"]["degraded"]
        assert not taken
    with scripted(said("never")) as (url, taken), edge(url) as (address, _):
        assert text_of(ask(address, model="edge:local")) == edge_text and not taken


def test_counters_are_exact_under_load():
    replies = [said("sit()"), None] * 40
    with scripted(*replies) as (url, _), edge(url, max_attempts=1) as (address, service):
        answers = []
        threads = [threading.Thread(target=lambda: answers.append(ask(address))) for _ in range(24)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        degraded = sum(answer["shadow"]["degraded"] for answer in answers)
        assert len(answers) == 24 and len({answer["id"] for answer in answers}) == 24 and 0 < degraded < 24
        seen = service.describe()["seen"]
        assert seen == {"answers": 24, "cloud": 24 - degraded, "edge": degraded, "degraded": degraded, "escalated": 24}
        attempts = [service.metrics.value("cloud_attempts_total", outcome=kind) for kind in ("answered", "down")]
        assert attempts == [24 - degraded, degraded] and service.metrics.value("degraded_total") == degraded


@pytest.mark.parametrize("changes", [{"n": 2}, {"logprobs": True}, {"model": "robot"}])
def test_what_a_router_cannot_do_is_refused(changes):
    with edge(threshold=0.0) as (address, _):
        answer = httpx.post(f"{address}/v1/chat/completions", json=ASKED | changes)
        assert answer.status_code in (400, 404) and answer.json()["error"]["message"]


def test_pauses_between_attempts_grow_and_end_with_the_time():
    pauses = []

    async def sleep(seconds):
        pauses.append(seconds)

    async def run():
        settings = CloudSettings(url="http://127.0.0.1:1", model="m", max_attempts=5, first_pause=0.1, max_pause=0.5)
        transport = httpx.MockTransport(lambda request: httpx.Response(503))
        cloud = Cloud(settings, Metrics(), transport=transport, sleep=sleep)
        with pytest.raises(CloudError, match="status 503"):
            await cloud.ask(parse(ChatRequest, json.dumps(ASKED).encode()), lambda text: True)
        await cloud.close()

    asyncio.run(run())
    assert len(pauses) == 4
    for pause, longest in zip(pauses, (0.1, 0.2, 0.4, 0.5), strict=True):
        assert longest / 2 <= pause <= longest


def test_a_task_of_several_texts_is_answered_by_ready_made_prompts_alone():
    with edge(task=TASKS["squad_v2"], never=True, threshold=0.0) as (address, _), httpx.Client(base_url=address) as client:
        refused = client.post("/v1/chat/completions", json=ASKED)
        assert refused.status_code == 400 and "/v1/completions" in refused.json()["error"]["message"]
        prompt = TASKS["squad_v2"].prompt({"context": "Up.", "question": "Where?"})
        answered = client.post("/v1/completions", json={"model": "edge", "prompt": prompt, "max_tokens": 3})
        assert answered.status_code == 200 and answered.json()["usage"]["completion_tokens"] == 3


def test_rows_of_a_task_that_scores_them_only_together_are_not_observed():
    with pytest.raises(ConfigError, match=r"slot_f1.*no row right or wrong"):
        observe(MODEL, TOKENIZER, TASKS["snips"], [{"text": "go"}], adapter="robot", skills=None)


def test_both_sides_are_observed_with_the_tokens_that_generate_gives():
    rows = [{"text": f"go {i}", "intent": "sit" if i else "[REMOTE]"} for i in range(5)]
    task = TASKS["robot"]
    skills = skills_of(task, rows)
    assert skills == ("sit",)
    observed = observe(MODEL, TOKENIZER, task, rows, adapter="robot", skills=skills, batch_size=2)
    assert [example.is_out_of_scope for example in observed.examples] == [True, *[False] * 4]
    ids = torch.tensor([[1, *TOKENIZER(task.prompt(rows[3]))["input_ids"]]])
    first = DETACHED(ids).logits[0, -1].log_softmax(-1).max()
    assert observed.examples[3].scores["first_logprob"] == pytest.approx(float(first))
    assert set(observed.cloud_auroc_in_scope()) == set(SCORES)
