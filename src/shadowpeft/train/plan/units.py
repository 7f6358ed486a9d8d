"""Sizes as people write them: ``80GB``, ``23.5 GiB``, ``312T``."""

import math
import re

from shadowpeft.errors import ConfigError

_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4, "P": 5}
_NUMBER = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([KMGTP]?)(i?)(B?)\s*", re.IGNORECASE)


def parse_bytes(text: str, name: str) -> int:
    """Bytes of ``80GB`` (10^9 each) or ``80GiB`` (2^30 each).

    Raises:
        ConfigError: it is no size, has no unit, or is zero; ``name`` is the option.
    """
    found = _NUMBER.fullmatch(text)
    if found is None or not found[4] or (found[3] and not found[2]) or float(found[1]) == 0:
        raise ConfigError(f"{name}={text!r} is not valid: expected a size above 0 with its unit, such as 80GB or 23.5GiB")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** _POWERS[found[2].upper()])


def parse_rate(text: str, name: str) -> float:
    """Operations (or bytes) a second of ``312T``; powers of 1000.

    Raises:
        ConfigError: it is no number above 0 with one of K, M, G, T, P, or none, behind it.
    """
    found = _NUMBER.fullmatch(text.removesuffix("/s"))
    if found is None or found[3] or float(found[1]) == 0:
        raise ConfigError(f"{name}={text!r} is not valid: expected a rate a second above 0, such as 312T")
    return float(found[1]) * 1000 ** _POWERS[found[2].upper()]


def readable(size: float) -> str:
    """Bytes with three digits and a decimal unit."""
    if size < 1000:
        return f"{size:.0f} B"
    power = min(int(math.log10(size) // 3), 5)
    value = size / 1000**power
    return f"{value:.{max(0, 2 - int(math.log10(value)))}f} {'KMGTP'[power - 1]}B"
