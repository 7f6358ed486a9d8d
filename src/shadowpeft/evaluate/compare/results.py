"""Result files: one JSON a cell, and its raw generations beside it, gzipped."""

import dataclasses
import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from shadowpeft.errors import DataError
from shadowpeft.evaluate.compare.plan import Cell, fingerprint, search_of
from shadowpeft.evaluate.compare.recipe import SEARCH, Recipe
from shadowpeft.evaluate.record import write_record
from shadowpeft.files import write_files
from shadowpeft.train.finite import NotFiniteError

FOLDER = "cells"
LARGEST = 150_000  # bytes of a gzipped file of generations; what is beyond it is left out, and counted
ERROR_LINES = 12


def result_path(output: Path, cell_id: str) -> Path:
    return output / FOLDER / f"{cell_id}.json"


def read_result(output: Path, cell_id: str) -> dict[str, Any] | None:
    """A cell's result; None if there is none.

    Raises:
        DataError: the file is not JSON.
    """
    path = result_path(output, cell_id)
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is damaged ({error.msg}); delete it, and the cell is run again") from error


def current_result(recipe: Recipe, output: Path, cell: Cell) -> dict[str, Any] | None:
    """A cell's result, done or failed; None where there is none, or one of other settings than it would be run with now.

    A search that was run again may have chosen another setting: what was trained with the former one is out of date.
    """
    result = read_result(output, cell.id)
    if result is None or result.get("fingerprint") != fingerprint(recipe, cell):
        return None
    return None if "setting" in result and _is_superseded(recipe, output, cell, result["setting"]) else result


def _is_superseded(recipe: Recipe, output: Path, cell: Cell, setting: dict[str, Any]) -> bool:
    searches = [current_result(recipe, output, search_of(cell, needed)) for needed in cell.needs]
    chosen = [search["chosen"] for search in searches if search is not None and search["status"] == "done"]
    return bool(chosen) and setting not in chosen


def has_diverged(result: dict[str, Any]) -> bool:
    """Whether a training failed because its loss was no number: a mean over the other seeds does not show it."""
    return any(NotFiniteError.__name__ in line for line in result.get("error", ()))


def write_done(
    output: Path, cell: Cell, fingerprint: str, payload: dict[str, Any], generations: Iterable[dict[str, Any]] = ()
) -> None:
    """Writes a finished cell: first its generations, then the JSON that says it is done."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in generations]
    if lines:
        packed, kept = _packed(lines)
        name = f"{cell.id}.generations.jsonl.gz"

        def write(folder: Path) -> None:
            (folder / name).write_bytes(packed)

        write_files(output / FOLDER, write)
        payload = {**payload, "generations": {"file": name, "rows": len(lines), "rows_kept": kept}}
    _write(output, cell, fingerprint, {"status": "done", **payload})


def write_failed(output: Path, cell: Cell, fingerprint: str, reason: str) -> None:
    """Writes a failed cell with the last lines of what was said."""
    _write(output, cell, fingerprint, {"status": "failed", "error": reason.strip().splitlines()[-ERROR_LINES:]})


def _write(output: Path, cell: Cell, fingerprint: str, payload: dict[str, Any]) -> None:
    described = {key: value for key, value in dataclasses.asdict(cell).items() if value is not None and value is not False}
    described = {key: value for key, value in described.items() if value not in ("", ())}  # seed 0 stays
    if cell.section == SEARCH:
        del described["seed"]  # a search has the recipe's own
    header = {"id": cell.id, "cell": described, "fingerprint": fingerprint}
    write_record(result_path(output, cell.id), {**header, **payload})


def _packed(lines: list[str]) -> tuple[bytes, int]:
    """(gzipped lines without a time stamp, how many fitted); halves the number until they fit."""
    kept = len(lines)
    while True:
        packed = gzip.compress("".join(lines[:kept]).encode("utf-8"), mtime=0)
        if len(packed) <= LARGEST or kept <= 1:
            return packed, kept
        kept //= 2


def as_text(values: Iterable[float]) -> str:
    """Numbers on one line, four digits at most: a result file stays small enough to be committed."""
    return " ".join(f"{round(float(value), 4):g}" for value in values)


def as_numbers(text: str) -> list[float]:
    return [float(part) for part in text.split()]
