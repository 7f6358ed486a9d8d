"""Pretraining a shadow: a small model behind the large one's frozen head (Eq. 11), saved so that it attaches."""

import os
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback

from shadowpeft.core import ShadowConfig, ShadowNetwork
from shadowpeft.errors import ConfigError
from shadowpeft.files import remove_leftovers
from shadowpeft.model.architectures import decoder_of
from shadowpeft.model.bases import load_model, load_tokenizer, location
from shadowpeft.model.build import build_network
from shadowpeft.model.positions import within_positions
from shadowpeft.model.pretrained import check_same_tokenizer, is_projected, read_projection, read_raw_config
from shadowpeft.model.projected import write_pretrained
from shadowpeft.model.projection import projection_between
from shadowpeft.train.arguments import refuse_float16_unasked, shared_arguments
from shadowpeft.train.callbacks import MetricLines, ProgressLine, StopOnInterrupt
from shadowpeft.train.checkpoints import check_run_folder, write_run_file
from shadowpeft.train.pretrain_config import PretrainConfig
from shadowpeft.train.projected_shadow import ProjectedShadow
from shadowpeft.train.saving import SafeTrainer
from shadowpeft.train.text import PackedText

SHADOW_FOLDER = "shadow"
CHECKPOINT_WEIGHTS = ("model.safetensors",)


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A finished run; ``folder`` holds the shadow in ``shadow/`` unless it was interrupted."""

    folder: Path
    record: dict[str, Any]
    interrupted: bool

    @property
    def shadow(self) -> Path:
        return self.folder / SHADOW_FOLDER


def run(config: PretrainConfig, console: Console | None = None) -> Pretrained:
    """Pretrains in ``config.output``; ``shadow/`` in it is what ``ShadowConfig(shadow_model=...)`` attaches.

    Raises:
        ShadowPeftError: any of its kinds, before the first step.
    """
    _refuse_several_processes()
    console = console or Console(quiet=True)
    if not config.data and config.steps:
        raise ConfigError("pretraining needs text: pass data with a file, a folder or hub:NAME")
    folder = Path(config.output)
    checkpoint = check_run_folder(folder, config, weights=CHECKPOINT_WEIGHTS)
    set_seed(config.seed)
    base, network, tokenizer, small = prepare(config)
    record: dict[str, Any] = {"config": _public(config), "base": Path(config.base).name}
    if network.projection is not None and config.initial_projection == "pinv" and small is not None:
        solved = projection_between(base, small)
        with torch.no_grad():
            network.projection.weight.copy_(solved.weight)
        record |= {"initial_relative_residual": solved.relative_residual, "initial_rank": solved.rank}
        console.print(f"Eq. 12: relative residual {solved.relative_residual:.4f}, rank {solved.rank}")
    remove_leftovers(folder)
    write_run_file(folder, config)
    stopped, losses, seconds, steps = _train(config, base, network, tokenizer, small, folder, checkpoint, console)
    record |= {"steps": steps, "seconds": round(seconds, 1), "last_loss": losses[-1] if losses else None}
    if not stopped:
        write_pretrained(base, network, folder / SHADOW_FOLDER, tokenizer=tokenizer, record=record)
        console.print(f"pretrained shadow: {folder / SHADOW_FOLDER}", markup=False)
    else:
        console.print(f"stopped at step {steps}; the checkpoint is complete, go on with --resume")
    return Pretrained(folder=folder, record=record, interrupted=stopped)


def _refuse_several_processes() -> None:
    """Before anything is read or written: all of them would read the same text and write the same files.

    Raises:
        ConfigError: a launcher started more than one.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count > 1:
        raise ConfigError(f"pretraining runs in one process, and {count} were launched; start it without a launcher")


def prepare(
    config: PretrainConfig,
) -> tuple[PreTrainedModel, ShadowNetwork, PreTrainedTokenizerBase, PreTrainedModel | None]:
    """(base, network in fp32, tokenizer, the small model with its own head or None).

    Raises:
        ArchitectureError: the two models do not go together.
        ConfigError: nothing would be trained.
    """
    base = load_model(config.base, dtype=config.dtype)
    refuse_float16_unasked(config, base)
    tokenizer = load_tokenizer(config.base)
    shadow = ShadowConfig(shadow_model=config.shadow, **config.shadow_sizes())
    if shadow.is_explicit:
        check_same_tokenizer(location(config.shadow), location(config.base))
        shadow = shadow.replace(shadow_model=location(config.shadow))
    network = build_network(base, shadow)
    if shadow.is_explicit and network.projection is not None:
        _check_initial(config, shadow.shadow_model, network)
    small = None
    needs_head = config.initial_projection == "pinv" or config.objective == "projection"
    if shadow.is_explicit and network.projection is not None and needs_head:
        if is_projected(read_raw_config(shadow.shadow_model)):
            raise ConfigError(
                f"{config.shadow!r} has no head of its own beside the large one's; use initial_projection='stored' and "
                "causal_lm or distill"
            )
        small = AutoModelForCausalLM.from_pretrained(shadow.shadow_model, dtype=torch.float32)
    if config.objective == "projection" and small is None:
        raise ConfigError(
            f"the shadow {config.shadow!r} is as wide as the base, so there is no projection to train; use causal_lm or distill"
        )
    return base, network.to(decoder_of(base).device), tokenizer, small


def _check_initial(config: PretrainConfig, source: str, network: ShadowNetwork) -> None:
    """Refuses ``stored`` where nothing is stored; makes ``random`` so where something is."""
    assert network.projection is not None
    if config.initial_projection == "stored" and read_projection(source) is None:
        raise ConfigError(f"initial_projection='stored', but {config.shadow!r} is a plain model without one; use pinv")
    if config.initial_projection == "random":
        network.projection.reset_parameters()


def _train(
    config: PretrainConfig,
    base: PreTrainedModel,
    network: ShadowNetwork,
    tokenizer: PreTrainedTokenizerBase,
    small: PreTrainedModel | None,
    folder: Path,
    checkpoint: Path | None,
    console: Console,
) -> tuple[bool, list[float], float, int]:
    """(interrupted, losses by log line, seconds, steps)."""
    if config.steps == 0:
        return False, [], 0.0, 0
    own_head = small.requires_grad_(False) if small is not None and config.objective == "projection" else None
    model = ProjectedShadow(base, network, config, own_head)
    arguments = training_arguments(config, folder)
    model.frozen_to(arguments.device)
    rows = config.batch_size * config.gradient_accumulation
    stop, progress = StopOnInterrupt(), ProgressLine(console, tokens_per_step=config.length * rows)
    metrics = MetricLines(folder / "metrics.jsonl")
    trainer = SafeTrainer(
        model,
        arguments,
        train_dataset=PackedText(
            config.data,
            tokenizer,
            length=within_positions(config.length, base.config, network.backbone.config),
            field=config.text_field,
            split=config.split,
            seed=config.seed,
            buffer=config.shuffle_buffer,
        ),
        data_collator=default_data_collator,
        callbacks=[stop, metrics, progress],
    )
    trainer.pop_callback(PrinterCallback)
    with closing(stop), closing(progress):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = metrics.seconds
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    network.to(decoder_of(base).device).eval()
    return stop.stopped, losses, seconds, trainer.state.global_step


def training_arguments(config: PretrainConfig, folder: Path) -> TrainingArguments:
    return shared_arguments(config, folder, max_steps=config.steps)


def _public(config: PretrainConfig) -> dict[str, Any]:
    """The settings without paths of this machine."""
    names = {name: Path(getattr(config, name)).name for name in ("base", "shadow", "data", "output")}
    return config.to_dict() | names
