"""Which adapter a call uses: by name, by the model's setting, or by a ``with`` block of the calling thread."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

BASE = "__base__"

# Per thread and per asyncio task, so that a `with` block in one of them never reaches calls in another.
_overrides: ContextVar[Mapping[int, str]] = ContextVar("shadow_adapter_overrides", default={})  # noqa: B039


@contextmanager
def using(model: object, adapter: str) -> Iterator[None]:
    """Within the block, calls of ``model`` made by this thread use ``adapter`` (``BASE``: none)."""
    token = _overrides.set({**_overrides.get(), id(model): adapter})
    try:
        yield
    finally:
        _overrides.reset(token)


def override_for(model: object) -> str | None:
    return _overrides.get().get(id(model))
