"""The main job: train a shadow, score base, attached and detached under the same prompts, save."""

import dataclasses
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedTokenizerBase, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from shadowpeft.errors import ConfigError
from shadowpeft.files import remove_leftovers, write_files
from shadowpeft.model import ShadowModel, get_shadow_model
from shadowpeft.model.bases import load_model, load_tokenizer
from shadowpeft.model.positions import within_positions
from shadowpeft.train.arguments import refuse_float16_unasked, shared_arguments
from shadowpeft.train.callbacks import MetricLines, ProgressLine, StopOnInterrupt
from shadowpeft.train.checkpoints import check_run_folder, write_run_file
from shadowpeft.train.config import TrainConfig
from shadowpeft.train.data import (
    AnswerCollator,
    EncodingReport,
    encode_classification,
    encode_generation,
    label_indices,
    load_rows,
)
from shadowpeft.train.tasks import TASKS, Task
from shadowpeft.train.trainer import ShadowTrainer

ADAPTER_FOLDER = "adapter"


@dataclass(kw_only=True)
class Prepared:
    """Everything a run needs before its first step."""

    task: Task
    tokenizer: PreTrainedTokenizerBase
    model: ShadowModel
    label_names: list[str] | None
    train_rows: list[dict[str, Any]]
    test_rows: list[dict[str, Any]]
    examples: list[dict[str, Any]]
    encoding: EncodingReport


@dataclass(kw_only=True)
class Trained:
    """A finished run. ``interrupted`` runs have a checkpoint, but no adapter folder.

    With several processes the model may be sharded: score the saved adapter in one process instead of it.
    """

    prepared: Prepared
    folder: Path
    seconds: float
    steps: int
    final_loss: float | None
    interrupted: bool
    num_processes: int
    is_first: bool


def task_named(name: str) -> Task:
    if name not in TASKS:
        raise ConfigError(f"unknown task {name!r}; choose one of {', '.join(sorted(TASKS))}")
    return TASKS[name]


def prepare(config: TrainConfig) -> Prepared:
    """Reads data and base and builds the adapter; fails before anything is written."""
    task = task_named(config.task)
    source = Path(config.data) if config.data else None
    train_rows = load_rows(task, "train", source=source, limit=config.limit_train, seed=config.seed)
    test_rows = load_rows(task, "test", source=source, limit=config.limit_eval, seed=config.seed)
    tokenizer = load_tokenizer(config.base)
    labels = sorted({task.target(row) for row in train_rows}) if task.kind == "classification" else None
    if labels is not None:
        label_indices(task, test_rows, labels)  # a label that training never sees is found now, not after it
    set_seed(config.seed)
    base = load_model(config.base, labels=labels, dtype=config.dtype)
    refuse_float16_unasked(config, base)
    base.config.pad_token_id = tokenizer.pad_token_id
    model = get_shadow_model(base, _fitting(config, labels))
    length = within_positions(config.max_length, base.config)
    if labels is None:
        examples, encoding = encode_generation(task, tokenizer, train_rows, length)
    else:
        examples, encoding = encode_classification(task, tokenizer, train_rows, labels, length)
    return Prepared(
        task=task,
        tokenizer=tokenizer,
        model=model,
        label_names=labels,
        train_rows=train_rows,
        test_rows=test_rows,
        examples=examples,
        encoding=encoding,
    )


def _fitting(config: TrainConfig, labels: list[str] | None) -> Any:
    return config.shadow.replace(task_type="CAUSAL_LM" if labels is None else "SEQ_CLS")


def _checkpointing(config: TrainConfig) -> dict[str, Any]:
    """Under whichever of its two names this release of transformers has the argument."""
    names = {item.name for item in dataclasses.fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    return {name: config.gradient_checkpointing}


def training_arguments(config: TrainConfig, folder: Path) -> TrainingArguments:
    length: dict[str, Any] = {"num_train_epochs": config.epochs}
    if config.max_steps > 0:
        length = {"max_steps": config.max_steps}
    return shared_arguments(
        config,
        folder,
        **length,
        **_checkpointing(config),
        train_sampling_strategy="group_by_length" if config.group_by_length else "random",
        # Every trained weight has a gradient in every step, so several processes need not look for those without.
        ddp_find_unused_parameters=False,
    )


def make_trainer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[dict[str, Any]],
    arguments: TrainingArguments,
    *,
    callbacks: list[Any],
    head_lr_multiplier: float = 1.0,
) -> ShadowTrainer:
    """The trainer of every method: a shadow here; LoRA, a probe or the whole base in a comparison."""
    trainer = ShadowTrainer(
        model,
        arguments,
        train_dataset=examples,  # type: ignore[arg-type]
        data_collator=AnswerCollator(tokenizer),
        callbacks=callbacks,
        head_lr_multiplier=head_lr_multiplier,
    )
    trainer.pop_callback(PrinterCallback)
    return trainer


def train(config: TrainConfig, *, console: Console | None = None) -> Trained:
    """Trains one adapter in ``config.output`` and saves it to its ``adapter`` folder.

    Ctrl-C stops behind the current step with a checkpoint; the result then says ``interrupted``.

    Raises:
        ShadowPeftError: any of its kinds, before the first step; what was on disk is unchanged.
    """
    folder = Path(config.output)
    arguments = training_arguments(config, folder)
    is_first = arguments.process_index == 0
    console = console if console is not None and is_first else Console(quiet=True)
    checkpoint = check_run_folder(folder, config, num_processes=arguments.world_size)
    prepared = prepare(config)
    # All have looked at the folder before the first one writes to it.
    arguments.distributed_state.wait_for_everyone()  # type: ignore[union-attr]
    if config.resume and checkpoint is None:
        console.print("there is no complete checkpoint yet: starting from the first step")
    if is_first:
        remove_leftovers(folder)
        write_run_file(folder, config)
    tokens_per_row = sum(len(example["input_ids"]) for example in prepared.examples) / len(prepared.examples)
    rows = config.batch_size * config.gradient_accumulation * arguments.world_size
    stop, progress = StopOnInterrupt(), ProgressLine(console, tokens_per_step=tokens_per_row * rows)
    metrics = MetricLines(folder / "metrics.jsonl")
    trainer = make_trainer(
        prepared.model,
        prepared.tokenizer,
        prepared.examples,
        arguments,
        callbacks=[stop, metrics, progress],
        head_lr_multiplier=config.head_lr_multiplier,
    )
    with closing(stop), closing(progress):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = metrics.seconds
    if not stop.stopped:
        trainer.save_adapter(folder / ADAPTER_FOLDER)
        if is_first:
            write_files(folder / ADAPTER_FOLDER, prepared.tokenizer.save_pretrained)
    arguments.distributed_state.wait_for_everyone()  # type: ignore[union-attr]
    # accelerate's autocast would stay on the forward of a model trained in 16 bits, whose scores would not be the adapter's.
    trainer.accelerator.unwrap_model(prepared.model, keep_fp32_wrapper=False)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Trained(
        prepared=prepared,
        folder=folder,
        seconds=seconds,
        steps=trainer.state.global_step,
        final_loss=losses[-1] if losses else None,
        interrupted=stop.stopped,
        num_processes=arguments.world_size,
        is_first=is_first,
    )
