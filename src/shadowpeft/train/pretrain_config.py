"""The settings of one pretraining run."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from shadowpeft.core.config import check_keys
from shadowpeft.errors import ConfigError

OBJECTIVES = ("projection", "causal_lm", "distill")


def _field(default: Any, help_text: str) -> Any:
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """A small model becomes the shadow of a large one (paper, App. B)."""

    base: str = _field("embedded", "the large model: folder, hub name or 'embedded'")
    shadow: str = _field("base:first:2", "the small model: folder, hub name, 'implicit', or blocks of the base")
    shadow_num_hidden_layers: int = _field(1, "blocks of an implicit shadow")
    shadow_hidden_size: int | None = _field(None, "width of an implicit shadow; None: the base's")
    shadow_intermediate_size: int | None = _field(None, "MLP width of an implicit shadow; None: the base's")
    shadow_num_attention_heads: int | None = _field(None, "heads of an implicit shadow; None: the base's")
    shadow_num_key_value_heads: int | None = _field(None, "key/value heads of an implicit shadow; None: as ShadowConfig has it")
    shadow_head_dim: int | None = _field(None, "head width of an implicit shadow; None: as ShadowConfig has it")
    data: str = _field("", "text: a file or folder (.txt, .jsonl, .gz), or hub:NAME[:CONFIG]")
    text_field: str = _field("text", "field of a row that holds the text")
    split: str = _field("train", "split of a hub data set")
    objective: Literal["projection", "causal_lm", "distill"] = _field(
        "causal_lm",
        "projection: P alone, from the small model's own head; causal_lm: backbone and P on the text; distill: "
        "backbone and P, from the large model's predictions",
    )
    initial_projection: Literal["pinv", "stored", "random"] = _field(
        "pinv", "Eq. 12, the one stored with a pretrained shadow, or random"
    )
    train_embeddings: bool = _field(False, "train the small model's token table too")
    kl_weight: float = _field(1.0, "weight of KL(teacher || shadow), for projection and distill")
    mse_weight: float = _field(0.1, "weight of the mean squared difference of logits, for projection and distill")
    temperature: float = _field(1.0, "softens both distributions of the KL")
    output: str = _field("runs/pretrain", "run folder; must be empty or absent unless resume")
    steps: int = _field(1000, "optimizer steps; 0 writes the initial projection untrained")
    batch_size: int = _field(8, "packed rows a forward pass")
    gradient_accumulation: int = _field(1, "forward passes an optimizer step")
    length: int = _field(512, "tokens a packed row")
    learning_rate: float = _field(3e-4, "peak learning rate of AdamW")
    schedule: str = _field("cosine", "learning-rate schedule, any of transformers'")
    warmup: float = _field(0.03, "share of the steps that warm up")
    weight_decay: float = _field(0.01, "decoupled weight decay")
    clip: float = _field(1.0, "gradient norm to clip at")
    dtype: str = _field("auto", "dtype of the base")
    shuffle_buffer: int = _field(1000, "documents held back to mix their order; 0 keeps it")
    seed: int = _field(0, "seed of initialisation and of the order of the text")
    log_every: int = _field(10, "optimizer steps between log lines")
    save_every: int = _field(500, "optimizer steps between checkpoints")
    report_to: str = _field("none", "trackers, comma-separated")
    resume: bool = _field(False, "go on from the newest complete checkpoint in the run folder")

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ConfigError(f"objective={self.objective!r} is not valid: expected one of {', '.join(OBJECTIVES)}")
        if self.initial_projection not in ("pinv", "stored", "random"):
            raise ConfigError(
                f"initial_projection={self.initial_projection!r} is not valid: expected pinv, stored or random"
            )
        for name in ("batch_size", "gradient_accumulation", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)!r} is not valid: expected an integer of at least 1")
        for name in ("steps", "shuffle_buffer"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)!r} is not valid: expected an integer of at least 0")
        if self.length < 2:
            raise ConfigError(f"length={self.length!r} is not valid: expected at least 2 tokens")
        if self.learning_rate <= 0 or self.temperature <= 0:
            raise ConfigError("learning_rate and temperature must be more than 0")
        if self.objective != "causal_lm" and self.kl_weight <= 0 and self.mse_weight <= 0:
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
