"""The settings of one training run; command line, YAML file and Python share these fields."""

import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from shadowpeft.core import ShadowConfig
from shadowpeft.core.config import check_keys, check_types, require, setting
from shadowpeft.errors import ConfigError

# Settings that are the adapter's now and were the run's.
MOVED = ("shadow_lr_multiplier",)
DTYPES = ("auto", "float32", "bfloat16", "float16")
# Of transformers' schedules, those that need no arguments of their own.
SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup", "cosine_with_restarts", "inverse_sqrt")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run: base, data, method and schedule. ``shadow`` holds the adapter's own fields."""

    base: str = setting("embedded", "folder, hub name, or 'embedded' for the base that comes with the package")
    task: str = setting("robot", "task name; see `shadowpeft info`")
    data: str | None = setting(None, "folder or file with the data; default: the hub (robot: generated)")
    output: str = setting("runs/train", "run folder; must be empty or absent unless --resume")
    epochs: float = setting(3.0, "passes over the training rows")
    max_steps: int = setting(-1, "optimizer steps; overrides epochs when positive")
    batch_size: int = setting(16, "rows a device and forward pass")
    gradient_accumulation: int = setting(1, "forward passes an optimizer step")
    learning_rate: float = setting(3e-3, "peak learning rate of AdamW")
    head_lr_multiplier: float = setting(
        1.0, "learning rate of a classifier's heads, as a multiple of the others'; written answers have no such heads"
    )
    schedule: str = setting("cosine", "learning-rate schedule, any of transformers'")
    warmup: float = setting(0.03, "share of the steps that warm up")
    weight_decay: float = setting(0.01, "decoupled weight decay")
    clip: float = setting(1.0, "gradient norm to clip at")
    max_length: int = setting(512, "tokens of prompt and answer together")
    dtype: str = setting("auto", "dtype of the base: auto (as it is stored), float32, bfloat16 or float16")
    group_by_length: bool = setting(False, "batches of rows of about one length, in random order: less padding")
    gradient_checkpointing: bool = setting(False, "recompute activations in the backward pass")
    seed: int = setting(0, "seed of initialisation, order and dropout")
    limit_train: int | None = setting(None, "use at most this many training rows")
    limit_eval: int | None = setting(None, "score at most this many test rows")
    eval_batch_size: int = setting(64, "rows a scoring batch")
    log_every: int = setting(10, "optimizer steps between log lines")
    save_every: int = setting(500, "optimizer steps between checkpoints")
    report_to: str = setting("none", "trackers, comma-separated: tensorboard, trackio, wandb, ...")
    resume: bool = setting(False, "go on from the newest complete checkpoint in the run folder")
    shadow: ShadowConfig = setting(ShadowConfig(), "the adapter")  # noqa: RUF009 (frozen)

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("batch_size", "gradient_accumulation", "max_length", "eval_batch_size", "log_every", "save_every"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "an integer of at least 1")
        for name in ("limit_train", "limit_eval"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "None or an integer of at least 1")
        require(self.epochs > 0 or self.max_steps > 0, "epochs", self.epochs, "more than 0")
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "more than 0")
        require(self.head_lr_multiplier > 0, "head_lr_multiplier", self.head_lr_multiplier, "more than 0")
        require(0 <= self.warmup < 1, "warmup", self.warmup, "a share in [0, 1)")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "at least 0")
        require(self.clip > 0, "clip", self.clip, "more than 0")
        require(self.schedule in SCHEDULES, "schedule", self.schedule, f"one of {', '.join(SCHEDULES)}")
        require(self.dtype in DTYPES, "dtype", self.dtype, f"one of {', '.join(DTYPES)}")
        require(0 <= self.seed < 2**32, "seed", self.seed, "an integer from 0 to 2^32 - 1")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainConfig":
        values = dict(values)
        moved = {name: values.pop(name) for name in MOVED if name in values}
        check_keys(values, {item.name for item in fields(cls)}, what="training config")
        shadow = values.get("shadow", {})
        if moved:  # as in the config.yaml of an older run
            shadow = shadow.replace(**moved) if isinstance(shadow, ShadowConfig) else moved | as_mapping(shadow, "shadow")
            values["shadow"] = shadow
        if not isinstance(shadow, ShadowConfig):
            shadow = dict(as_mapping(shadow, "shadow"))
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
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    return as_mapping(values, str(path))


class _Loader(yaml.SafeLoader):
    """Reads ``1e-3`` as a number, as YAML 1.2 does; PyYAML follows 1.1, where it is a text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def as_mapping(values: Any, where: str) -> dict[str, Any]:
    """Named values; None (an empty file or section) is none of them."""
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{where} must hold `key: value` lines, not a {type(values).__name__}: {values!r}")
    return values


def split_settings(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings by bare names, as on a command line: (fields of ``TrainConfig``, fields of ``ShadowConfig`` and ``preset``)."""
    names = {item.name for item in fields(ShadowConfig)} | {"preset"}
    shadow = {name: value for name, value in settings.items() if name in names}
    return {name: value for name, value in settings.items() if name not in names}, shadow


def merge(values: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """``values`` with those of ``overrides`` in their place; the adapter's fields are merged one by one."""
    merged = {**values, **{key: value for key, value in overrides.items() if key != "shadow"}}
    shadow = {**as_mapping(values.get("shadow"), "shadow"), **as_mapping(overrides.get("shadow"), "shadow")}
    return {**merged, "shadow": shadow} if shadow else merged
