"""What all tables share: where results are, and how a number is written."""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def result(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def three_digits(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
