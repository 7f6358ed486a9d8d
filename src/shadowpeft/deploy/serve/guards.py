"""What every request passes before a route sees it: size, patience, key, counters."""

import asyncio
import hmac
import json
import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shadowpeft.deploy.serve.errors import ApiError
from shadowpeft.deploy.serve.metrics import Metrics


class Guards:
    """An ASGI layer that reads the whole body within limits, checks the key and counts.

    Args:
        app: the routes.
        metrics: counts requests by route and status.
        api_key: asked of every path below ``/v1``; None: no key.
        max_bytes: of a body.
        body_seconds: a client has so long to send its body.
    """

    def __init__(
        self, app: ASGIApp, *, metrics: Metrics, api_key: str | None, max_bytes: int, body_seconds: float
    ) -> None:
        self.app, self.metrics = app, metrics
        self.api_key, self.max_bytes, self.body_seconds = api_key, max_bytes, body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.monotonic(), 499  # as nginx counts a client that left before an answer

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        is_fault = True
        try:
            self._check_key(scope)
            body = await self._read(scope, receive)
            if body is not None:
                await self.app(scope, _replay(body, receive), watched)
            is_fault = False
        except ApiError as error:
            is_fault = False
            await _send_error(watched, error)
        except asyncio.CancelledError:  # only the end of the server cancels a request
            is_fault = False
            scope["app"].state.num_cut += 1
            raise
        finally:
            if is_fault and status == 499:
                status = 500  # sent by whoever is around this layer
            route = route.path if (route := scope.get("route")) is not None else "other"
            self.metrics.requests.labels(route=route, status=str(status)).inc()
            self.metrics.request_seconds.observe(time.monotonic() - started)

    def _check_key(self, scope: Scope) -> None:
        if self.api_key is None or not scope["path"].startswith("/v1"):
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        if not hmac.compare_digest(given, f"Bearer {self.api_key}".encode()):
            raise ApiError("a valid key is needed: Authorization: Bearer KEY", status=401, code="invalid_api_key")

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body; None if the client left."""
        try:
            declared = int(dict(scope["headers"]).get(b"content-length", b"0"))
        except ValueError:
            raise ApiError("the Content-Length is no number") from None
        if declared > self.max_bytes:
            raise self._too_large()
        try:
            return await asyncio.wait_for(self._read_all(receive), self.body_seconds)
        except asyncio.TimeoutError:
            raise ApiError("the body came too slowly", status=408, code="timeout") from None

    async def _read_all(self, receive: Receive) -> bytes | None:
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            more = message.get("more_body", False)
            if size > self.max_bytes:
                raise self._too_large()
        return b"".join(parts)

    def _too_large(self) -> ApiError:
        return ApiError(f"the body is larger than {self.max_bytes} bytes", status=413, code="request_too_large")


def _replay(body: bytes, receive: Receive) -> Receive:
    """Gives the body that was read, then whatever the client does next (it can only leave)."""
    is_given = False

    async def again() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def _send_error(send: Send, error: ApiError) -> None:
    body = json.dumps(error.body()).encode()
    headers: list[Any] = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers.append((b"connection", b"close"))  # the rest of the body was not read
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
