"""Our settings in the words of transformers' Trainer, the same for training and pretraining."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations import get_available_reporting_integrations  # type: ignore[attr-defined]

from shadowpeft.errors import ConfigError
from shadowpeft.train.config import TrainConfig
from shadowpeft.train.pretrain_config import PretrainConfig


def shared_arguments(config: TrainConfig | PretrainConfig, folder: Path, **own: Any) -> TrainingArguments:
    """The settings that both kinds of run have, and the ``own`` ones of one kind; checkpoints go into ``folder``.

    Raises:
        ConfigError: float16 where its gradients cannot be scaled, or a tracker that is not there.
    """
    # CUDA or ROCm. Neither MPS nor XPU was there to be tried, so both are left alone, which docs/scale.md says.
    has_gpu = torch.cuda.is_available()
    if config.dtype == "float16":
        _check_float16(config, has_gpu)
    return TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule,
        warmup_steps=config.warmup,
        weight_decay=config.weight_decay,
        max_grad_norm=config.clip,
        # By what is asked for, not by what `auto` finds: the trained weights of a base in bf16 are fp32 and work as such.
        bf16=has_gpu and config.dtype == "bfloat16",
        fp16=config.dtype == "float16",
        use_cpu=not has_gpu,
        seed=config.seed,
        data_seed=config.seed,
        logging_steps=config.log_every,
        logging_first_step=True,
        save_steps=config.save_every,
        save_total_limit=2,
        report_to=trackers(config.report_to),
        remove_unused_columns=False,
        disable_tqdm=True,
        dataloader_pin_memory=has_gpu,
        **own,
    )


def _check_float16(config: TrainConfig | PretrainConfig, has_gpu: bool) -> None:
    """Without a loss scaler the smaller gradients are zero in float16, so the run would go on and learn little.

    Raises:
        ConfigError: there is no GPU, without which accelerate has no scaler, or the trained weights are float16 too, whose
            gradients torch's scaler refuses.
    """
    if not has_gpu:
        raise ConfigError("dtype='float16' trains on a GPU alone, where its loss can be scaled; use float32 or bfloat16")
    if isinstance(config, TrainConfig) and config.shadow.adapter_dtype in ("base", "float16"):
        raise ConfigError(
            f"adapter_dtype={config.shadow.adapter_dtype!r} makes the trained weights of dtype='float16' float16 too, whose "
            "gradients cannot be scaled; use adapter_dtype='float32'"
        )


def refuse_float16_unasked(config: TrainConfig | PretrainConfig, base: PreTrainedModel) -> None:
    """With ``dtype: auto`` a base may turn out to be stored in float16 when the loss scaler has long been left out.

    Raises:
        ConfigError: it is.
    """
    if config.dtype == "auto" and base.dtype == torch.float16:
        raise ConfigError(
            f"the base {config.base!r} is stored in float16, which trains with a loss scaler on a GPU alone: say which dtype, "
            "float16 there, else float32 or bfloat16"
        )


def refuse_float16_weights(model: nn.Module) -> None:
    """What :func:`_check_float16` says of an adapter, of any model that is ready to be trained.

    Raises:
        ConfigError: a trained weight is float16.
    """
    for name, weight in model.named_parameters():
        if weight.requires_grad and weight.dtype == torch.float16:
            raise ConfigError(f"{name} would be trained in float16, and no scaler takes that; use adapter_dtype='float32'")


def trackers(names: str) -> list[str]:
    """The trackers of a comma-separated list; ``none`` and ``all`` as in transformers.

    Raises:
        ConfigError: one that transformers does not know or that is not installed, which its Trainer would find too late.
    """
    chosen = [] if names == "none" else [name.strip() for name in names.split(",")]
    installed = get_available_reporting_integrations()
    for name in chosen:
        if name not in installed and chosen != ["all"]:
            raise ConfigError(
                f"report_to={names!r} is not valid: {name!r} is unknown or not installed; choose none, all or some of "
                f"those installed here: {', '.join(installed) or 'there are none'}"
            )
    return chosen
