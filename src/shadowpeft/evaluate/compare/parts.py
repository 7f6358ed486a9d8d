"""From tables to texts: what each part of a report says, row by row."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from shadowpeft.evaluate.compare.gather import DETACHED, Gathered
from shadowpeft.evaluate.compare.recipe import Recipe
from shadowpeft.evaluate.compare.results import has_diverged
from shadowpeft.evaluate.compare.statistics import Estimate
from shadowpeft.evaluate.compare.tables import heading_of

Entry = dict[str, Any]
Part = tuple[str, str, list[str], list[list[str]]]  # heading, text above, columns, rows

METHOD_NOTE = (
    "Scores are means over seeds, times 100, with a 95% interval: a bootstrap over rows, and Student's t over seeds (with "
    "one seed, rows alone). Differences are paired: the same of the differences seed by seed, on the same rows; p is "
    "two-sided, from the same draws, behind it Holm's correction for the tasks of that row. Means are over tasks of one "
    "kind; that of written answers mixes their metrics."
)


# ---------------------------------------------------------------- numbers


def _score(found: Estimate) -> str:
    return f"{100 * found.value:.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def _gap(found: Estimate | None) -> str:
    if found is None:
        return ""
    p = "" if found.p is None else f" p{_p(found.p)}"
    p += "" if found.p_holm is None else f" (Holm {_p(found.p_holm).removeprefix('=')})"
    return f"{100 * found.value:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]{p}"


def _p(value: float) -> str:
    return "<0.001" if value < 0.001 else f"={value:.3f}"


def _number(value: float | None, form: str = ",.1f") -> str:
    return "" if value is None else format(value, form)


# ---------------------------------------------------------------- parts


def report_parts(gathered: Gathered, tables: dict[str, list[Entry]]) -> list[Part]:
    parts = []
    for base in dict.fromkeys(entry["base"] for entry in tables["main"]):
        parts += _main_parts(gathered, base, [entry for entry in tables["main"] if entry["base"] == base])
    others = [_metrics_part(tables), _transfer_part(gathered.recipe, tables), _scaling_part(gathered.recipe, tables)]
    others += [_ablation_part(tables), _latency_part(tables), _cost_part(tables), _search_part(tables)]
    parts += [part for part in others if part]
    failed = _failed_part(gathered)
    return [*parts, failed] if failed else parts


def _main_parts(gathered: Gathered, base: str, entries: list[Entry]) -> list[Part]:
    recipe = gathered.recipe
    failed = ((cell, result) for cell, result in gathered.failed if cell.section in ("main", "transfer"))
    diverged = Counter((cell.base, cell.task, cell.method) for cell, result in failed if has_diverged(result))
    scored = list(dict.fromkeys(heading_of(entry) for entry in entries if entry["scored"]))
    means = list(dict.fromkeys(heading_of(entry) for entry in entries if not entry["scored"]))
    largest = {mean: max(entry["num_tasks"] for entry in entries if heading_of(entry) == mean) for mean in means}
    methods = list(dict.fromkeys(entry["method"] for entry in entries))
    found = {(entry["method"], heading_of(entry)): entry for entry in entries}
    metrics = {heading_of(entry): entry["metric"] for entry in entries if entry["scored"]}
    columns = ["method", *(f"{name} ({metrics[name]})" for name in scored), *means]
    usual = len(recipe.sections.get("main", {}).get("seeds", recipe.seeds))

    def row(method: str, value: Callable[[Entry], str]) -> list[str]:
        texts = []
        for name in (*scored, *means):
            cell = found.get((method, name))
            texts.append(value(cell) if cell else "")
            is_counted = name in scored and not recipe.is_untrained(method)
            if cell and texts[-1] and is_counted and len(cell["seeds"]) != usual:
                texts[-1] += f" (seeds: {len(cell['seeds'])})"
            lost = diverged[base, cell["task"], method.removesuffix(DETACHED)] if cell and name in scored else 0
            texts[-1] += f" (diverged: {lost})" if lost else ""
            if cell and name in means and cell["num_tasks"] < largest[name]:
                texts[-1] += f" ({cell['num_tasks']} tasks)"
        return [method, *texts]

    said = f"{METHOD_NOTE} Seeds: {usual} where nothing else is said."
    return [
        (f"Main table: {base}", said, columns, [row(method, lambda cell: _score(cell["score"])) for method in methods]),
        (
            f"Difference to {recipe.baseline}: {base}",
            "",
            columns,
            [row(method, lambda cell: _gap(cell["difference"])) for method in methods if method != recipe.baseline],
        ),
        *(
            (
                f"Difference to {other}: {base}",
                "Of the seeds that both have; means are over the tasks that both have.",
                columns,
                [row(each, lambda cell, other=other: _gap(cell["further"].get(other))) for each in methods if each != other],
            )
            for other in recipe.further_baselines
            if other in methods
        ),
    ]


def _metrics_part(tables: dict[str, list[Entry]]) -> Part | None:
    rows = [
        [entry["method"], entry["base"], entry["scored"], name.replace("_", " "), f"{100 * value:.1f}"]
        for entry in tables["main"]
        if entry["scored"]
        for name, value in entry["other_metrics"].items()
    ]
    text = "What else a task measures beside the metric of the main table; means over seeds, times 100."
    return ("Other metrics", text, ["method", "base", "task", "metric", "mean"], rows) if rows else None


def _transfer_part(recipe: Recipe, tables: dict[str, list[Entry]]) -> Part | None:
    entries = sorted(tables["transfer"], key=lambda e: (e["base"], e["scored"], e["task"], e["method"]))
    # The untouched base is the same whatever it was "trained" on.
    shown = {(e["base"], e["scored"], "" if recipe.is_untrained(e["method"]) else e["task"], e["method"]): e for e in entries}
    rows = [
        [entry["base"], entry["method"], task or "nothing", entry["scored"], f"{len(entry['seeds'])}", _score(entry["score"]),
         _number(entry["answer_loss"], ".3f"), _gap(entry["difference"]) if task else ""]
        for (_, _, task, _), entry in shown.items()
    ]  # fmt: skip
    text = (
        "Trained on one task, scored on it and on the others under their own prompts. Loss: nats a token of the right answer."
    )
    columns = ["base", "method", "trained on", "scored on", "seeds", "score", "answer loss", "difference to the baseline"]
    return ("Transfer", text, columns, rows) if rows else None


def _scaling_part(recipe: Recipe, tables: dict[str, list[Entry]]) -> Part | None:
    rows = [
        [entry["base"], entry["scored"], entry["method"], f"{entry['trainable']:,}", _score(entry["score"])]
        for entry in sorted(tables["scaling"], key=lambda e: (e["base"], e["scored"], e["trainable"], e["method"]))
    ]
    searched = "each" if recipe.sections.get("scaling", {}).get("search", True) else "the main table's"
    text = f"Settings are those found by a search at {searched} budget."
    return ("Scaling", text, ["base", "task", "method", "trained parameters", "score"], rows) if rows else None


def _ablation_part(tables: dict[str, list[Entry]]) -> Part | None:
    rows = [
        [entry["variant"], entry["method"], entry["base"], entry["scored"], _more_weights(entry), _score(entry["score"]),
         _score(entry["unchanged"]) if "unchanged" in entry else "", _gap(entry["difference"])]
        for entry in sorted(tables["ablations"], key=lambda e: (e["base"], e["scored"]))
    ]  # fmt: skip
    text = (
        "One thing changed, all else (given sizes and searched settings too) as in the main table; what is changed can add "
        "weights or take some away. The unchanged method's score is of the same seeds."
    )
    columns = ["variant", "of", "base", "task", "trained parameters", "score", "unchanged", "difference to unchanged"]
    return ("Ablations", text, columns, rows) if rows else None


def _more_weights(entry: Entry) -> str:
    before = entry.get("unchanged_trainable")
    return f"{entry['trainable']:,}" + ("" if not before else f" ({entry['trainable'] / before - 1:+.0%})")


def _latency_part(tables: dict[str, list[Entry]]) -> Part | None:
    rows = [
        [entry["variant"], entry["base"], f"{entry['batch_size']}", f"{entry['prompt_tokens']}",
         _number(entry["prefill_ms"], ",.2f"), _number(entry["token_ms"], ",.3f"), _number(entry.get("equal_tokens"), ".2%"),
         _number(entry.get("tokens_a_pass"), ".2f")]
        for entry in tables["latency"]
    ]  # fmt: skip
    columns = ["variant", "base", "batch", "prompt tokens", "prefill ms", "ms a token", "drafted as plain", "tokens a pass"]
    text = (
        "Medians over rounds in which every variant ran once. Drafted as plain: tokens that are those of plain decoding. "
        "Tokens a pass: what a row gains in one pass of the base, 1 if no draft stands."
    )
    return ("Latency", text, columns, rows) if rows else None


def _cost_part(tables: dict[str, list[Entry]]) -> Part | None:
    rows = [
        [entry["method"], entry["base"], entry["task"], f"{entry['trainable']:,}", _number(entry["target"], ","),
         _number(entry["minutes"], ".2f"), _number(entry["peak_memory_mib"], ",.0f"),
         _number(entry["tokens_per_second"], ",.0f"),
         _setting(entry["setting"])]
        for entry in tables["cost"]
    ]  # fmt: skip
    columns = ["method", "base", "task", "trained parameters", "budget"]
    columns += ["train minutes", "peak MiB", "tokens/s", "chosen"]
    text = (
        "Means over seeds. Peak: memory of the whole process while training (allocated memory on an accelerator). "
        "Cells that ran beside others share the machine, so minutes and tokens/s compare only roughly."
    )
    return ("Cost and chosen settings", text, columns, rows) if rows else None


def _search_part(tables: dict[str, list[Entry]]) -> Part | None:
    rows = [
        [entry["method"], entry["base"], entry["task"], _number(entry["parameters"], ","), _setting(entry["setting"]),
         _number(entry["loss"], ".3f"),
         _number(entry["detached_loss"], ".3f"), "" if entry["metric"] is None else f"{100 * entry['metric']:.1f}",
         ("yes, the range's end" if entry["is_end"] else "yes") if entry["is_chosen"] else ""]
        for entry in tables["search"]
    ]  # fmt: skip
    columns = ["method", "base", "task", "other budget", "setting", "answer loss", "of the detached shadow", "metric", "chosen"]
    text = "Trials on validation rows, one seed that no final run uses. Loss: nats a token of the right answer."
    return ("Search", text, columns, rows) if rows else None


def _setting(setting: Entry) -> str:
    def said(value: Any) -> str:
        return f"{value:g}" if isinstance(value, float | int) else f"{value}"

    return ", ".join(f"{name} {said(value)}" for name, value in setting.items())


def _failed_part(gathered: Gathered) -> Part | None:
    rows = [[cell.id, "failed", result["error"][-1]] for cell, result in gathered.failed]
    rows += [[cell.id, "not run yet", ""] for cell in gathered.missing]
    return ("Failed and missing cells", "", ["cell", "state", "last line"], rows) if rows else None
