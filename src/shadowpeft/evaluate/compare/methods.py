"""The methods: how each is put on a base, and the settings that its search tries."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from shadowpeft.errors import ConfigError
from shadowpeft.evaluate.compare.budget import Sized, shadow_config
from shadowpeft.evaluate.compare.recipe import MethodSpec
from shadowpeft.model import get_shadow_model
from shadowpeft.model.build import is_classifier
from shadowpeft.train.sources import MissingPackageError

# (low, high) of each searched setting, spread evenly on a logarithmic scale; docs/compare.md says where they are from.
RANGES: dict[str, dict[str, tuple[float, float]]] = {
    "none": {},
    "probe": {"learning_rate": (1e-3, 3e-2)},
    "lora": {"learning_rate": (3e-4, 1e-2)},
    "dora": {"learning_rate": (3e-4, 1e-2)},
    "shadow": {"learning_rate": (3e-4, 1e-2), "shadow_alpha": (0.1, 2.0)},
    "shadow-pretrained": {"learning_rate": (1e-4, 3e-3), "shadow_alpha": (0.1, 2.0)},
    "full": {"learning_rate": (3e-5, 1e-3)},
}
_STEP = 0.6180339887  # golden ratio: every prefix of its multiples is spread evenly


def trials_of(method: MethodSpec, count: int, given: Sequence[dict[str, float]] = ()) -> list[dict[str, float]]:
    """The settings to try: those ``given`` for a task, else the method's own in the recipe, else ``count`` points spread over
    the method's ranges.

    One setting is covered in even steps; a second one takes golden-ratio steps beside it.
    """
    if given or method.trials:
        return [dict(trial) for trial in given or method.trials]
    trials = []
    for index in range(count):
        places = [(index + 0.5) / count, (0.5 + index * _STEP) % 1]
        ranges = ranges_of(method).items()
        trials.append(
            {name: _between(low, high, place) for (name, (low, high)), place in zip(ranges, places, strict=False)}
        )
    return trials if RANGES[method.kind] else [{}]


def ranges_of(method: MethodSpec) -> dict[str, tuple[float, float]]:
    """The ranges that a method's settings are spread over: the presets made here have an alpha, and a higher rate."""
    if method.kind == "shadow" and method.shadow.get("preset") in ("recommended", "attached", "sublayers"):
        return {"learning_rate": (7e-4, 2.4e-2)}
    return RANGES[method.kind]


def _between(low: float, high: float, place: float) -> float:
    return float(f"{math.exp(math.log(low) + place * (math.log(high) - math.log(low))):.3g}")


def put_on(
    base: PreTrainedModel,
    method: MethodSpec,
    sized: Sized,
    *,
    overrides: dict[str, Any],
) -> Any:
    """The model to train: ``base`` with the method's weights, and nothing else, set to be trained, in fp32.

    In bf16 an update of AdamW below a 256th of a weight is rounded away. A shadow's weights are fp32 beside a bf16 base, and
    PEFT casts those of LoRA, but not the head; here all methods' trained weights are fp32, heads and whole bases too.

    Args:
        overrides: fields of ``ShadowConfig`` from the search or an ablation; ignored by other methods.
    """
    model = _put_on(base, method, sized, overrides=overrides)
    if not method.kind.startswith("shadow"):
        _train_in_fp32(model)
    return model


def _put_on(base: PreTrainedModel, method: MethodSpec, sized: Sized, *, overrides: dict[str, Any]) -> Any:
    base.requires_grad_(False)
    if method.kind == "probe":
        base.score.requires_grad_(True)
        return base
    if method.kind == "full":
        return base.requires_grad_(True)
    if method.kind in ("lora", "dora"):
        return _with_lora(base, method, sized)
    if method.kind.startswith("shadow"):
        config = shadow_config(method, is_classifier=is_classifier(base), **{**sized.shadow, **overrides})
        return get_shadow_model(base, config)
    return base


def _train_in_fp32(model: nn.Module) -> None:
    """Casts what is trained; a head that reads the frozen base's hidden states gets them in its own precision."""
    for module in model.modules():
        trained = [parameter for parameter in module.parameters(recurse=False) if parameter.requires_grad]
        if isinstance(module, nn.Linear) and any(p.dtype != torch.float32 for p in trained):
            module.register_forward_pre_hook(_in_precision_of_weight)
        for parameter in trained:
            parameter.data = parameter.data.float()


def _in_precision_of_weight(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    hidden, *others = inputs
    return hidden.to(module.weight.dtype), *others


def _with_lora(base: PreTrainedModel, method: MethodSpec, sized: Sized) -> Any:
    """PEFT's own LoRA or DoRA; alpha follows each module's rank, so that alpha / r is the same everywhere."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise MissingPackageError("LoRA and DoRA come from the package `peft`: pip install peft") from error
    rank = min(sized.ranks.values())
    other = {name: each for name, each in sized.ranks.items() if each != rank}
    config = LoraConfig(
        r=rank,
        lora_alpha=method.scale * rank,  # type: ignore[arg-type]
        rank_pattern=other,
        alpha_pattern={name: method.scale * each for name, each in other.items()},
        lora_dropout=method.dropout,
        target_modules=list(sized.ranks),
        use_dora=method.kind == "dora",
        task_type="SEQ_CLS" if is_classifier(base) else "CAUSAL_LM",
    )
    return get_peft_model(base, config)


def num_trained(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def check_size(model: Any, sized: Sized, *, is_changed: bool) -> int:
    """Trained parameters of a built model.

    Raises:
        ConfigError: they are not those that the budget was solved with, and no variant changed the method.
    """
    found = num_trained(model)
    if not is_changed and found != sized.trainable:
        raise ConfigError(f"the built model trains {found:,} parameters, the plan has {sized.trainable:,}")
    return found


def resolve(name: str, data_root: Path | None) -> str:
    """A folder below the data root where there is one, else the name as it is (a hub name, ``embedded``)."""
    below = None if data_root is None else data_root / name
    return str(below) if below is not None and os.path.exists(below) else name
