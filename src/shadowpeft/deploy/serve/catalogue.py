"""Names that clients ask for, and what answers under each."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from shadowpeft.deploy.serve.errors import ApiError
from shadowpeft.deploy.serve.mixed import Path
from shadowpeft.model.selection import BASE

BASE_NAME = "base"
MODES = ("attached", "speculative", "detached")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One model name.

    Attributes:
        name: what clients call it: ``base``, ``ADAPTER`` (attached), ``ADAPTER:speculative``, ``ADAPTER:detached``.
        mode: ``base``, ``attached``, ``speculative`` or ``detached``.
        path: the networks behind it.
    """

    name: str
    mode: str
    path: Path


def catalogue(adapters: Iterable[str], *, base_name: str = BASE_NAME) -> dict[str, Entry]:
    """Every name under which a base with these adapters can be asked, the adapters' own names first."""
    adapters = list(adapters)
    entries = []
    for adapter in adapters:
        entries.append(Entry(name=adapter, mode="attached", path=Path(adapter=adapter, uses_base=True)))
    for adapter in adapters:
        for mode in MODES:
            path = Path(adapter=adapter, uses_base=mode != "detached")
            entries.append(Entry(name=f"{adapter}:{mode}", mode=mode, path=path))
    entries.append(Entry(name=base_name, mode="base", path=Path(adapter=None, uses_base=True)))
    return {entry.name: entry for entry in entries}


def is_usable_name(name: str) -> bool:
    """Whether an adapter may be called so: it becomes part of a model name and of a module's."""
    return bool(re.fullmatch(r"[\w-]+", name)) and name not in (BASE, BASE_NAME)


def find(entries: dict[str, Entry], name: str) -> Entry:
    """The entry of a name.

    Raises:
        ApiError: there is none (404).
    """
    if name not in entries:
        known = ", ".join(entries)
        raise ApiError(
            f"there is no model {name!r}; there are: {known}", status=404, code="model_not_found", param="model"
        )
    return entries[name]
