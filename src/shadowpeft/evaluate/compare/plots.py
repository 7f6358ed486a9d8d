"""The pictures of a report."""

from collections import defaultdict
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from shadowpeft.evaluate.compare.tables import heading_of

Entry = dict[str, Any]
_MARKS = "osD^vPX*"


def draw_differences(table: list[Entry], baseline: str, picture: Path) -> bool:
    """Paired difference to the baseline of every method on every task, with intervals; one panel a base."""
    entries = [entry for entry in table if entry["difference"] is not None]
    bases = list(dict.fromkeys(entry["base"] for entry in entries))
    if not bases:
        return False
    figure = Figure(figsize=(5.2 * len(bases), 4.5), layout="constrained")
    for axes, base in zip(figure.subplots(1, len(bases), squeeze=False)[0], bases, strict=True):
        _differences(axes, [entry for entry in entries if entry["base"] == base])
        axes.set_title(base)
        axes.set_xlabel(f"points above {baseline} (95% interval)")
    figure.savefig(picture, dpi=120)
    return True


def _differences(axes: Axes, entries: list[Entry]) -> None:
    rows = list(dict.fromkeys(heading_of(entry) for entry in sorted(entries, key=_mean_last)))
    methods = list(dict.fromkeys(entry["method"] for entry in entries))
    for index, method in enumerate(methods):
        own = [entry for entry in entries if entry["method"] == method]
        shift = 0.7 * (index + 0.5) / len(methods) - 0.35
        places = [rows.index(heading_of(entry)) + shift for entry in own]
        found = [entry["difference"] for entry in own]
        values = [100 * each.value for each in found]
        spread = [
            [max(0.0, value - 100 * each.low) for value, each in zip(values, found, strict=True)],
            [max(0.0, 100 * each.high - value) for value, each in zip(values, found, strict=True)],
        ]
        mark = _MARKS[index % len(_MARKS)]
        axes.errorbar(values, places, xerr=spread, fmt=mark, label=method, markersize=4, capsize=2)
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.legend(fontsize="small")


def _mean_last(entry: Entry) -> bool:
    return entry["scored"] is None


def draw_scaling(table: list[Entry], picture: Path) -> bool:
    """Score against trained parameters, all methods in one panel for each base and task."""
    panels: dict[tuple[str, str], dict[str, list[Entry]]] = defaultdict(lambda: defaultdict(list))
    for entry in table:
        panels[entry["base"], entry["scored"]][entry["method"]].append(entry)
    if not panels:
        return False
    figure = Figure(figsize=(5.2 * len(panels), 4), layout="constrained")
    row = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, ((base, task), methods) in zip(row, panels.items(), strict=True):
        for mark, (method, entries) in zip(_MARKS * len(methods), methods.items(), strict=False):
            entries = sorted(entries, key=lambda entry: entry["trainable"])
            sizes = [entry["trainable"] for entry in entries]
            axes.plot(sizes, [100 * entry["score"].value for entry in entries], marker=mark, markersize=4, label=method)
            axes.fill_between(
                sizes,
                [100 * entry["score"].low for entry in entries],
                [100 * entry["score"].high for entry in entries],
                alpha=0.15,
            )
        axes.set_xscale("log")
        axes.set_title(f"{base}: {task}")
        axes.set_xlabel("trained parameters")
        axes.set_ylabel(f"{next(iter(methods.values()))[0]['metric']} (95% interval)")
        axes.legend(fontsize="small")
    figure.savefig(picture, dpi=120)
    return True


def draw_latency(table: list[Entry], picture: Path) -> bool:
    """Milliseconds of one further token, by variant and batch size; one panel a base."""
    bases = list(dict.fromkeys(entry["base"] for entry in table))
    if not bases:
        return False
    figure = Figure(figsize=(5.2 * len(bases), 4), layout="constrained")
    for axes, base in zip(figure.subplots(1, len(bases), squeeze=False)[0], bases, strict=True):
        own = [entry for entry in table if entry["base"] == base]
        variants = list(dict.fromkeys(entry["variant"] for entry in own))
        sizes = list(dict.fromkeys(entry["batch_size"] for entry in own))
        for index, size in enumerate(sizes):
            times = {entry["variant"]: entry["token_ms"] for entry in own if entry["batch_size"] == size}
            places = [place + 0.8 * (index + 0.5) / len(sizes) - 0.4 for place in range(len(variants))]
            axes.barh(places, [times[name] for name in variants], height=0.8 / len(sizes), label=f"batch {size}")
        axes.set_yticks(range(len(variants)), variants)
        axes.invert_yaxis()
        axes.set_title(base)
        axes.set_xlabel("ms a further token")
        axes.legend(fontsize="small")
    figure.savefig(picture, dpi=120)
    return True
