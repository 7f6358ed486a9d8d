"""Results as files that say where they come from: commit, versions, hardware, time, data."""

import hashlib
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from shadowpeft.files import write_files

LIBRARIES = ("shadowpeft", "torch", "transformers", "peft")


def origin() -> dict[str, Any]:
    """Commit, versions, hardware and UTC time of this process. Nothing in it names a user, a host or a place.

    ``commit`` is None outside a checkout of this package; ``has_uncommitted_changes`` then too.
    """
    commit = _git("rev-parse", "HEAD") if _is_checkout() else None
    changes = None if commit is None else _git("status", "--porcelain", "--untracked-files=no")
    return {
        "commit": commit,
        "has_uncommitted_changes": None if changes is None else bool(changes),
        "versions": {name: _version(name) for name in LIBRARIES},
        "python": platform.python_version(),
        "hardware": hardware(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def hardware() -> dict[str, Any]:
    """CPU model, logical cores, memory in GiB and the accelerator's name; None where unknown."""
    return {
        "system": platform.system(),
        "cpu": cpu_model(Path("/proc/cpuinfo")),
        "cores": os.cpu_count(),
        "memory_gib": _memory_gib(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def cpu_model(info: Path) -> str:
    """The model name in Linux's ``cpuinfo``, else what Python knows."""
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), platform.processor() or platform.machine())


def _memory_gib() -> float | None:
    names = getattr(os, "sysconf_names", {})
    if "SC_PAGE_SIZE" not in names or "SC_PHYS_PAGES" not in names:
        return None
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _is_checkout() -> bool:
    """Whether git tracks this very file; an installed package is not of the commit around it."""
    return _git("ls-files", "--error-unmatch", Path(__file__).name) is not None


def _git(*arguments: str) -> str | None:
    """What git prints in this file's folder; None if it is absent, slow or fails."""
    command = ["git", *arguments]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def write_record(path: Path, payload: dict[str, Any]) -> None:
    """Writes ``payload`` and its ``origin`` as JSON; the file appears complete or not at all.

    Absolute paths are shortened to their last part, and numbers JSON does not know become null.

    Raises:
        SaveError: the folder cannot be written; an older file is unchanged.
    """
    path = Path(path)
    text = json.dumps({**_publishable(payload), "origin": origin()}, indent=2, ensure_ascii=False) + "\n"

    def write(folder: Path) -> None:
        (folder / path.name).write_text(text, encoding="utf-8")

    write_files(path.parent, write)


def _publishable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _publishable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_publishable(item) for item in value]
    if isinstance(value, Path) or (isinstance(value, str) and _is_place(value)):
        return Path(value).name
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_place(text: str) -> bool:
    """Whether a text is the absolute path of something that exists below a top-level folder."""
    may_be = len(text) < 4096 and "\0" not in text and os.path.isabs(text)
    return may_be and len(Path(text).parts) > 2 and os.path.exists(text)


def data_revision(rows: Iterable[dict[str, Any]]) -> str:
    """SHA-256 over the rows in their order, whatever the order of their fields."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=True, default=str).encode("ascii") + b"\n")
    return digest.hexdigest()
