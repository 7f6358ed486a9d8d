"""Servers as processes of their own on this machine."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

import httpx

from shadowpeft.errors import ShadowPeftError

HOST = "127.0.0.1"
_PROGRAM = "from shadowpeft.cli import main; main()"


class ProcessError(ShadowPeftError):
    """A server that did not start, or died."""


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        return listener.getsockname()[1]


class ServerProcess:
    """``shadowpeft VERB ... --port PORT`` in a process of its own, on this machine only.

    Args:
        arguments: of the command line, without the port.
        port: None for a free one.
    """

    def __init__(self, arguments: Sequence[str], *, port: int | None = None) -> None:
        self.arguments, self.port = list(arguments), port or free_port()
        self.url = f"http://{HOST}:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process; close() ends it

    def start(self, timeout: float = 300.0) -> None:
        """Starts it and waits until it is healthy.

        Raises:
            ProcessError: it ended, or is not healthy in time; with the last line it printed.
        """
        command = [sys.executable, "-c", _PROGRAM, *self.arguments, "--host", HOST, "--port", str(self.port)]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        self._process = subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT, env=environment)
        deadline = time.monotonic() + timeout
        while not self._is_healthy():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                said = self.last_line()
                self.close()
                raise ProcessError(f"`shadowpeft {' '.join(self.arguments)}` did not start: {said}")
            time.sleep(0.1)

    def _is_healthy(self) -> bool:
        try:
            return httpx.get(f"{self.url}/healthz", timeout=2, trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    def stop(self, timeout: float = 60.0) -> int:
        """Asks it to finish what runs and end; its exit status."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            return -signal.SIGKILL

    def kill(self) -> None:
        """Ends it at once, as a crash would."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Lets go of what it printed."""
        self._log.close()

    def last_line(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it printed nothing"


@contextlib.contextmanager
def running_server(arguments: Sequence[str]) -> Iterator[ServerProcess]:
    server = ServerProcess(arguments)
    server.start()
    try:
        yield server
    finally:
        server.stop()
        server.close()
