"""Writes every table of README.md and docs/ from the files in results/: `python scripts/render.py [--check]`.

A table stands between `<!-- result: NAME -->` and `<!-- end -->`; NAME is a key of TABLES. `--check` changes nothing
and fails where a page does not say what its results say.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"(<!-- result: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
TASK_RESULTS = ("home_commands", "trec", "clinc150")
MODES = ("base", "attached", "detached")


def result(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))


def demo_table() -> str:
    report = result("demo")
    rows = ["| model | trainable parameters | accuracy | 95% interval | tokens/s |", "|---|---:|---:|---:|---:|"]
    for mode in MODES:
        score = report["scores"][mode]
        low, high = score["interval"]
        rows.append(
            f"| {mode} | {report['parameters'][mode]:,} | {percent(score['metrics'][report['metric']])} "
            f"| {percent(low)} - {percent(high)} | {score['tokens_per_second']:,.0f} |"
        )
    rows.append(f"| most frequent answer | 0 | {percent(report['majority'])} | | |")
    return "\n".join([*rows, "", f"{report['num_test_rows']} test rows, {report['train_minutes']} minutes of training."])


def tasks_table() -> str:
    columns = ("task", "base model", "base", "attached", "95% interval", "detached", "most frequent answer",
               "trainable parameters", "test rows", "minutes")  # fmt: skip
    rows = [f"| {' | '.join(columns)} |", "|---|---|" + "---:|" * (len(columns) - 2)]
    for name in TASK_RESULTS:
        report = result(name)
        scores = {mode: percent(score["metrics"][report["metric"]]) for mode, score in report["scores"].items()}
        low, high = report["scores"]["attached"]["interval"]
        cells = (report["task"], Path(report["config"]["base"]).name, scores["base"], scores["attached"],
                 f"{percent(low)} - {percent(high)}", scores["detached"], percent(report["majority"]),
                 f"{report['parameters']['attached']:,}", f"{report['num_test_rows']:,}",
                 report["train_minutes"])  # fmt: skip
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(rows)


def parity_table() -> str:
    heading = "| peer | architectures | cases | logits | auxiliary loss | loss | gradients |"
    rows = [heading, "|---|---|---:|---:|---:|---:|---:|"]
    found = result("parity")["rows"]
    for peer in dict.fromkeys(row["peer"] for row in found):
        of_peer = [row for row in found if row["peer"] == peer]
        largest = [f"{max(row[key] for row in of_peer):.0e}" for key in ("logits", "auxiliary_loss", "loss", "gradients")]
        architectures = sorted({row["architecture"] for row in of_peer})
        rows.append(f"| {peer} | {', '.join(architectures)} | {len(of_peer)} | {' | '.join(largest)} |")
    return "\n".join(rows)


def base_table() -> str:
    report = json.loads((ROOT / "src/shadowpeft/assets/base/training_report.json").read_text(encoding="utf-8"))
    rows = ["| held-out text | bytes | bits per byte | `xz -9` |", "|---|---:|---:|---:|"]
    for name, score in report["held_out"].items():
        rows.append(f"| {name} | {score['bytes']:,} | {score['bits_per_byte']} | {score['xz_bits_per_byte']} |")
    return "\n".join(rows)


def decode_table(name: str) -> str:
    """Times as the benchmark gives them; speed is tokens a second beside the plain base in the same trial."""
    rows = ["| | batch | prefill ms | ms/token | tokens/s | speed, base = 1 | tokens a pass of the base | share of ceiling |",
            "|---|---:|---:|---:|---:|---:|---:|---:|"]  # fmt: skip
    for row in result(name)["rows"]:
        rows.append(
            f"| {row['name']} | {row['batch']} | {row['prefill_ms']} | {row['ms_per_token']} | {row['tokens_per_s']:,.0f} "
            f"| {1 / row['ratio_to_base']:.2f} | {row['mean_accepted_length']:.2f} | {row['bandwidth_share']:.2f} |"
        )
    return "\n".join(rows)


def plan_table() -> str:
    columns = ("base", "rows x tokens", "planned MB", "measured MB", "planned / measured", "measured as glibc comes MB")
    rows = [f"| {' | '.join(columns)} |", "|---|---|" + "---:|" * 4]
    for row in result("plan")["rows"]:
        planned, measured, usual = (f"{row[name] / 1e6:,.0f}" for name in ("planned", "measured", "measured_default_malloc"))
        shape = f"{row['batch']} x {row['length']}"
        rows.append(f"| {row['case']} | {shape} | {planned} | {measured} | {row['ratio']:.2f} | {usual} |")
    return "\n".join(rows)


def compatibility_table() -> str:
    rows = ["| Python | torch | transformers | contract tests | |", "|---|---|---|---|---|"]
    for cell in result("compatibility")["cells"]:
        # What was installed; where nothing was, what was asked for.
        found = {**cell["asked"], **cell.get("versions", {})}
        tests = cell.get("tests")
        counts = "" if tests is None else f"{tests['passed']} passed, {tests['failed']} failed, {tests['skipped']} skipped"
        names = " | ".join(found[name] for name in ("python", "torch", "transformers"))
        reason = cell.get("reason", "").replace("|", "/")
        rows.append(f"| {names} | {counts or cell['status']} | {reason} |")
    return "\n".join(rows)


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


TABLES: dict[str, Callable[[], str]] = {
    "demo": demo_table,
    "parity": parity_table,
    "decode-robot": partial(decode_table, "decode-robot"),
    "decode-12x1024": partial(decode_table, "decode-12x1024"),
    "decode-e2e": partial(decode_table, "decode-e2e"),
    "tasks": tasks_table,
    "plan": plan_table,
    "compatibility": compatibility_table,
    "base": base_table,
}


def rendered(page: str) -> str:
    return BLOCK.sub(lambda block: f"{block[1]}{TABLES[block[2]]()}\n{block[3]}", page)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    is_check = parser.parse_args().check
    stale = []
    for path in pages():
        old = path.read_text(encoding="utf-8")
        new = rendered(old)
        if new != old:
            stale.append(path.relative_to(ROOT))
            if not is_check:
                path.write_text(new, encoding="utf-8")
    if is_check and stale:
        sys.exit(f"not what results/ says: {', '.join(map(str, stale))}; run python scripts/render.py")


if __name__ == "__main__":
    main()
