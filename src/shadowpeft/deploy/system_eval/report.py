"""The measurement as a page to read: tables and two plots."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from shadowpeft.evaluate.record import write_record
from shadowpeft.files import write_files


def write_report(figures: dict[str, Any], folder: Path) -> None:
    """Writes ``system.json``, ``system.md``, ``deferral.png`` and ``latency.png``; each complete or not at all."""
    write_record(folder / "system.json", figures)

    def write(staging: Path) -> None:
        (staging / "system.md").write_text(markdown(figures), encoding="utf-8")
        _draw_deferral(figures, staging / "deferral.png")
        _draw_latency(figures, staging / "latency.png")

    write_files(folder, write)


def markdown(figures: dict[str, Any]) -> str:
    """All tables."""
    link = figures["link"]
    speed = "unlimited" if link["megabits"] is None else f"{link['megabits']:g} Mbit/s"
    parts = [
        f"# {figures['task']}: edge and cloud as one system",
        f"{figures['num_rows']} rows, {figures['num_out_of_scope']} out of scope; link {link['round_trip_ms']:g} ms "
        f"round trip, {speed}; {figures['concurrency']} at a time; confidence {figures['score']}; the device runs "
        f"{'an exported' if figures['edge_is_exported'] else 'the detached'} shadow. All ran on one "
        "machine, edge and cloud as processes of their own, so the edge was as fast as the cloud's machine.",
        _systems_table(figures["systems"]),
        "## Routers on these rows",
        _routers_table(figures["routers"]),
        "![deferral](deferral.png) ![latency](latency.png)",
    ]
    if figures["num_out_of_scope"]:
        rows = [[name, _number(value)] for name, value in figures["scope_detection"].items()]
        parts += ["## In or out of scope (AUROC)", _table(["confidence", "AUROC"], rows)]
    return "\n\n".join(parts) + "\n"


def _systems_table(systems: dict[str, Any]) -> str:
    heads = ["system", "accuracy (95%)", "in scope", "escalated", "in scope", "degraded", "mean ms", "p50", "p95", "p99"]
    against = list(systems["attached"]["time_against"])
    heads += ["requests/s", "total s", *(f"time / {name}" for name in against), "bytes up", "bytes down"]
    rows = []
    for name, one in systems.items():
        low, high = one["accuracy_interval"]
        times = [f"{one['latency_ms'][key]:.1f}" for key in ("mean", "p50", "p95", "p99")]
        sent = one["link_bytes"] or {"up": 0, "down": 0}
        rows.append(
            [
                name,
                f"{one['accuracy']:.2%} ({low:.2%} to {high:.2%})",
                _share(one["accuracy_in_scope"]),
                f"{one['escalated']:.1%}",
                _share(one["escalated_in_scope"]),
                str(one["degraded"]),
                *times,
                f"{one['requests_per_second']:.2f}",
                f"{one['seconds']:.1f}",
                *(f"{one['time_against'][name]:.2f}x" for name in against),
                f"{sent['up']:,}",
                f"{sent['down']:,}",
            ]
        )
    return _table(heads, rows)


def _routers_table(routers: dict[str, Any]) -> str:
    heads = [
        "router",
        "area under the curve",
        "gap recovered",
        "share for 50% / 80% / 95% of the gap",
        "AUROC right/wrong",
    ]
    rows = []
    for name, one in sorted(routers.items(), key=lambda item: -item[1]["area"]):
        shares = " / ".join(_number(value) for value in one["share_for_gap"].values())
        rows.append(
            [name, f"{one['area']:.4f}", _number(one["recovered_gap"]), shares, _number(one.get("auroc_right"))]
        )
    return _table(heads, rows)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _draw_deferral(figures: dict[str, Any], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 5))
    for name, one in figures["routers"].items():
        style = {"oracle": "k--", "random": "k:"}.get(name, "-")
        axes.plot(one["shares"], one["accuracies"], style, label=f"{name} ({one['area']:.3f})", linewidth=1.2)
    here = figures["systems"]["edge and cloud"]
    axes.plot([here["escalated"]], [here["accuracy"]], "o", color="tab:red", label="this system, end to end")
    axes.set(xlabel="share answered by the cloud", ylabel="accuracy", title=f"{figures['task']}: cost against quality")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    _save(figure, path)


def _draw_latency(figures: dict[str, Any], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 5))
    for name, one in figures["systems"].items():
        ordered = sorted(1000 * value for value in one["latencies"])
        axes.plot(ordered, [(i + 1) / len(ordered) for i in range(len(ordered))], label=name)
    axes.set(
        xlabel="milliseconds", ylabel="share of requests answered", title=f"{figures['task']}: latency", xscale="log"
    )
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
