"""Applications on a real socket of this machine, for tests with real clients, and what such tests wait for."""

import socket
import threading
import time
from contextlib import contextmanager

import uvicorn

from shadowpeft.deploy.serve import batch, speculation
from shadowpeft.deploy.serve.run import http_protocol


def free_port() -> int:
    """A port that nobody listens on, for tests of just that; a server binds its own, see :func:`running`."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def running(app, send_seconds=300.0):
    """``http://127.0.0.1:PORT`` of a server in a thread. It is handed a bound socket: no other process can be quicker."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none", http=http_protocol(send_seconds)))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(120)


def wait_until(is_so, seconds=120):
    """Returns when ``is_so()``, however slow this machine is; fails where it never comes."""
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "what the test waits for did not come"
        time.sleep(0.005)


@contextmanager
def held_steps(monkeypatch):
    """Within the block no step of a batch is taken until the function it yields is called: prompts are read, and then
    answers stand still, so that a test says what happens in their middle instead of hoping to be quick enough."""
    gate = threading.Event()

    def held(step):
        def wait(*arguments):
            gate.wait(120)
            return step(*arguments)

        return wait

    for module in (batch, speculation):
        monkeypatch.setattr(module, "step", held(module.step))
    try:
        yield gate.set
    finally:
        gate.set()
