"""`shadowpeft eval`: score a saved adapter."""

import dataclasses
from pathlib import Path

from rich.console import Console

from shadowpeft.errors import ConfigError
from shadowpeft.evaluate import report as reports
from shadowpeft.evaluate.bars import scoring_bars
from shadowpeft.evaluate.modes import check_modes, parameters_in_use, score_modes
from shadowpeft.evaluate.record import write_record
from shadowpeft.model import ShadowModel
from shadowpeft.model.adapter_config import describe_base, label_names
from shadowpeft.model.load import load_with_tokenizer
from shadowpeft.train.data import load_rows
from shadowpeft.train.run import task_named
from shadowpeft.train.tasks import TASKS, Task


def evaluate(
    adapter: str,
    console: Console,
    *,
    task: str,
    data: str | None,
    base: str | None,
    modes: list[str],
    split: str,
    limit: int | None,
    batch_size: int,
    max_length: int,
    output: Path | None,
    allow_other_weights: bool,
    device: str | None = None,
) -> None:
    """Scores a saved adapter and prints the table."""
    chosen = task_named(task)
    modes = list(check_modes(modes))
    rows = load_rows(chosen, split, source=Path(data) if data else None, limit=limit)
    model, tokenizer = load_with_tokenizer(adapter, base=base, allow_other_weights=allow_other_weights, device=device)
    check_kind(chosen, model)
    labels = None
    if chosen.kind == "classification":
        labels = label_names(describe_base(model.base))
    with scoring_bars(console) as progress:
        scores = score_modes(
            model,
            tokenizer,
            chosen,
            rows,
            modes=modes,
            label_names=labels,
            max_length=max_length,
            batch_size=batch_size,
            progress=progress,
        )
    console.print(reports.results_table(scores, parameters_in_use(model), None))
    if output is not None:
        payload = {mode: dataclasses.asdict(score) for mode, score in scores.items()}
        write_record(output, {"adapter": Path(adapter).name, "task": task, "split": split, "scores": payload})


def check_kind(task: Task, model: ShadowModel) -> None:
    """Raises ConfigError where a classifier is to write, or a language model to classify."""
    if (task.kind == "classification") != (not model.can_generate()):
        kind = "a language model" if model.can_generate() else "a classifier"
        writes = model.can_generate()
        fitting = [name for name, other in sorted(TASKS.items()) if (other.kind != "classification") == writes]
        raise ConfigError(
            f"the adapter belongs to {kind}, which cannot answer task {task.name!r}; choose one of {', '.join(fitting)}"
        )
