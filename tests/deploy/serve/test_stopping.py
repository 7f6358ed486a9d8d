"""SIGTERM at real processes: what runs is finished, the last line is printed, and the exit status is 0."""

import contextlib
import threading

import httpx
import pytest

from deploy.route.test_edge import router
from deploy.running import wait_until
from deploy.tiny import byte_tokenizer, shadow_model
from shadowpeft.deploy.route.artefact import save_router
from shadowpeft.deploy.system_eval import processes
from shadowpeft.deploy.system_eval.processes import ServerProcess

# The command line, with steps that are not taken before there is a file: an answer in the making stands still until then.
HELD = """
import pathlib, time
from shadowpeft.deploy.serve import batch
step, gate = batch.step, pathlib.Path({gate!r})
def held(*arguments):
    while not gate.exists():
        time.sleep(0.01)
    return step(*arguments)
batch.step = held
from shadowpeft.cli import main
main()
"""
ASKED = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 200, "temperature": 0}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a base, an adapter and a router."""
    folder = tmp_path_factory.mktemp("stopping")
    model = shadow_model(adapters=("robot",))
    # Greedy answers then never hold the end token, whose logit of 0 is never the largest, and run for long enough.
    model.base.lm_head.weight.data[2] = 0
    model.base.save_pretrained(folder / "base")
    model.base.name_or_path = str(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    model.save_pretrained(folder / "adapter")
    save_router(router(0.0), folder / "router.json")
    return folder


def is_decoding(url):
    return "shadowpeft_batch_rows_count 0.0" not in httpx.get(f"{url}/metrics", timeout=120, trust_env=False).text


@pytest.mark.parametrize(("verb", "model"), [("serve", "robot"), ("edge", "edge")])
def test_sigterm_finishes_what_runs_and_ends_with_status_0(saved, verb, model, tmp_path, monkeypatch):
    gate = tmp_path / "gate"
    monkeypatch.setattr(processes, "_PROGRAM", HELD.format(gate=str(gate)))
    more = {"serve": [], "edge": ["--never-escalate", "--router", str(saved / "router.json")]}[verb]
    place = {"serve": f"robot={saved / 'adapter'}", "edge": str(saved / "adapter")}[verb]
    server, got = ServerProcess([verb, place, *more]), []

    def ask():
        got.append(httpx.post(f"{server.url}/v1/chat/completions", json=ASKED | {"model": model}, timeout=240, trust_env=False))

    server.start()
    try:
        asking = threading.Thread(target=ask)
        asking.start()
        wait_until(lambda: is_decoding(server.url))
        assert not got
        threading.Timer(0.5, gate.touch).start()  # behind the signal, which the next line sends at once
        status = server.stop(240)
        asking.join()
        assert (status, server.last_line()) == (0, "stopped; every request was answered")
    finally:
        server.kill()
        server.close()
    assert got[0].status_code == 200
    assert got[0].json()["usage"]["completion_tokens"] == ASKED["max_tokens"]


def test_requests_that_outlast_the_grace_are_cut_and_not_called_answered(saved, tmp_path, monkeypatch):
    held = HELD.format(gate=str(tmp_path / "never"))
    shorter = "from shadowpeft.deploy import server_commands\nserver_commands._GRACE = 0\nfrom shadowpeft.cli import main"
    monkeypatch.setattr(processes, "_PROGRAM", held.replace("from shadowpeft.cli import main", shorter))
    server = ServerProcess(["serve", f"robot={saved / 'adapter'}", "--request-seconds", "1"])

    def ask():
        with contextlib.suppress(httpx.HTTPError):  # what the cut connection says is no matter here
            httpx.post(f"{server.url}/v1/chat/completions", json=ASKED | {"model": "robot"}, timeout=240, trust_env=False)

    server.start()
    try:
        asking = threading.Thread(target=ask)
        asking.start()
        wait_until(lambda: is_decoding(server.url))
        status = server.stop(240)
        asking.join()
        assert (status, server.last_line()) == (0, "stopped; requests under way were cut off")
    finally:
        server.kill()
        server.close()
