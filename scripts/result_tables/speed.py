"""Tables of time and memory, in decoding and in training."""

from typing import Any

from result_tables.common import result

LABELS = {"answers": "answers", "all": "all positions"}


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
    columns = ("", "H200, 8B: ms/step", "LoRA = 1", "GB beyond the weights", "LoRA = 1")
    columns += ("two cores, 12 x 1024: s/step", "LoRA = 1")
    lines = [f"| {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) - 1)]
    rows, others = ({row["row"]: row for row in result(name)["rows"] if row["labels"] == "answers"} for name in (gpu, cpu))
    lora = rows["LoRA all linear"]["peak_mb"]
    for name, row in rows.items():
        lines.append(
            f"| {name} | {1000 * row['seconds']:,.0f} | {row['ratios']['LoRA all linear']:.2f} | {row['peak_mb'] / 1000:.1f} "
            f"| {row['peak_mb'] / lora:.2f} | {others[name]['seconds']:.2f} | {others[name]['ratios']['LoRA all linear']:.2f} |"
        )
    return "\n".join(lines)


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


def plan_table() -> str:
    columns = ("base", "rows x tokens", "planned MB", "measured MB", "planned / measured", "measured as glibc comes MB")
    rows = [f"| {' | '.join(columns)} |", "|---|---|" + "---:|" * 4]
    for row in result("plan")["rows"]:
        planned, measured, usual = (f"{row[name] / 1e6:,.0f}" for name in ("planned", "measured", "measured_default_malloc"))
        shape = f"{row['batch']} x {row['length']}"
        rows.append(f"| {row['case']} | {shape} | {planned} | {measured} | {row['ratio']:.2f} | {usual} |")
    return "\n".join(rows)
