"""transformers' Trainer with the few lines that an adapter-only checkpoint and two losses ask for."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from shadowpeft.core import ShadowNetwork
from shadowpeft.errors import CheckpointError, ConfigError
from shadowpeft.model import ShadowModel
from shadowpeft.model.architectures import refuse_zero3
from shadowpeft.model.build import is_classifier
from shadowpeft.model.cache import CACHE
from shadowpeft.model.checkpoint import restore_weights
from shadowpeft.model.rates import settle
from shadowpeft.model.sharded import is_sharded
from shadowpeft.model.tensors import WEIGHTS_FILE
from shadowpeft.train.groups import heads_of, multiplied_parts
from shadowpeft.train.saving import SafeTrainer

LOSS_PARTS = ("main_loss", "shadow_loss", "distillation_loss")


class ShadowTrainer(SafeTrainer):
    """Logs every part of the loss and resumes from adapter-only checkpoints; all else is transformers' Trainer.

    Works for any other model too, so that LoRA and plain fine-tuning run on the same code.

    Args:
        shadow_lr_multiplier: the shadow backbone's learning rate as a multiple of all other weights'; None: what the
            adapter's config says.
        head_lr_multiplier: the same of a classifier's heads. The other arguments are transformers' own.

    Raises:
        ConfigError: a head_lr_multiplier for a classifier whose head is not one of those this package trains.
    """

    def __init__(
        self, *args: Any, shadow_lr_multiplier: float | None = None, head_lr_multiplier: float = 1.0, **kwargs: Any
    ) -> None:
        model = kwargs.get("model", args[0] if args else None)
        refuse_zero3(isinstance(model, ShadowModel) and is_deepspeed_zero3_enabled())
        super().__init__(*args, **kwargs)
        self._shadow_lr_multiplier, self._head_lr_multiplier = shadow_lr_multiplier, head_lr_multiplier
        # transformers takes the labels away and smooths on the logits, which leaves the shadow's head without a loss.
        smooths = self.label_smoother is not None and isinstance(self.model, ShadowModel)
        self._loss_options = {"label_smoothing": self.args.label_smoothing_factor} if smooths else {}
        self.label_smoother = None if smooths else self.label_smoother
        if trains_classes(self.model):
            # transformers takes these losses to be divided by the labels of all accumulated batches, and they are means of one.
            self.model_accepts_loss_kwargs = False
        self._has_own_groups = False
        self._sums: dict[str, torch.Tensor] = {}
        self._num_steps = 0

    def compute_loss(  # type: ignore[override]
        self, model: nn.Module, inputs: dict, return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs | self._loss_options, return_outputs=True, **kwargs)
        if model.training:
            self._add_parts(outputs)
        return (loss, outputs) if return_outputs else loss

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Matrices only: neither norms nor biases, whatever their names, are pulled to zero."""
        shapes = {name: p.ndim for name, p in model.named_parameters()}
        return [name for name in super().get_decay_parameter_names(model) if shapes.get(name, 0) > 1]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        adapted = self.accelerator.unwrap_model(self.model)
        if not is_new and self._has_own_groups:  # a second training
            return optimizer
        trained: nn.Module = adapted.network() if isinstance(adapted, ShadowModel) else adapted
        if isinstance(trained, ShadowNetwork):
            settle(trained)  # here they are followed, changed on demand or warned about
        if self._head_lr_multiplier != 1.0 and not heads_of(trained) and trains_classes(adapted):
            raise ConfigError(
                f"head_lr_multiplier={self._head_lr_multiplier} is for a head called 'score', and {type(trained).__name__} has "
                "none; leave it 1"
            )
        parts = multiplied_parts(trained, heads=self._head_lr_multiplier, backbone=self._shadow_lr_multiplier)
        if not is_new:
            self._check_own_rates(optimizer, parts)
            return optimizer
        self._has_own_groups = True
        for weights, multiplier in parts:
            _split_groups(optimizer, set(weights), multiplier)
        return optimizer

    def _check_own_rates(self, optimizer: Any, parts: list[tuple[list[nn.Parameter], float]]) -> None:
        """Whether an optimizer from elsewhere, whose groups stay as they are, has some for what should learn at its own rate.

        Raises:
            ConfigError: it has none and was asked to. Where the adapter's config alone asks, a warning says so.
        """
        # DeepSpeed's stands for one that is made later, of all weights alike.
        known = getattr(optimizer, "param_groups", None) or [{"params": optimizer.params}]
        groups = [set(group["params"]) for group in known]
        mixed = [m for part, m in parts if m != 1.0 and any(group & set(part) and group - set(part) for group in groups)]
        if not mixed:
            return
        said = (
            "the optimizer was made elsewhere (optimizers=, or a section of DeepSpeed's config) and has no groups for the "
            f"weights that are to learn at {' and '.join(map(str, mixed))} times its rate, so they learn at its own; make it "
            "of shadowpeft.train.parameter_groups, or leave it to the trainer"
        )
        if self._shadow_lr_multiplier is not None or self._head_lr_multiplier != 1.0:
            raise ConfigError(said)
        warnings.warn(said, stacklevel=3)

    def _add_parts(self, outputs: Any) -> None:
        for name in LOSS_PARTS:
            value = outputs.get(name) if hasattr(outputs, "get") else None
            if value is not None:
                self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value
        self._num_steps += self.accelerator.sync_gradients  # an epoch's last step may have fewer batches

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the mean of each part since the last log (a share of the step's loss under accumulation, so summed)."""
        if "loss" in logs and self._num_steps:
            # Every process has its share of the labels that all are divided by, so the shares add up.
            reduction = "sum" if self.args.average_tokens_across_devices else "mean"
            for name, total in self._sums.items():
                total = self.accelerator.reduce(total, reduction)
                logs[name] = round(float(total) / self._num_steps, 4)  # type: ignore[arg-type]
            self._sums.clear()
            self._num_steps = 0
        super().log(logs, *args, **kwargs)

    def prediction_step(
        self, model: nn.Module, inputs: dict, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        ignored = [*(ignore_keys or []), *LOSS_PARTS, CACHE]
        return super().prediction_step(model, inputs, prediction_loss_only, ignored)

    def save_adapter(self, folder: Path) -> None:
        """Writes the adapter; every process has to call this, and the first one writes."""
        adapted: ShadowModel = self.accelerator.unwrap_model(self.model)
        if is_sharded(adapted):
            adapted.save_sharded(folder, is_main_process=self.args.should_save)
        elif self.args.should_save:
            adapted.save_pretrained(folder)
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in transformers, which would gather the whole base of a sharded model to save its adapter."""
        adapted = self.accelerator.unwrap_model(self.model)
        if isinstance(adapted, ShadowModel) and is_sharded(adapted):
            self.save_adapter(Path(output_dir or str(self.args.output_dir)))
        else:
            super().save_model(output_dir, _internal_call)

    @contextmanager
    def _trained_part(self) -> Iterator[None]:
        """Within the block the trainer's model is the network alone: what is frozen needs no place in a checkpoint."""
        model, adapted = self.model, self.accelerator.unwrap_model(self.model)
        if self.is_fsdp_enabled and isinstance(adapted, ShadowModel):
            self.model = adapted.network()
        try:
            yield
        finally:
            self.model = model

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with self._trained_part():
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with self._trained_part():
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        adapted = self.accelerator.unwrap_model(model or self.model)
        if not isinstance(adapted, ShadowModel):
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._restore(adapted, Path(resume_from_checkpoint))
        return None

    def _load_best_model(self) -> None:
        adapted = self.accelerator.unwrap_model(self.model)
        if isinstance(adapted, ShadowModel) and self.state.best_model_checkpoint:
            self._restore(adapted, Path(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()

    def _restore(self, model: ShadowModel, folder: Path) -> None:
        if not (folder / WEIGHTS_FILE).is_file():
            raise CheckpointError(f"{folder} holds no {WEIGHTS_FILE}; resume from a complete checkpoint folder")
        restore_weights(model.network(), folder)


def trains_classes(model: Any) -> bool:
    """Whether ``model`` is one of transformers' own classifiers, plain or below PEFT's adapters."""
    if isinstance(model, ShadowModel):
        return False
    return is_classifier(model.get_base_model() if hasattr(model, "get_base_model") else model)


def _split_groups(optimizer: torch.optim.Optimizer, chosen: set[nn.Parameter], multiplier: float) -> None:
    """Gives ``chosen`` groups of their own, with ``multiplier`` times the learning rate of the ones they were in."""
    if multiplier == 1.0:
        return
    groups, optimizer.param_groups = list(optimizer.param_groups), []
    for group in groups:
        rest = [p for p in group["params"] if p not in chosen]
        moved = [p for p in group["params"] if p in chosen]
        for parameters, factor in ((rest, 1.0), (moved, multiplier)):
            if parameters:
                optimizer.add_param_group({**group, "params": parameters, "lr": group["lr"] * factor})
