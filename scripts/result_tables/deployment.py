"""Tables of what is served, exported and supported."""

from result_tables.common import percent, result, three_digits


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


def system_short_table() -> str:
    """The system beside both clouds and the edge, for the README."""
    columns = ("task", "LoRA cloud", "attached cloud", "edge alone", "edge and cloud", "to the cloud",
               "time, attached cloud = 1")  # fmt: skip
    rows = [f"| {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) - 1)]
    for task, report in result("system")["tasks"].items():
        systems = report["replayed"]["systems"]
        names = ("LoRA, merged", "attached", "edge only", "edge and cloud")
        accuracies = (percent(systems[name]["accuracy_in_scope"]) for name in names)
        both = systems["edge and cloud"]
        cells = (task, *accuracies, f"{percent(both['escalated_in_scope'])}%", f"{both['time_against']['attached']:.2f}")
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
