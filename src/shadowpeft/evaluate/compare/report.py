"""``report.md``, ``report.html``, pictures and ``summary.json``, all from result files."""

import base64
import html
from collections.abc import Callable, Iterable
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from shadowpeft.evaluate.compare import plots
from shadowpeft.evaluate.compare.gather import Gathered, gather
from shadowpeft.evaluate.compare.parts import Part, report_parts
from shadowpeft.evaluate.compare.recipe import Recipe
from shadowpeft.evaluate.compare.tables import (
    cost_table,
    latency_table,
    main_table,
    search_table,
    transfer_table,
    variant_table,
)
from shadowpeft.evaluate.record import write_record
from shadowpeft.files import write_files

Entry = dict[str, Any]

STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:75rem;margin:2rem auto;padding:0 1rem}"
    "body{color:#222;background:#fff}"
    "table{border-collapse:collapse;margin:1rem 0;display:block;overflow-x:auto}"
    "td,th{padding:.2rem .7rem;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}"
    "td:first-child,th:first-child{text-align:left}img{max-width:100%}"
    "@media(prefers-color-scheme:dark){body{color:#ddd;background:#181818}td,th{border-color:#444}img{background:#fff}}"
)


def write_report(recipe: Recipe, output: Path) -> Gathered:
    """Writes the report of what is there; failed and missing cells are named in it."""
    gathered = gather(recipe, output)
    tables = {
        "main": main_table(gathered),
        "transfer": transfer_table(gathered),
        "scaling": variant_table(gathered, "scaling"),
        "ablations": variant_table(gathered, "ablations"),
        "latency": latency_table(gathered),
        "cost": cost_table(gathered),
        "search": search_table(gathered),
    }
    parts = report_parts(gathered, tables)

    def write(folder: Path) -> None:
        pictures = _draw(tables, recipe, folder)
        (folder / "report.md").write_text(_markdown(recipe, gathered, parts, pictures), encoding="utf-8")
        (folder / "report.html").write_text(_html(recipe, gathered, parts, pictures, folder), encoding="utf-8")

    write_files(output, write)
    counts = {"done": len(gathered.results), "failed": len(gathered.failed), "missing": len(gathered.missing)}
    write_record(output / "summary.json", {"name": recipe.name, "cells": counts, "tables": _plain(tables)})
    return gathered


def _draw(tables: dict[str, list[Entry]], recipe: Recipe, folder: Path) -> dict[str, str]:
    """Heading -> file name of each picture there was something to draw for."""
    drawings: dict[str, tuple[str, Callable[[Path], bool]]] = {
        "Main table": ("main.png", lambda path: plots.draw_differences(tables["main"], recipe.baseline, path)),
        "Scaling": ("scaling.png", lambda path: plots.draw_scaling(tables["scaling"], path)),
        "Latency": ("latency.png", lambda path: plots.draw_latency(tables["latency"], path)),
    }
    return {heading: name for heading, (name, draw) in drawings.items() if draw(folder / name)}


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


# ---------------------------------------------------------------- text


def _summary(recipe: Recipe, gathered: Gathered) -> str:
    total = len(gathered.results) + len(gathered.failed) + len(gathered.missing)
    spec = recipe.search
    searched = (
        f"Every trained method was searched with {spec.trials} runs of {spec.share:.0%} of the steps, compared on "
        "validation rows."
        if spec.trials > 1
        else "Settings are given by the recipe; nothing was searched."
    )
    return (
        f"{len(gathered.results)} of {total} cells done, {len(gathered.failed)} failed, {len(gathered.missing)} not "
        f"run yet. {searched}"
    )


def _markdown(recipe: Recipe, gathered: Gathered, parts: list[Part], pictures: dict[str, str]) -> str:
    blocks = [f"# {recipe.name}", _summary(recipe, gathered)]
    for heading, text, columns, rows in parts:
        blocks += [f"## {heading}", *([text] if text else [])]
        lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
        blocks.append("\n".join(lines))
    blocks += [f"![{heading}]({name})" for heading, name in pictures.items()]
    return "\n\n".join(blocks) + "\n"


def _html(recipe: Recipe, gathered: Gathered, parts: list[Part], pictures: dict[str, str], folder: Path) -> str:
    blocks = [f"<h1>{html.escape(recipe.name)}</h1>", f"<p>{html.escape(_summary(recipe, gathered))}</p>"]
    for heading, name in pictures.items():
        data = base64.b64encode((folder / name).read_bytes()).decode("ascii")
        blocks.append(f'<figure><img alt="{html.escape(heading)}" src="data:image/png;base64,{data}"></figure>')
    for heading, text, columns, rows in parts:
        blocks.append(f"<h2>{html.escape(heading)}</h2>" + (f"<p>{html.escape(text)}</p>" if text else ""))
        blocks.append(f"<table><thead>{_cells('th', columns)}</thead><tbody>")
        blocks += [_cells("td", row) for row in rows]
        blocks.append("</tbody></table>")
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(recipe.name)}</title>'
    return f"{head}<style>{STYLE}</style>\n" + "\n".join(blocks) + "\n</html>\n"


def _cells(tag: str, texts: Iterable[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts) + "</tr>"
