"""The settings of one training run; command line, YAML file and Python share these fields."""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from shadowpeft.core import ShadowConfig
from shadowpeft.core.config import check_keys
from shadowpeft.errors import ConfigError


def _field(default: Any, help_text: str) -> Any:
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run: base, data, method and schedule. ``shadow`` holds the adapter's own fields."""

    base: str = _field("embedded", "folder, hub name, or 'embedded' for the base that comes with the package")
    task: str = _field("robot", "task name; see `shadowpeft info`")
    data: str | None = _field(None, "folder or file with the data; default: the hub (robot: generated)")
    output: str = _field("runs/train", "run folder; must be empty or absent unless --resume")
    epochs: float = _field(3.0, "passes over the training rows")
    max_steps: int = _field(-1, "optimizer steps; overrides epochs when positive")
    batch_size: int = _field(16, "rows a device and forward pass")
    gradient_accumulation: int = _field(1, "forward passes an optimizer step")
    learning_rate: float = _field(3e-3, "peak learning rate of AdamW")
    shadow_lr_multiplier: float = _field(1.0, "learning rate of the shadow backbone, as a multiple of the others'")
    schedule: str = _field("cosine", "learning-rate schedule, any of transformers'")
    warmup: float = _field(0.03, "share of the steps that warm up")
    weight_decay: float = _field(0.01, "decoupled weight decay")
    clip: float = _field(1.0, "gradient norm to clip at")
    max_length: int = _field(512, "tokens of prompt and answer together")
    dtype: str = _field("auto", "dtype of the base: auto, float32, bfloat16 or float16")
    gradient_checkpointing: bool = _field(False, "recompute activations in the backward pass")
    seed: int = _field(0, "seed of initialisation, order and dropout")
    limit_train: int | None = _field(None, "use at most this many training rows")
    limit_eval: int | None = _field(None, "score at most this many test rows")
    eval_batch_size: int = _field(64, "rows a scoring batch")
    log_every: int = _field(10, "optimizer steps between log lines")
    save_every: int = _field(500, "optimizer steps between checkpoints")
    report_to: str = _field("none", "trackers, comma-separated: tensorboard, trackio, wandb, ...")
    resume: bool = _field(False, "go on from the newest complete checkpoint in the run folder")
    shadow: ShadowConfig = _field(ShadowConfig(), "the adapter")

    def __post_init__(self) -> None:
        for name in ("batch_size", "gradient_accumulation", "max_length", "eval_batch_size", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)!r} is not valid: expected an integer of at least 1")
        if self.epochs <= 0 and self.max_steps <= 0:
            raise ConfigError(f"epochs={self.epochs!r} is not valid: expected more than 0")
        if self.learning_rate <= 0:
            raise ConfigError(f"learning_rate={self.learning_rate!r} is not valid: expected more than 0")
        if self.shadow_lr_multiplier < 0:
            raise ConfigError(f"shadow_lr_multiplier={self.shadow_lr_multiplier!r} is not valid: expected at least 0")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainConfig":
        check_keys(values, {item.name for item in fields(cls)}, what="training config")
        values = dict(values)
        shadow = values.get("shadow", {})
        if isinstance(shadow, dict):
            shadow = dict(shadow)
            preset = shadow.pop("preset", "paper")
            values["shadow"] = ShadowConfig.preset(preset, **shadow)
        return cls(**values)

    @classmethod
    def from_yaml(cls, path: Path, overrides: dict[str, Any] | None = None) -> "TrainConfig":
        """Reads a YAML file; ``overrides`` (from the command line) win.

        Raises:
            ConfigError: no such file, not a mapping, or an unknown key.
        """
        return cls.from_dict(merge(read_yaml(path), overrides or {}))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"no config file at {path}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold `key: value` lines, not a {type(values).__name__}")
    return values


def merge(values: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    merged = {**values, **{key: value for key, value in overrides.items() if key != "shadow"}}
    shadow = {**(values.get("shadow") or {}), **(overrides.get("shadow") or {})}
    return {**merged, "shadow": shadow} if shadow else merged
