"""`shadowpeft train`: train, score, write the report."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from shadowpeft.evaluate import report as reports
from shadowpeft.evaluate.bars import scoring_bars
from shadowpeft.evaluate.modes import parameters_in_use, score_modes
from shadowpeft.evaluate.record import data_revision, write_record
from shadowpeft.evaluate.score import majority_baseline
from shadowpeft.files import write_files
from shadowpeft.train.allocator import keep_freed_memory
from shadowpeft.train.config import TrainConfig
from shadowpeft.train.run import ADAPTER_FOLDER, Trained
from shadowpeft.train.run import train as run_training


def train(config: TrainConfig, console: Console) -> dict[str, Any] | None:
    """Trains, scores, writes ``report.json``, ``report.md`` and ``curves.png``.

    None if it was interrupted, or trained by several processes, which leave the scoring to one.
    """
    keep_freed_memory()
    trained = run_training(config, console=console)
    console = console if trained.is_first else Console(quiet=True)
    _tell_encoding(trained, console)
    if trained.interrupted:
        # Of several processes the launcher and its own settings are the user's.
        command = "shadowpeft train" if trained.num_processes == 1 else "the same launcher and: train"
        console.print(
            f"stopped at step {trained.steps}; the checkpoint is complete. Go on with: "
            f"{command} --config {trained.folder / 'config.yaml'} --resume",
            soft_wrap=True,
        )
        return None
    if trained.num_processes > 1:
        console.print(
            f"adapter: {trained.folder / ADAPTER_FOLDER}; score it in one process with: shadowpeft eval "
            f"{trained.folder / ADAPTER_FOLDER} --task {config.task}",
            soft_wrap=True,
        )
        return None
    try:
        report = _score_and_write(config, trained, console)
    except KeyboardInterrupt:
        console.print(
            f"stopped while scoring; the adapter is complete: {trained.folder / ADAPTER_FOLDER}. Score it with: "
            f"shadowpeft train --config {trained.folder / 'config.yaml'} --resume",
            soft_wrap=True,
        )
        raise
    written = f"adapter: {trained.folder / ADAPTER_FOLDER}   report: {trained.folder / 'report.md'}"
    console.print(written, soft_wrap=True)
    return report


def _tell_encoding(trained: Trained, console: Console) -> None:
    encoding = trained.prepared.encoding
    if encoding.num_prompts_truncated or encoding.num_targets_truncated or encoding.num_dropped:
        console.print(
            f"of {encoding.num_rows} training rows, {encoding.num_prompts_truncated} prompts and "
            f"{encoding.num_targets_truncated} answers were cut to fit, {encoding.num_dropped} rows left out"
        )


def _score_and_write(config: TrainConfig, trained: Trained, console: Console) -> dict[str, Any]:
    prepared = trained.prepared
    with scoring_bars(console) as progress:
        scores = score_modes(
            prepared.model,
            prepared.tokenizer,
            prepared.task,
            prepared.test_rows,
            label_names=prepared.label_names,
            max_length=config.max_length,
            batch_size=config.eval_batch_size,
            progress=progress,
        )
    parameters = parameters_in_use(prepared.model)
    majority = majority_baseline(prepared.task, prepared.train_rows, prepared.test_rows)
    report = {
        "task": prepared.task.name,
        "metric": next(iter(scores.values())).headline,
        "config": config.to_dict(),
        "train_minutes": round(trained.seconds / 60, 2),
        "steps": trained.steps,
        "final_loss": trained.final_loss,
        "num_train_rows": len(prepared.train_rows),
        "num_test_rows": len(prepared.test_rows),
        "train_revision": data_revision(prepared.train_rows),
        "test_revision": data_revision(prepared.test_rows),
        "encoding": dataclasses.asdict(prepared.encoding),
        "parameters": parameters,
        "majority": majority,
        "scores": {mode: dataclasses.asdict(score) for mode, score in scores.items()},
    }
    write_record(trained.folder / "report.json", report)
    write_files(trained.folder, partial(_write_readable, report, trained.folder / "metrics.jsonl"))
    console.print(reports.results_table(scores, parameters, majority))
    console.print(f"trained for {report['train_minutes']} minutes, {trained.steps} steps")
    return report


def _write_readable(report: dict[str, Any], metrics: Path, folder: Path) -> None:
    (folder / "report.md").write_text(reports.markdown_table(report), encoding="utf-8")
    reports.draw_curves(metrics, folder / "curves.png")
