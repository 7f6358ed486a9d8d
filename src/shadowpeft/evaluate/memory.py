"""Memory of this process, as the system counts it."""

from pathlib import Path

_STATUS = Path("/proc/self/status")


def peak_resident_bytes() -> int | None:
    """High-water mark of the resident memory: since the start, or since ``/proc/self/clear_refs`` was told to begin anew.

    None where there is no ``/proc`` (macOS, Windows). ``ru_maxrss`` would not do: a child starts with its parent's.
    """
    if not _STATUS.is_file():
        return None
    lines = _STATUS.read_text(encoding="ascii").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
