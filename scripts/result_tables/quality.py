"""Tables of how good the models are."""

import json
from pathlib import Path
from typing import Any

from result_tables.common import ROOT, percent, result
from shadowpeft.evaluate.compare.recipe import read_recipe
from shadowpeft.train.tasks import TASKS

TASK_RESULTS = ("home_commands", "trec", "clinc150")
MODES = ("base", "attached", "detached")
NAMES = {"none": "untouched base", "probe": "linear probe", "full": "all weights", "lora": "LoRA",
          "dora": "DoRA", "paper": "shadow, the paper's formula",
         "shadow": "shadow, `recommended`", "shadow (detached)": "the same, detached",
         "attached": "shadow, `attached`", "attached (detached)": "`attached`, detached",
         "sublayers": "shadow, `sublayers`", "sublayers (detached)": "`sublayers`, detached"}  # fmt: skip


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


# Tasks whose validation rows the presets `recommended` and `attached` were chosen by.
CHOSEN_BY = ("trec", "clinc150", "home_commands", "home_calls", "clinc150_calls")
OTHERS = ("paper", "shadow", "attached", "sublayers")
AGAINST_DORA = ("shadow", "sublayers")


def compare_table(name: str, base: str, leave_out: tuple[str, ...] = ()) -> str:
    """A comparison's main table, a line a task: scores, and what attached shadows are above LoRA and DoRA; means over seeds.

    The rest (detached shadows' differences, p) is in the report beside the file.
    """
    rows = [row for row in result(f"{name}/summary")["tables"]["main"] if row["base"] == base]
    # Of a task that is still under way there may be the untouched base alone.
    tasks = list(dict.fromkeys(row["task"] for row in rows if row["task"] is not None and row["method"] == "lora"))
    means = list(dict.fromkeys(heading_of(row) for row in rows if row["task"] is None))
    cells = {(row["method"], heading_of(row)): row for row in rows}
    methods = [method for method in NAMES if method in {row["method"] for row in rows} - set(leave_out)]
    others = [method for method in OTHERS if method in methods]
    entries = read_recipe(ROOT / "recipes" / f"{name}.yaml").tasks
    kinds = {entry: TASKS[spec.task].kind for entry, spec in entries.items()}
    heads = [NAMES.get(method, method) for method in methods]
    heads += [f"{NAMES[method]}, above LoRA" for method in others]
    against_dora = [method for method in AGAINST_DORA if method in methods and "dora" in methods]
    heads += [f"{NAMES[method]}, above DoRA" for method in against_dora]
    lines = [f"| task | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    usual = max((len(row["seeds"]) for row in rows if row["task"] in tasks), default=0)
    for task in [*tasks, *means]:
        scores = {method: cells.get((method, task)) for method in methods}
        if task in means:  # only of the tasks that all have
            largest = max(row["num_tasks"] for row in scores.values() if row is not None)
            scores = {method: row if row and row["num_tasks"] == largest else None for method, row in scores.items()}
        shown = [score_and_seeds(row, usual) for row in scores.values()]
        shown += [gap_of(scores[method]) for method in others]
        shown += [gap_of(cells.get((method, task)), "dora") for method in against_dora]
        lines.append(f"| {task if task in means else named(task, kinds, scores['lora']['metric'])} | {' | '.join(shown)} |")
        if task in tasks:
            lines += other_metrics(named(task, kinds, "{}"), scores, len(heads))
    return "\n".join([*lines, "", notes(rows, tasks, usual)])


def named(task: str, kinds: dict[str, str], metric: str) -> str:
    answered = {"classification": "class", "choice": "choice", "generation": "written"}[kinds[task]]
    return f"{task}{'†' if task in CHOSEN_BY else ''} ({answered}), {metric}"


def score_and_seeds(row: dict[str, Any] | None, usual: int) -> str:
    if row is None:
        return "-"
    fewer = f" ({len(row['seeds'])} seeds)" if row["task"] and row["method"] != "none" and len(row["seeds"]) != usual else ""
    return percent(row["score"]["value"]) + fewer


def gap_of(row: dict[str, Any] | None, other: str | None = None) -> str:
    """What a line of the main table has above LoRA, or above another baseline; of means only over as many tasks."""
    if row is None:
        return "-"
    gap = row["difference"] if other is None else row["further"].get(other)
    if gap is None:
        return "-"
    has_fewer = other is not None and row["task"] is None and row["further_num_tasks"][other] != row["num_tasks"]
    return above(gap) + (f" ({row['further_num_tasks'][other]} tasks)" if has_fewer else "")


def other_metrics(name: str, scores: dict[str, dict[str, Any] | None], width: int) -> list[str]:
    """A line for each further metric of a task, without differences."""
    first = next(row for row in scores.values() if row is not None)
    lines = []
    for metric in first["other_metrics"]:
        values = [percent(row["other_metrics"][metric]) if row is not None else "-" for row in scores.values()]
        values += [""] * (width - len(values))
        lines.append(f"| {name.format(metric.replace('_', ' '))} | {' | '.join(values)} |")
    return lines


def notes(rows: list[dict[str, Any]], tasks: list[str], usual: int) -> str:
    most = max(row["rows"] for row in rows if row["task"] in tasks)
    of_task = {row["task"]: row["rows"] for row in rows if row["task"] in tasks}
    fewer = {task: count for task, count in of_task.items() if count < most}
    said = f"{usual} seeds where nothing else is said; "
    if len(fewer) < len(of_task) / 2:
        said += f"{most:,} test rows a task" + (f" ({_listed(fewer)})" if fewer else "")
    else:
        said += f"test rows: {_listed(of_task)}"
    chosen = " † The preset was chosen on validation rows of this task." if any(task in CHOSEN_BY for task in tasks) else ""
    return f"{said}; in brackets 95% intervals.{chosen}"


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def heading_of(row: dict[str, Any]) -> str:
    return row["task"] or f"**mean of {row['mean_of']}**"


def transfer_table(name: str, base: str) -> str:
    """A line for what was trained on, a column for what was scored: score and, in nats a token, the right answer's loss."""
    rows = [row for row in result(f"{name}/summary")["tables"]["transfer"] if row["base"] == base]
    scored = list(dict.fromkeys(row["scored"] for row in rows))
    metrics = {row["scored"]: row["metric"] for row in rows}
    found = {(row["task"], row["method"], row["scored"]): row for row in rows}
    heads = " | ".join(f"{task}, {metrics[task]}" for task in scored)
    lines = [f"| trained on | method | {heads} |", "|---|---|" + "---:|" * len(scored)]
    untouched = [next((row for row in rows if row["method"] == "none" and row["scored"] == task), None) for task in scored]
    lines.append(f"| nothing | {NAMES['none']} | {' | '.join(map(score_and_loss, untouched))} |")
    for task, method in dict.fromkeys((row["task"], row["method"]) for row in rows if row["method"] != "none"):
        cells = " | ".join(score_and_loss(found.get((task, method, each))) for each in scored)
        lines.append(f"| {task} | {NAMES.get(method, method)} | {cells} |")
    return "\n".join(lines)


def score_and_loss(row: dict[str, Any] | None) -> str:
    return "-" if row is None else f"{percent(row['score']['value'])} ({row['answer_loss']:.2f})"


def ablations_table(name: str, base: str) -> str:
    """A line for what was changed, a column a task: the score, the unchanged method's with the same seeds, the difference."""
    rows = [row for row in result(f"{name}/summary")["tables"]["ablations"] if row["base"] == base and row.get("unchanged")]
    tasks = list(dict.fromkeys(row["scored"] for row in rows))
    found = {(row["variant"], row["scored"]): row for row in rows}
    lines = [f"| changed | weights | {' | '.join(tasks)} |", "|---|---:|" + "---:|" * len(tasks)]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        cells = [found.get((variant, task)) for task in tasks]
        first = next(row for row in cells if row is not None)
        weights = first["trainable"] / first["unchanged_trainable"] - 1
        shown = " | ".join("-" if row is None else with_unchanged(row) for row in cells)
        lines.append(f"| {variant} | {'' if abs(weights) < 0.005 else f'{weights:+.0%}'} | {shown} |")
    return "\n".join(lines)


def with_unchanged(row: dict[str, Any]) -> str:
    seeds = "" if len(row["seeds"]) == 3 else f" ({len(row['seeds'])} seeds)"
    score, unchanged = percent(row["score"]["value"]), percent(row["unchanged"]["value"])
    return f"{score}{seeds}, unchanged {unchanged}: {above(row['difference'])}"


def scaling_table(name: str, base: str) -> str:
    """Scores of each method at each budget, a line a task and method; 95% intervals."""
    rows = [row for row in result(f"{name}/summary")["tables"]["scaling"] if row["base"] == base]
    budgets = sorted({int(row["variant"]) for row in rows})
    found = {(row["scored"], row["method"], int(row["variant"])): row for row in rows}
    lines = [f"| task | method | {' | '.join(f'{budget:,}' for budget in budgets)} |", "|---|---|" + "---:|" * len(budgets)]
    for task, method in dict.fromkeys((row["scored"], row["method"]) for row in rows):
        cells = [found.get((task, method, budget)) for budget in budgets]
        if sum(cell is not None for cell in cells) < 2:
            continue  # of a task whose other budgets are still to be run, the main table's alone
        shown = ["-" if row is None else with_range(row["score"]) for row in cells]
        lines.append(f"| {task} | {NAMES.get(method, method)} | {' | '.join(shown)} |")
    return "\n".join(lines)


def with_range(score: dict[str, float]) -> str:
    return f"{percent(score['value'])} [{percent(score['low'])}, {percent(score['high'])}]"


def latency_table(name: str, base: str) -> str:
    """Milliseconds of prefill and of a further token, a line a variant, and what they are of the base's."""
    rows = [row for row in result(f"{name}/summary")["tables"]["latency"] if row["base"] == base]
    sizes = list(dict.fromkeys(row["batch_size"] for row in rows))
    found = {(row["variant"], row["batch_size"]): row for row in rows}
    heads = [f"batch {size}: {what}" for size in sizes for what in ("prefill ms", "ms a token", "time, base = 1")]
    lines = [f"| | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        shown = []
        for size in sizes:
            row, reference = found[variant, size], found["base", size]
            ratio = row["token_ms"] / reference["token_ms"]
            shown += [f"{row['prefill_ms']:.1f}", f"{row['token_ms']:.2f}", f"{ratio:.2f}"]
        lines.append(f"| {variant} | {' | '.join(shown)} |")
    tokens = f"{rows[0]['prompt_tokens']} tokens of prompt, {rows[0]['new_tokens']} new ones"
    return "\n".join([*lines, "", f"{tokens}; medians of {rows[0]['rounds']} rounds.{tokens_a_pass(rows)}"])


def tokens_a_pass(rows: list[dict[str, Any]]) -> str:
    """What each drafting variant gains in a pass of the base, where that was counted (results of before do not have it)."""
    counted = [
        f"{row['variant'].partition(' (')[0]} {row['tokens_a_pass']:.2f} (batch {row['batch_size']})"
        for row in rows
        if row.get("tokens_a_pass") is not None
    ]
    return f" Tokens that a pass of the base over four drafts brings: {', '.join(counted)}." if counted else ""


def preset_table() -> str:
    """recipes/preset_study.py: exact answers of validation rows after trainings of full length."""
    columns = ("task", "steps", "correction", "weights", "attached", "95% interval", "detached", "rows")
    lines = [f"| {' | '.join(columns)} |", "|---|---:|---|---|" + "---:|" * 4]
    for cell in result("preset_study")["cells"]:
        low, high = cell["attached"]["interval"]
        attached, detached = (percent(cell[mode]["score"]) for mode in ("attached", "detached"))
        shown = f"{attached} | {percent(low)} - {percent(high)} | {detached}"
        made = f"{'linear' if cell['formula'] == 'linear' else 'SiLU'} | {described(cell['changes'])}"
        lines.append(f"| {cell['task']} | {cell['steps']:,} | {made} | {shown} | {cell['num_rows']} |")
    return "\n".join(lines)


def above(difference: dict[str, float]) -> str:
    return f"{100 * difference['value']:+.1f} [{100 * difference['low']:+.1f}, {100 * difference['high']:+.1f}]"


def trials_table(name: str) -> str:
    """Every trial of a search with whatever it sets, as answer losses on validation rows, attached / detached."""
    rows = [row for row in result(f"{name}/summary")["tables"]["search"] if row.get("parameters") is None]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    found = {(row["method"], described(row["setting"]), row["task"]): row for row in rows}
    lines = [f"| | setting | {' | '.join(tasks)} |", "|---|---|" + "---:|" * len(tasks)]
    for method, setting in dict.fromkeys((method, setting) for method, setting, _ in found):
        cells = [found.get((method, setting, task)) for task in tasks]
        shown = ["-" if one is None else f"**{losses(one)}**" if one["is_chosen"] else losses(one) for one in cells]
        lines.append(f"| {NAMES.get(method, method)} | {setting} | {' | '.join(shown)} |")
    return "\n".join(lines)


def chosen_table(name: str) -> str:
    """A line a method, a column for each base and task: the lower answer loss of its trials on validation rows."""
    rows = [row for row in result(f"{name}/summary")["tables"]["search"] if row["loss"] is not None]
    rows = sorted(rows, key=lambda row: -row["loss"])
    places = sorted({(row["base"], row["task"]) for row in rows})
    found = {(row["method"], row["base"], row["task"]): row for row in rows}
    lines = [f"| | {' | '.join(f'{base}: {task}' for base, task in places)} |", "|---|" + "---:|" * len(places)]
    for method in read_recipe(ROOT / "recipes" / f"{name}.yaml").methods:
        cells = [found.get((method, *place)) for place in places]
        if not any(cells):
            continue
        shown = ["-" if one is None else losses(one) for one in cells]
        lines.append(f"| {NAMES.get(method, method)} | {' | '.join(shown)} |")
    return "\n".join(lines)


SHORT = {"auxiliary_loss_weight": "lambda", "shadow_alpha": "alpha"}


def described(setting: dict[str, float]) -> str:
    return ", ".join(f"{SHORT.get(name, name)} {value:g}" for name, value in setting.items())


def losses(trial: dict[str, Any]) -> str:
    detached = "" if trial["detached_loss"] is None else f" / {trial['detached_loss']:.3f}"
    return f"{trial['loss']:.3f}{detached}"
