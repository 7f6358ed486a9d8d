"""Running an application until it is told to stop."""

import asyncio
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from shadowpeft.errors import ConfigError


def run_app(app: FastAPI, *, host: str, port: int, grace_seconds: int, send_seconds: float) -> bool:
    """Serves until SIGTERM or Ctrl-C; then takes no new connection, finishes running requests and returns.

    To be called in the main thread, the only one that signals reach.

    Args:
        grace_seconds: requests that still run after so long are cut off.
        send_seconds: a client that does not take what it is sent within so long is cut off.

    Returns:
        Whether every running request was answered; none is waited for after a second Ctrl-C, nor past the grace.

    Raises:
        ConfigError: the address cannot be used.
    """
    check_free(host, port)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=http_protocol(send_seconds),
        log_level="warning",
        timeout_keep_alive=30,
        timeout_graceful_shutdown=grace_seconds,
    )
    server = uvicorn.Server(config)
    with _signals_end_only(server):
        server.run()
    return not server.force_exit and not app.state.num_cut


def http_protocol(send_seconds: float) -> type[asyncio.Protocol]:
    """uvicorn's HTTP, which by itself waits for ever for a client that has stopped reading.

    To the routes, a client that is cut off is one that left.
    """
    uvicorns: Any = AutoHTTPProtocol

    class CutsOff(uvicorns):
        _patience: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            # Paused as long as anything waits for the client, and not only once much does.
            transport.set_write_buffer_limits(high=0)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._patience = self.loop.call_later(send_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._stop_waiting()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._stop_waiting()

        def _stop_waiting(self) -> None:
            if self._patience is not None:
                self._patience.cancel()

    return CutsOff


@contextmanager
def _signals_end_only(server: uvicorn.Server) -> Iterator[None]:
    """uvicorn raises a signal again when it has shut down; without this that would kill the process, status and all."""

    def stop(number: int, frame: object) -> None:
        server.should_exit = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_free(host: str, port: int) -> None:
    """Refuses an address before a model is loaded for it."""
    if not 0 < port < 65536:
        raise ConfigError(f"port={port} is not valid: expected 1 to 65535")
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            pass
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from error
