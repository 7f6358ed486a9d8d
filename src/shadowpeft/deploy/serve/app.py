"""The routes, the same for a server and for an edge device."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import resources
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from shadowpeft.deploy.serve.errors import ApiError
from shadowpeft.deploy.serve.guards import Guards
from shadowpeft.deploy.serve.metrics import CONTENT_TYPE
from shadowpeft.deploy.serve.protocol import ChatRequest, CompletionRequest, Request, parse
from shadowpeft.deploy.serve.replies import Replies
from shadowpeft.deploy.serve.service import Answer, Service


def create_app(service: Service, *, api_key: str | None = None, max_bytes: int = 2**20, body_seconds: float = 30.0) -> FastAPI:
    """The application around ``service``, which is closed when the server goes down.

    Args:
        api_key: asked of every path below ``/v1``.
        max_bytes: of a request's body.
        body_seconds: a client has so long to send it.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await service.close()

    app = FastAPI(title="shadowpeft", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.add_middleware(Guards, metrics=service.metrics, api_key=api_key, max_bytes=max_bytes, body_seconds=body_seconds)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected_error)
    app.state.num_cut = 0  # requests that the end of the server cut off
    born = int(time.time())

    @app.post("/v1/chat/completions")
    async def chat(http: HttpRequest) -> Response:
        return await _answer(service, http, parse(ChatRequest, await http.body()))

    @app.post("/v1/completions")
    async def complete(http: HttpRequest) -> Response:
        return await _answer(service, http, parse(CompletionRequest, await http.body()))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(name, born) for name in service.model_names()]}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        if name not in service.model_names():
            raise ApiError(f"there is no model {name!r}", status=404, code="model_not_found", param="model")
        return _model(name, born)

    @app.get("/v1/shadow")
    async def describe() -> dict[str, Any]:
        return service.describe()

    @app.get("/healthz")
    async def health() -> JSONResponse:
        trouble = service.health()
        return JSONResponse({"status": trouble or "ok"}, status_code=503 if trouble else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    page = (resources.files("shadowpeft.deploy.serve") / "page.html").read_text(encoding="utf-8")

    @app.get("/")
    async def index() -> HTMLResponse:
        return HTMLResponse(page)

    return app


async def _answer(service: Service, http: HttpRequest, request: Request) -> Response:
    answer = await service.ask(request)
    replies = Replies(request, answer, service.tokenizer)
    if request.stream:
        events = _cancelling(_counted(replies.stream(), service, replies, answer), answer)
        return StreamingResponse(events, media_type="text/event-stream", headers={"cache-control": "no-store"})
    body = await _unless_client_leaves(http, replies.whole(), answer)
    _count(service, replies, answer)
    return JSONResponse(body)


async def _counted(events: AsyncIterator[bytes], service: Service, replies: Replies, answer: Answer) -> AsyncIterator[bytes]:
    async for event in events:
        yield event
    _count(service, replies, answer)


def _count(service: Service, replies: Replies, answer: Answer) -> None:
    usage = replies.usage()
    service.metrics.prompt_tokens.labels(model=answer.model).inc(usage["prompt_tokens"])
    service.metrics.new_tokens.labels(model=answer.model).inc(usage["completion_tokens"])


async def _cancelling(events: AsyncIterator[bytes], answer: Answer) -> AsyncIterator[bytes]:
    """Passes events on; if the client leaves before the end, so does the answer."""
    is_complete = False
    try:
        async for event in events:
            yield event
        is_complete = True
    finally:
        if not is_complete:
            answer.cancel()


async def _unless_client_leaves(http: HttpRequest, work: Any, answer: Answer) -> Any:
    """The result of ``work``, which is dropped when the client goes away first.

    Raises:
        ApiError: the client left (nobody reads it; it ends the request).
    """
    task, leaving = asyncio.ensure_future(work), asyncio.ensure_future(http.receive())
    is_complete = False
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError("the client has left", status=499, code="client_left")
        result = task.result()
        is_complete = True
        return result
    finally:
        if not is_complete:
            answer.cancel()
        for one in (task, leaving):
            one.cancel()


def _model(name: str, born: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": born, "owned_by": "shadowpeft"}


async def _api_error(http: HttpRequest, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    headers = {} if error.retry_after is None else {"retry-after": str(error.retry_after)}
    return JSONResponse(error.body(), status_code=error.status, headers=headers)


async def _unexpected_error(http: HttpRequest, error: Exception) -> JSONResponse:
    """A fault of the server's own, told in the same shape; the server logs what it was."""
    fault = ApiError("the server failed on this request; its log says why", status=500, code="internal_error")
    return JSONResponse(fault.body(), status_code=500)


async def _http_error(http: HttpRequest, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    said = {404: f"there is nothing at {http.url.path}", 405: f"{http.url.path} does not take {http.method}"}
    refusal = ApiError(said.get(error.status_code, str(error.detail)), status=error.status_code)
    return JSONResponse(refusal.body(), status_code=error.status_code)
