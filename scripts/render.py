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
    rows = ["| | batch | prefill ms | ms/token | tokens/s | speed, base = 1 | whole answer, attached = 1 "
            "| tokens a pass of the base | share of ceiling |", "|---|---:|---:|---:|---:|---:|---:|---:|---:|"]  # fmt: skip
    for row in result(name)["rows"]:
        whole = whole_answer(result(name)["rows"], row)
        rows.append(
            f"| {row['name']} | {row['batch']} | {row['prefill_ms']} | {row['ms_per_token']} | {row['tokens_per_s']:,.0f} "
            f"| {1 / row['ratio_to_base']:.2f} | {'-' if whole is None else f'{whole:.2f}'} "
            f"| {row['mean_accepted_length']:.2f} | {'-' if 'drafts' in row['name'] else row['bandwidth_share']} |"
        )
    return "\n".join(rows)


def whole_answer(rows: list[dict[str, Any]], row: dict[str, Any]) -> float | None:
    """Speed of prompt and answer together beside plain decoding of the same tokens; records before 2026-11-26 have no times."""
    attached = next(other for other in rows if (other["name"], other["batch"]) == ("ours, attached", row["batch"]))
    has_same_tokens = row["name"].startswith("ours, attached") and "whole_ms" in row
    return attached["whole_ms"] / row["whole_ms"] if has_same_tokens else None


def speed_table(*names: str) -> str:
    """What a single prompt gains, for the README: one number of drafts, the same for both ways of drafting."""
    shown = {
        "plain base": "plain base",
        "LoRA r10, not merged": "LoRA, not merged",
        "peft Shadow": "PEFT's Shadow",
        "authors' shadow-peft": "authors' `shadow-peft`",
        "ours, attached": "shadowpeft, attached",
        "ours, attached, 6 drafts": "shadowpeft, attached, `speculative=6`",
        "ours, attached, assistant_model=detached, 6 drafts": "the same by `assistant_model=`, 6 drafts",
        "ours, detached": "shadowpeft, detached",
    }
    found = {name: {row["name"]: row for row in result(name)["rows"] if row["batch"] == 1} for name in names}
    heads = " | ".join(f"{name.removeprefix('decode-')}: tokens/s | base = 1 | whole answer, attached = 1" for name in names)
    lines = [f"| | {heads} |", "|---|" + "---:|" * (3 * len(names))]
    for row, label in shown.items():
        cells = []
        for rows in found.values():
            whole = whole_answer(list(rows.values()), rows[row])
            speeds = f"{rows[row]['tokens_per_s']:,.0f} | {1 / rows[row]['ratio_to_base']:.2f}"
            cells.append(f"{speeds} | {'-' if whole is None else f'{whole:.2f}'}")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def system_table(name: str) -> str:
    columns = ("task", "system", "accuracy", "95% interval", "in scope", "escalated", "in scope", "mean ms", "p50", "p95",
               "p99", "requests/s", "total s", "time / attached", "time / LoRA", "KiB up", "KiB down")  # fmt: skip
    rows = [f"| {' | '.join(columns)} |", "|---|---|" + "---:|" * (len(columns) - 2)]
    for task, report in result(name)["tasks"].items():
        for system, one in report["replayed"]["systems"].items():
            low, high = one["accuracy_interval"]
            shares = (percent(one[key]) for key in ("accuracy_in_scope", "escalated", "escalated_in_scope"))
            times = (f"{one['latency_ms'][key]:.0f}" for key in ("mean", "p50", "p95", "p99"))
            against = (f"{one['time_against'][other]:.2f}" for other in ("attached", "LoRA, merged"))
            sent = one["link_bytes"] or {"up": 0, "down": 0}
            cells = (task, system, percent(one["accuracy"]), f"{percent(low)} - {percent(high)}", *shares, *times,
                     f"{one['requests_per_second']:.1f}", f"{one['seconds']:.1f}", *against,
                     *(f"{sent[way] / 1024:.1f}" for way in ("up", "down")))  # fmt: skip
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def routers_table() -> str:
    """Confidence scores by what they are worth: ``-`` where a task has no row out of scope, or a line no score."""
    rows = ["| task | confidence | area under the deferral curve | AUROC right/wrong | AUROC in/out of scope |",
            "|---|---|---:|---:|---:|"]  # fmt: skip
    for task, report in result("system")["tasks"].items():
        found, scope = report["scored"]["routers"], report["scored"]["scope_detection"]
        for name, one in sorted(found.items(), key=lambda item: -item[1]["area"]):
            mark = " (the router's)" if name == report["router"]["score"] else ""
            numbers = (one["area"], one.get("auroc_right"), scope.get(f"edge {name}"))
            rows.append(f"| {task} | {name}{mark} | {' | '.join(map(three_digits, numbers))} |")
        for name in [name for name in scope if name.startswith("attached ")]:
            rows.append(f"| {task} | {name} | - | - | {three_digits(scope[name])} |")
    return "\n".join(rows)


def load_table() -> str:
    record = result("serve_load")
    rows = ["| model | requests | tokens | alone p50 ms | p50 ms | p95 ms | p99 ms | equal | tie | wrong | lost |",
            "|---|" + "---:|" * 10]  # fmt: skip
    for name, one in [*record["models"].items(), ("all", record["all"])]:
        times = [one["latency_ms_alone"]["p50"], *(one["latency_ms"][key] for key in ("p50", "p95", "p99"))]
        counts = (str(one[verdict]) for verdict in ("equal", "tie", "wrong", "lost"))
        rows.append(
            f"| {name} | {one['num_requests']} | {one['num_tokens']:,} | {' | '.join(f'{time:,.0f}' for time in times)} "
            f"| {' | '.join(counts)} |"
        )
    ratio = record["throughput_ratio"]
    said = f"{record['streams']} streams: {ratio['median']:.2f} times the tokens/s of single ones (least {ratio['least']:.2f})."
    return "\n".join([said, "", *rows])


def restart_table() -> str:
    record = result("cloud_restart")
    rows = ["| answers | number | p50 ms | p99 ms |", "|---|---:|---:|---:|"]
    for kind, one in record["answers"].items():
        times = one["latency_ms"]
        shown = "- | -" if times is None else f"{times['p50']:,.0f} | {times['p99']:,.0f}"
        rows.append(f"| {kind} | {one['count']:,} | {shown} |")
    held = all(record["checks"].values())
    said = (
        f"{record['requests']:,} requests, {record['kills']} kills of the cloud, {record['answered']:,} answered, "
        f"{sum(record['lost'].values())} lost; every check held: {'yes' if held else 'no'}."
    )
    return "\n".join([said, "", *rows])


def distillation_table() -> str:
    """One row a cell of recipes/distillation_study.py."""
    columns = ("task", "distillation", "seed", "attached", "detached", "drafts accepted", "tokens a pass")
    lines = [f"| {' | '.join(columns)} |", "|---|---|---:|" + "---:|" * (len(columns) - 3)]
    cells = [json.loads(path.read_text(encoding="utf-8")) for path in (ROOT / "results/distillation").glob("*.json")]
    for cell in sorted(cells, key=lambda cell: (cell["task"], cell["variant"] != "none", cell["variant"], cell["seed"])):
        scores = (percent(cell["scores"][mode][cell["metric"]]) for mode in ("attached", "detached"))
        lines.append(
            f"| {cell['task']} | {cell['variant']} | {cell['seed']} | {' | '.join(scores)} | {percent(cell['acceptance'])} "
            f"| {cell['tokens_a_pass']:.2f} |"
        )
    return "\n".join(lines)


LABELS = {"answers": "answers", "all": "all positions"}


def setting(row: dict[str, Any]) -> str:
    dropout = "default" if row["dropout"] is None else f"{row['dropout']:g}"
    return f"{LABELS[row['labels']]} | {dropout}"


def step_ratios(row: dict[str, Any]) -> str:
    """Time of a step beside base, LoRA and PEFT's Shadow."""
    return " | ".join(f"{row['ratios'][peer]:.2f}" for peer in ("base with gradients", "LoRA all linear", "HF Shadow"))


def train_step_table(*names: str, every_label: bool = True) -> str:
    """Rows of the files; of the first only those with labels on answers, unless ``every_label``."""
    columns = ("labels", "dropout", "", "trained weights", "s/step", "tokens/s", "of ceiling",
               "base = 1", "LoRA = 1", "PEFT's Shadow = 1")  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", "|---|---|---|" + "---:|" * (len(columns) - 3)]
    first, *others = names
    rows = [row for row in result(first)["rows"] if every_label or row["labels"] == "answers"]
    rows += [row for name in others for row in result(name)["rows"]]
    for row in rows:
        lines.append(
            f"| {setting(row)} | {row['row']} | {row['trainable']:,} | {row['seconds']:.3f} | {row['tokens_per_second']:,.0f} "
            f"| {row['share_of_ceiling']:.2f} | {step_ratios(row)} |"
        )
    return "\n".join(lines)


def train_step_gpu_table(*names: str) -> str:
    """As :func:`train_step_table`, with the shape and what a step allocates at once."""
    columns = ("shape", "", "trained weights", "peak GB", "ms/step", "of ceiling", "base = 1", "LoRA = 1", "PEFT's Shadow = 1",
               "peak, LoRA = 1")  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", "|---|---|" + "---:|" * (len(columns) - 2)]
    for name in names:
        rows = result(name)["rows"]
        lora = next(row["peak_mb"] for row in rows if row["row"] == "LoRA all linear")
        for row in rows:
            lines.append(
                f"| {row['shape']} | {row['row']} | {row['trainable']:,} | {row['peak_mb'] / 1000:.1f} "
                f"| {1000 * row['seconds']:,.0f} | {row['share_of_ceiling']:.2f} | {step_ratios(row)} "
                f"| {row['peak_mb'] / lora:.2f} |"
            )
    return "\n".join(lines)


def training_table(gpu: str, cpu: str) -> str:
    """Time and memory of a training step for the README, beside LoRA on all linear layers."""
    columns = ("", "H200, 8B: ms/step", "LoRA = 1", "peak GB", "LoRA = 1", "two cores, 12 x 1024: s/step", "LoRA = 1")
    lines = [f"| {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) - 1)]
    rows, others = ({row["row"]: row for row in result(name)["rows"] if row["labels"] == "answers"} for name in (gpu, cpu))
    lora = rows["LoRA all linear"]["peak_mb"]
    for name, row in rows.items():
        lines.append(
            f"| {name} | {1000 * row['seconds']:,.0f} | {row['ratios']['LoRA all linear']:.2f} | {row['peak_mb'] / 1000:.1f} "
            f"| {row['peak_mb'] / lora:.2f} | {others[name]['seconds']:.2f} | {others[name]['ratios']['LoRA all linear']:.2f} |"
        )
    return "\n".join(lines)


def shadow_init_table() -> str:
    """Means over seeds of recipes/shadow_init_study.py, with their 95% intervals."""
    columns = ("task", "shadow", "trained weights", "attached", "detached", "drafts accepted", "seeds")
    lines = [f"| {' | '.join(columns)} |", "|---|---|" + "---:|" * (len(columns) - 2)]
    for row in result("shadow_init")["rows"]:
        measures = " | ".join(with_interval(row.get(name)) for name in ("attached", "detached", "acceptance"))
        lines.append(f"| {row['task']} | {row['initialisation']} | {row['parameters']:,} | {measures} | {row['seeds']} |")
    return "\n".join(lines)


def with_interval(measure: dict[str, float | None] | None) -> str:
    if measure is None or measure["mean"] is None:
        return "-"
    half = measure["half_width"]
    return percent(measure["mean"]) + ("" if half is None else f" ± {100 * half:.1f}")


def shadow_text_table() -> str:
    found = result("shadow_init")["text"] or {}  # none where the study had no held-out text
    names = {name: f"{name}, detached" if name not in ("base", "small model") else name for name in found}
    lines = ["| before any fine-tuning | bits a byte of held-out text |", "|---|---:|"]
    return "\n".join([*lines, *(f"| {names[name]} | {bits:.2f} |" for name, bits in found.items())])


def export_table() -> str:
    """What benchmarks/export.py measured; forms that are read back but not run have a size alone."""
    columns = ("form", "file MB", "memory MB", "tokens/s", "torch = 1", "accuracy", "answers as torch's", "bits/token")
    lines = [f"| {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) - 1)]
    found = result("export")["results"]
    speed = found["torch-float32"]["tokens_per_second"]
    for name, row in found.items():
        shown = [f"{row['file_bytes'] / 1e6:.2f}", *["-"] * 6]
        if "tokens_per_second" in row:
            memory = (row["peak_bytes"] - row["peak_bytes_before_loading"]) / 1e6
            shown[1:] = [f"{memory:.0f}", f"{row['tokens_per_second']:,.0f}", f"{row['tokens_per_second'] / speed:.2f}",
                         percent(row["score"]), percent(row["same_answers"]), three_digits(row["bits_per_token"])]  # fmt: skip
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(lines)


NAMES = {"none": "untouched base", "lora": "LoRA", "dora": "DoRA", "shadow": "ShadowPEFT",
         "shadow (detached)": "its shadow, detached"}  # fmt: skip


def compare_table(name: str, base: str) -> str:
    """Scores of a comparison's main table, then what they are above LoRA, with 95% intervals; means over seeds."""
    rows = [row for row in result(f"{name}/summary")["tables"]["main"] if row["base"] == base]
    # Of a task that is still under way there may be the untouched base alone.
    tasks = list(dict.fromkeys(row["task"] for row in rows if row["task"] is not None and row["method"] == "lora"))
    metrics = {row["task"]: row["metric"] for row in rows if row["task"] is not None}
    heads = [f"{task}, {metrics[task]}" for task in tasks]
    lines = [f"| | {' | '.join(heads)} | mean of tasks |", "|---|" + "---:|" * (len(tasks) + 1)]
    cells = {(row["method"], row["task"]): row for row in rows}
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for method in methods:
        found = [cells.get((method, task)) for task in [*tasks, None]]
        shown = ["-" if row is None else percent(row["score"]["value"]) for row in found]
        lines.append(f"| {NAMES.get(method, method)} | {' | '.join(shown)} |")
    for method in [each for each in methods if each not in ("none", "lora")]:
        found = [cells.get((method, task)) for task in [*tasks, None]]
        shown = ["-" if row is None or row["difference"] is None else above(row["difference"]) for row in found]
        lines.append(f"| {NAMES.get(method, method)}, above LoRA | {' | '.join(shown)} |")
    counts = {len(row["seeds"]) for row in rows if row["task"] in tasks and row["method"] != "none"}
    seeds = f"{min(counts)}" if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
    return "\n".join([*lines, "", f"{seeds} seeds, {rows[0]['rows']} test rows a task at most."])


def above(difference: dict[str, float]) -> str:
    return f"{100 * difference['value']:+.1f} [{100 * difference['low']:+.1f}, {100 * difference['high']:+.1f}]"


def step_kernel_table() -> str:
    columns = ("preset", "width", "", "pass", "us", "floor us", "floor = 1")
    lines = [f"| {' | '.join(columns)} |", "|---|---:|---|---|---:|---:|---:|"]
    for row in result("step_kernel")["rows"]:
        times = f"{1000 * row['ms']:.0f} | {1000 * row['floor_ms']:.0f} | {row['x_floor']:.1f}"
        lines.append(f"| {row['preset']} | {row['width']} | {row['way']} | {row['pass']} | {times} |")
    return "\n".join(lines)


def memory_table(*names: str) -> str:
    rows = [row for name in names for row in result(name)["rows"]]
    kept = {(row["vocabulary"], setting(row), row["row"]): row["kept_mb"] for row in rows}
    columns = ("vocabulary", "labels", "dropout", "", "kept MB", "LoRA = 1", "PEFT's Shadow = 1", "peak MB")
    lines = [f"| {' | '.join(columns)} |", "|---:|---|---|---|" + "---:|" * (len(columns) - 4)]
    for row in rows:
        place = (row["vocabulary"], setting(row))
        ratios = " | ".join(f"{row['kept_mb'] / kept[(*place, peer)]:.2f}" for peer in ("LoRA all linear", "HF Shadow"))
        lines.append(
            f"| {row['vocabulary']:,} | {setting(row)} | {row['row']} | {row['kept_mb']:,.0f} | {ratios} "
            f"| {row['peak_mb']:,.0f} |"
        )
    return "\n".join(lines)


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def three_digits(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


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


TABLES: dict[str, Callable[[], str]] = {
    "demo": demo_table,
    "parity": parity_table,
    "decode-robot": partial(decode_table, "decode-robot"),
    "decode-12x1024-plain": partial(decode_table, "decode-12x1024-plain"),
    "decode-12x1024": partial(decode_table, "decode-12x1024"),
    "decode-e2e": partial(decode_table, "decode-e2e"),
    "speed": partial(speed_table, "decode-e2e", "decode-robot"),
    "train-step": partial(train_step_table, "train_step", "train_step-default", "train_step-all", every_label=False),
    "train-step-embedded": partial(train_step_table, "train_step-embedded"),
    "train-step-151936": partial(train_step_table, "train_step-151936"),
    "memory-embedded": partial(memory_table, "memory-embedded"),
    "training": partial(training_table, "train_step-8B", "train_step"),
    "train-step-gpu": partial(train_step_gpu_table, "train_step-0.6B", "train_step-4B", "train_step-8B"),
    "step-kernel": step_kernel_table,
    "compare-embedded": partial(compare_table, "compare_small", "embedded"),
    "shadow-init": shadow_init_table,
    "shadow-text": shadow_text_table,
    "export": export_table,
    "decode-12x1024-gpu": partial(decode_table, "decode-12x1024-gpu"),
    "memory": partial(memory_table, "memory", "memory-default", "memory-151936"),
    "distillation": distillation_table,
    "tasks": tasks_table,
    "system": partial(system_table, "system"),
    "system-distilled": partial(system_table, "system-distilled"),
    "routers": routers_table,
    "serve-load": load_table,
    "cloud-restart": restart_table,
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
