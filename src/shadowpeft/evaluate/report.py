"""What a run leaves for people: a table, a JSON report and curves."""

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from shadowpeft.evaluate.modes import MODES
from shadowpeft.evaluate.score import Evaluation


def results_table(scores: dict[str, Evaluation], parameters: dict[str, int], majority: float | None) -> Table:
    """One line for each of base, attached and detached."""
    metric = next(iter(scores.values())).headline
    table = Table(title=f"{metric} on {next(iter(scores.values())).n} test rows")
    for heading in ("model", "trainable parameters", metric, "95% interval", "tokens/s"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for mode, result in scores.items():
        low, high = result.interval
        table.add_row(
            mode,
            f"{parameters[mode]:,}",
            f"{100 * result.metrics[metric]:.1f}",
            f"{100 * low:.1f} - {100 * high:.1f}",
            f"{result.tokens_per_second:,.0f}",
        )
    if majority is not None:
        table.add_row("most frequent answer", "0", f"{100 * majority:.1f}", "", "")
    return table


def markdown_table(report: dict[str, Any]) -> str:
    """The same table as Markdown, from a report file's content."""
    metric = report["metric"]
    lines = [f"| model | trainable parameters | {metric} | 95% interval | tokens/s |", "|---|---:|---:|---:|---:|"]
    for mode in (mode for mode in MODES if mode in report["scores"]):
        score = report["scores"][mode]
        low, high = score["interval"]
        lines.append(
            f"| {mode} | {report['parameters'][mode]:,} | {100 * score['metrics'][metric]:.1f} "
            f"| {100 * low:.1f} - {100 * high:.1f} | {score['tokens_per_second']:,.0f} |"
        )
    if report.get("majority") is not None:
        lines.append(f"| most frequent answer | 0 | {100 * report['majority']:.1f} | | |")
    return "\n".join(lines) + "\n"


def draw_curves(metrics: Path, picture: Path) -> None:
    """Loss and shadow loss against optimizer steps, from ``metrics.jsonl``, as a PNG."""
    entries = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    entries = [entry for entry in entries if "loss" in entry]
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, label in (("main_loss", "attached"), ("shadow_loss", "shadow alone")):
        points = [(entry["step"], entry[name]) for entry in entries if name in entry]
        if points:
            axes.plot(*zip(*points, strict=True), label=label)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats a label)")
    axes.set_yscale("log")
    axes.legend()
    figure.savefig(picture, dpi=120)
