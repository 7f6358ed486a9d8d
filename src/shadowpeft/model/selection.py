"""Which adapter a call uses: by name, by the model's setting, or by a ``with`` block of the calling thread."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock

BASE = "__base__"

# Plain and global, because torch.compile can guard on an int but not read a ContextVar.
_num_open_blocks = 0
_lock = Lock()
# Per thread and per asyncio task, so that a `with` block in one of them never reaches calls in another.
_overrides: ContextVar[Mapping[int, str]] = ContextVar("shadow_adapter_overrides", default={})  # noqa: B039


@contextmanager
def using(model: object, adapter: str) -> Iterator[None]:
    """Within the block, calls of ``model`` made by this thread use ``adapter`` (``BASE``: none)."""
    token = _overrides.set({**_overrides.get(), id(model): adapter})
    _count(1)
    try:
        yield
    finally:
        _count(-1)
        _overrides.reset(token)


def _count(change: int) -> None:
    global _num_open_blocks
    with _lock:
        _num_open_blocks += change


def override_for(model: object) -> str | None:
    """The adapter chosen by a ``with`` block around this call, if any; compiled graphs need ``adapter=`` instead."""
    return _overrides.get().get(id(model)) if _num_open_blocks else None
