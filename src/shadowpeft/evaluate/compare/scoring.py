"""Scores of a trained model, as a result file holds them."""

from collections import Counter
from dataclasses import asdict
from typing import Any

from shadowpeft.evaluate.compare.loss import answer_loss
from shadowpeft.evaluate.compare.plan import Cell
from shadowpeft.evaluate.compare.results import as_text
from shadowpeft.evaluate.compare.store import Store
from shadowpeft.evaluate.compare.training import Fitted, Payload
from shadowpeft.evaluate.record import data_revision
from shadowpeft.evaluate.result import Answers, Evaluation, scored
from shadowpeft.evaluate.score import evaluate, majority_baseline
from shadowpeft.train.answers import Row


def score(fitted: Fitted, model: Any, cell: Cell, store: Store, name: str) -> Evaluation:
    rows = scored_rows(store, cell, name)
    if store.recipe.methods[cell.method].kind == "none" and fitted.labels is not None:
        return _most_frequent(store, name, rows)
    return evaluate_rows(fitted, model, store, name, rows)


def evaluate_rows(fitted: Fitted, model: Any, store: Store, name: str, rows: list[Any]) -> Evaluation:
    return evaluate(
        model,
        fitted.tokenizer,
        store.task(name),
        rows,
        label_names=fitted.labels,
        max_length=fitted.config.max_length,
        batch_size=fitted.config.eval_batch_size,
    )


def scored_rows(store: Store, cell: Cell, name: str) -> list[Row]:
    """The rows of a task entry that a cell is scored on."""
    return store.rows(name, "test", store.recipe.train_config(cell.base, name, cell.method).limit_eval)


def _most_frequent(store: Store, name: str, rows: list[Any]) -> Evaluation:
    """An untouched base has no head for the labels; what one knows without training is the most frequent of them."""
    task = store.task(name)
    label = Counter(task.target(row) for row in store.rows(name, "train")).most_common(1)[0][0]
    return scored(task, rows, Answers(texts=[label] * len(rows), num_truncated=0, seconds=0.0, num_tokens=0))


def loss_options(fitted: Fitted) -> Payload:
    return {
        "labels": fitted.labels,
        "max_length": fitted.config.max_length,
        "batch_size": fitted.config.eval_batch_size,
    }


def described(evaluation: Evaluation, fitted: Fitted, model: Any, cell: Cell, store: Store, name: str) -> Payload:
    """An evaluation as a result file holds it: metrics, and a number for each row to pair methods by."""
    task = store.task(name)
    rows = scored_rows(store, cell, name)
    told = asdict(evaluation)
    generations = told.pop("generations")
    if task.corpus is not None and task.corpus.name == task.metric:
        counts = task.corpus.counts([row["extracted"] for row in generations], rows)
        told["counts"] = [as_text(each) for each in counts]
    else:
        told["values"] = as_text(row["score"][task.metric] for row in generations)
    is_untrained_class = fitted.labels is not None and not fitted.trainable
    told["answer_loss"] = (
        None if is_untrained_class else answer_loss(model, fitted.tokenizer, task, rows, **loss_options(fitted))
    )
    told["majority"] = majority_baseline(task, store.rows(name, "train"), rows) if fitted.labels is not None else None
    told["revision"] = data_revision(rows)
    return told
