"""The settings of one pretraining run."""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from shadowpeft.core.config import check_keys, check_types, require, setting
from shadowpeft.errors import ConfigError
from shadowpeft.train.config import DTYPES, SCHEDULES


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """A small model becomes the shadow of a large one (paper, App. B)."""

    base: str = setting("embedded", "the large model: folder, hub name or 'embedded'")
    shadow: str = setting("base:first:2", "the small model: folder, hub name, 'implicit', or blocks of the base")
    shadow_num_hidden_layers: int = setting(1, "blocks of an implicit shadow")
    shadow_hidden_size: int | None = setting(None, "width of an implicit shadow; None: the base's")
    shadow_intermediate_size: int | None = setting(None, "MLP width of an implicit shadow; None: the base's")
    shadow_num_attention_heads: int | None = setting(None, "heads of an implicit shadow; None: the base's")
    shadow_num_key_value_heads: int | None = setting(None, "key/value heads of an implicit shadow; None: as in ShadowConfig")
    shadow_head_dim: int | None = setting(None, "head width of an implicit shadow; None: as ShadowConfig has it")
    data: str = setting("", "text: a file or folder (.txt, .jsonl, .gz), or hub:NAME[:CONFIG]")
    text_field: str = setting("text", "field of a row that holds the text")
    split: str = setting("train", "split of a hub data set")
    objective: Literal["projection", "causal_lm", "distill"] = setting(
        "causal_lm",
        "projection: P alone, from the small model's own head; causal_lm: backbone and P on the text; distill: "
        "backbone and P, from the large model's predictions",
    )
    initial_projection: Literal["pinv", "stored", "random"] = setting(
        "pinv", "Eq. 12, the one stored with a pretrained shadow, or random"
    )
    train_embeddings: bool = setting(False, "train the small model's token table too")
    kl_weight: float = setting(1.0, "weight of KL(teacher || shadow), for projection and distill")
    mse_weight: float = setting(0.1, "weight of the mean squared difference of logits, for projection and distill")
    temperature: float = setting(1.0, "softens both distributions of the KL")
    output: str = setting("runs/pretrain", "run folder; must be empty or absent unless resume")
    steps: int = setting(1000, "optimizer steps; 0 writes the initial projection untrained")
    batch_size: int = setting(8, "packed rows a forward pass")
    gradient_accumulation: int = setting(1, "forward passes an optimizer step")
    length: int = setting(512, "tokens a packed row")
    learning_rate: float = setting(3e-4, "peak learning rate of AdamW")
    schedule: str = setting("cosine", "learning-rate schedule, any of transformers'")
    warmup: float = setting(0.03, "share of the steps that warm up")
    weight_decay: float = setting(0.01, "decoupled weight decay")
    clip: float = setting(1.0, "gradient norm to clip at")
    dtype: str = setting("auto", "dtype of the base: auto (as it is stored), float32, bfloat16 or float16")
    shuffle_buffer: int = setting(1000, "documents held back to mix their order; 0 keeps it")
    seed: int = setting(0, "seed of initialisation and of the order of the text")
    log_every: int = setting(10, "optimizer steps between log lines")
    save_every: int = setting(500, "optimizer steps between checkpoints")
    report_to: str = setting("none", "trackers, comma-separated")
    resume: bool = setting(False, "go on from the newest complete checkpoint in the run folder")

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("batch_size", "gradient_accumulation", "log_every", "save_every"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "an integer of at least 1")
        for name in ("steps", "shuffle_buffer"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "an integer of at least 0")
        require(self.length >= 2, "length", self.length, "at least 2 tokens")
        for name in ("learning_rate", "temperature", "clip"):
            require(getattr(self, name) > 0, name, getattr(self, name), "more than 0")
        for name in ("kl_weight", "mse_weight", "weight_decay"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        require(0 <= self.warmup < 1, "warmup", self.warmup, "a share in [0, 1)")
        require(self.schedule in SCHEDULES, "schedule", self.schedule, f"one of {', '.join(SCHEDULES)}")
        require(self.dtype in DTYPES, "dtype", self.dtype, f"one of {', '.join(DTYPES)}")
        require(0 <= self.seed < 2**32, "seed", self.seed, "an integer from 0 to 2^32 - 1")
        if self.objective != "causal_lm" and self.kl_weight == 0 and self.mse_weight == 0:
            raise ConfigError("kl_weight and mse_weight are both 0: nothing would be learnt")
        is_own = self.shadow == "implicit" or self.shadow.startswith("base:")
        if self.objective == "projection" and is_own:
            raise ConfigError(
                f"objective='projection' learns from the small model's own head, which {self.shadow!r} has not; use "
                "causal_lm or distill"
            )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "PretrainConfig":
        """Builds a config from plain values; an unknown key is an error that names it."""
        check_keys(values, {item.name for item in fields(cls)}, what="pretraining config")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def shadow_sizes(self) -> dict[str, Any]:
        """Sizes of an implicit shadow, by their names in ``ShadowConfig``."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name.startswith("shadow_")}
