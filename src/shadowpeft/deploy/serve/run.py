"""Running an application until it is told to stop."""

import socket

import uvicorn
from fastapi import FastAPI

from shadowpeft.errors import ConfigError


def run_app(app: FastAPI, *, host: str, port: int, grace_seconds: int) -> None:
    """Serves until SIGTERM or Ctrl-C; then takes no new connection, finishes running requests and returns.

    Args:
        grace_seconds: requests that still run after so long are cut off.

    Raises:
        ConfigError: the address cannot be used.
    """
    check_free(host, port)
    config = uvicorn.Config(
        app, host=host, port=port, log_level="warning", timeout_keep_alive=30, timeout_graceful_shutdown=grace_seconds
    )
    uvicorn.Server(config).run()


def check_free(host: str, port: int) -> None:
    """Refuses an address before a model is loaded for it."""
    if not 0 < port < 65536:
        raise ConfigError(f"port={port} is not valid: expected 1 to 65535")
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from error
