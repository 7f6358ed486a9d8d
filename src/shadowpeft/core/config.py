"""The configuration of one shadow adapter."""

import difflib
import re
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from shadowpeft.errors import ConfigError

TaskType = Literal["CAUSAL_LM", "SEQ_CLS"]


def setting(default: Any, help_text: str) -> Any:
    """A field of a config: its default, and what the command line says of it."""
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True, kw_only=True)
class ShadowConfig:
    """Everything that defines a shadow adapter apart from its weights.

    The defaults are the paper's (arXiv 2604.19254). Where the paper, the authors' package and Hugging
    Face PEFT differ, the difference is a field; :meth:`preset` sets all of them at once. Field names
    follow PEFT's ``ShadowConfig`` where it has the field.

    Raises:
        ConfigError: a value outside its range.
    """

    task_type: TaskType = setting(  # noqa: RUF009 (a plain string)
        "CAUSAL_LM", "which loss and heads: causal language model or sequence classification"
    )

    # The shadow backbone (Eq. 1)
    shadow_model: str = setting(
        "implicit",
        "'implicit' (fresh weights of the base's class), blocks of the base itself ('base:first:2', 'base:last:1', "
        "'base:spaced:3'), or a path / hub name",
    )
    shadow_num_hidden_layers: int = setting(1, "blocks of an implicit shadow")
    shadow_hidden_size: int | None = setting(None, "width of an implicit shadow; None: the base's")
    shadow_num_attention_heads: int | None = setting(None, "query heads of an implicit shadow; None: the base's")
    shadow_num_key_value_heads: int | None = setting(
        None, "key/value heads of an implicit shadow; None: the base's, or one for each query head where those are fewer"
    )
    shadow_head_dim: int | None = setting(None, "head width of an implicit shadow; None: the base's")
    shadow_intermediate_size: int | None = setting(256, "MLP width of an implicit shadow; None: the base's")
    shadow_layer_types: Literal["full", "base"] = setting(
        "full", "attention of an implicit shadow: full in every block, or the base's first layer types"
    )
    share_embeddings: bool | None = setting(
        None, "feed the base's embeddings to the shadow; None: yes for an implicit shadow, no for an explicit one"
    )
    freeze_embeddings: bool = setting(
        True, "keep the own embedding table of a shadow that is not implicit frozen; a fresh one is trained in any case"
    )
    freeze_backbone: bool = setting(False, "keep a pretrained shadow as it is; train its projection and the steps alone")

    # Injection (Eq. 2-4)
    r: int = setting(16, "rank of the injected correction")
    shadow_alpha: float = setting(0.1, "scale of the injected correction, as it is: not divided by r unless alpha_rank is set")
    alpha_rank: int | None = setting(
        None,
        "rank whose bottleneck has the whole shadow_alpha; one of r has shadow_alpha * alpha_rank / r, the diagonal always all "
        "of it, so that how fast a correction learns does not grow with r; None: shadow_alpha whatever r is",
    )
    shadow_dropout: float = setting(0.2, "dropout of the injection and of the transform")
    dropout_at: Literal["bottleneck", "input"] = setting("bottleneck", "drop after W_down, or the d-wide input of it")
    down_init: Literal["normal", "linear"] = setting(
        "normal", "W_down ~ N(0, 0.02^2) (N(0, 1/d) with inject_activation or inject_branch), or torch's nn.Linear default"
    )
    inject_from: Literal["difference", "state"] = setting("difference", "correct from h - s (Eq. 2) or from s alone")
    first_block: int = setting(
        1, "index of the first block whose input is corrected (between sublayers: and what goes into the MLP in front of it)"
    )
    inject_between: Literal["blocks", "sublayers"] = setting(
        "blocks", "correct what goes into blocks, or what goes from attention into the MLP as well"
    )
    inject_branch: bool = setting(
        False,
        "let the correction also read what the block (or sublayer) in front of it added to the residual stream, in units of "
        "its own RMS: needs scale_state",
    )
    scale_state: bool = setting(
        False, "multiply s by the RMS of each token's h where the two meet, so that h - s compares like with like"
    )
    inject_diagonal: bool = setting(
        False, "add v * s to the correction, v a trained vector: what a bottleneck of r cannot carry"
    )
    inject_activation: Literal["none", "silu", "gelu"] = setting(
        "none", "activation in the bottleneck of the correction, in units of the RMS of h: needs scale_state"
    )

    # Update (Eq. 5-7, 13-14)
    use_update: bool = setting(True, "advance the state between blocks; False keeps s(0) for every block")
    update_hidden_size: int = setting(10, "hidden width h_g of transform and gate")
    update_norm: Literal["layernorm", "none"] = setting("layernorm", "one shared LayerNorm before transform and gate")
    update_activation: Literal["silu", "gelu"] = setting("silu", "activation inside transform and gate")
    update_bias: bool = setting(False, "biases in transform and gate")
    transform_dropout: bool = setting(True, "dropout inside the transform (Eq. 13)")
    share_steps: bool = setting(False, "one step's weights for all depths")

    # Training
    auxiliary_loss_weight: float = setting(0.05, "lambda: weight of the shadow's own loss (Eq. 8-9)")
    shadow_lr_multiplier: float = setting(
        1.0, "learning rate of the shadow backbone, as a multiple of the others'; only ShadowTrainer follows it"
    )
    distillation_weight: float = setting(
        0.0,
        "weight of KL(attached || shadow) over the next tokens, which makes the shadow a better draft; 0: off, as it has to be "
        "for a classifier",
    )
    distillation_temperature: float = setting(1.0, "softens both distributions of the distillation term")
    adapter_dtype: Literal["float32", "bfloat16", "float16", "float64", "base"] = setting(
        "float32", "dtype of all trained weights, whatever the base's is"
    )

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("r", "update_hidden_size", "shadow_num_hidden_layers"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "an integer of at least 1")
        for name in ("alpha_rank", "shadow_hidden_size", "shadow_num_attention_heads", "shadow_num_key_value_heads"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "None or an integer of at least 1")
        for name in ("shadow_head_dim", "shadow_intermediate_size"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "None or an integer of at least 1")
        require(0.0 <= self.shadow_dropout < 1.0, "shadow_dropout", self.shadow_dropout, "a number in [0, 1)")
        require(self.shadow_lr_multiplier >= 0, "shadow_lr_multiplier", self.shadow_lr_multiplier, "at least 0")
        require(self.auxiliary_loss_weight >= 0, "auxiliary_loss_weight", self.auxiliary_loss_weight, "at least 0")
        require(self.distillation_weight >= 0, "distillation_weight", self.distillation_weight, "at least 0")
        temperature = self.distillation_temperature
        require(temperature > 0, "distillation_temperature", temperature, "more than 0")
        require(self.first_block >= 0, "first_block", self.first_block, "a block index of at least 0")
        if self.shadow_model.startswith("base:"):
            is_valid = re.fullmatch(r"base:(first|last|spaced):[1-9]\d*", self.shadow_model)
            expected = "'base:first:N', 'base:last:N' or 'base:spaced:N' with N of at least 1"
            require(is_valid is not None, "shadow_model", self.shadow_model, expected)
        fits = self.inject_activation == "none" or self.scale_state
        require(fits, "inject_activation", self.inject_activation, "'none' without scale_state: it works in the unit of h")
        fits = not self.inject_branch or self.scale_state
        require(fits, "inject_branch", self.inject_branch, "False without scale_state: it works in the unit of h")
        is_contradiction = self.freeze_backbone and self.is_implicit
        expected = "False for an implicit shadow, whose weights are fresh"
        require(not is_contradiction, "freeze_backbone", self.freeze_backbone, expected)

    @property
    def bottleneck_alpha(self) -> float:
        """Scale of what comes out of the bottleneck (Eq. 4): ``shadow_alpha``, times ``alpha_rank / r`` where that is set."""
        return self.shadow_alpha if self.alpha_rank is None else self.shadow_alpha * self.alpha_rank / self.r

    @property
    def diagonal_ratio(self) -> float:
        """What the diagonal's part counts beside the bottleneck's, so that its scale is ``shadow_alpha`` at any rank."""
        return 1.0 if self.alpha_rank is None else self.r / self.alpha_rank

    @property
    def in_units(self) -> bool:
        """Whether the bottleneck works on what it reads in units of its RMS."""
        return self.inject_activation != "none" or self.inject_branch

    @property
    def has_midpoints(self) -> bool:
        """Whether what goes from attention into the MLP is corrected."""
        return self.inject_between == "sublayers"

    @property
    def is_implicit(self) -> bool:
        return self.shadow_model == "implicit"

    @property
    def truncation(self) -> tuple[str, int] | None:
        """(``first``, ``last`` or ``spaced``; number of blocks) where blocks of the base make the shadow, else None."""
        if not self.shadow_model.startswith("base:"):
            return None
        _, where, count = self.shadow_model.split(":")
        return where, int(count)

    @property
    def is_explicit(self) -> bool:
        """Whether the shadow comes from a path or the hub."""
        return not self.is_implicit and self.truncation is None

    @property
    def idle_sizes(self) -> dict[str, int]:
        """Sizes that are asked for and change nothing: a shadow that is not implicit brings its own."""
        chosen = {} if self.is_implicit else {name: getattr(self, name) for name in IMPLICIT_SIZES}
        defaults = {item.name: item.default for item in fields(self)}
        return {name: value for name, value in chosen.items() if value not in (None, defaults[name])}

    @property
    def shares_embeddings(self) -> bool:
        return not self.is_explicit if self.share_embeddings is None else self.share_embeddings

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "ShadowConfig":
        """The ``paper``'s formulas, the ``authors``' package's, Hugging Face ``peft``'s, what is ``recommended`` here, that
        with its weights in the corrections (``attached``), or those in twice as many places, which also read what the
        sublayer in front of them added, without an activation (``sublayers``); see docs/equations.md. A preset's sizes are left
        out where the shadow is not implicit."""
        if name not in PRESETS:
            raise ConfigError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
        return cls.from_dict({**preset_fields(name, overrides.get("shadow_model", "implicit")), **overrides})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ShadowConfig":
        """Builds a config from plain values; an unknown key is an error that names it and the nearest field."""
        check_keys(values, {item.name for item in fields(cls)}, what="shadow config")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def replace(self, **changes: Any) -> "ShadowConfig":
        return replace(self, **changes)


# What an implicit shadow alone can be asked to be.
IMPLICIT_SIZES = (
    "shadow_num_hidden_layers", "shadow_hidden_size", "shadow_num_attention_heads", "shadow_num_key_value_heads",
    "shadow_head_dim", "shadow_intermediate_size",
)  # fmt: skip

# What this project found to work best; LOG.md has the search, on validation rows.
_RECOMMENDED: dict[str, Any] = {
    "shadow_alpha": 4.0,  # docs/compare.md has what led here
    "shadow_dropout": 0.0,
    "scale_state": True,
    "inject_diagonal": True,
    "inject_activation": "silu",
    "use_update": False,
    "auxiliary_loss_weight": 8.0,
    "shadow_lr_multiplier": 0.3,
}
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "recommended": _RECOMMENDED,
    # For a base on which a shadow alone is a poor model: the weights are in the corrections, and less is asked of the shadow.
    "attached": {
        **_RECOMMENDED,
        "r": 64,
        "alpha_rank": 8,
        "shadow_num_attention_heads": 1,
        "shadow_intermediate_size": 64,
        "auxiliary_loss_weight": 2.0,
    },
    # The same, in twice as many places, each of which also reads what the sublayer in front of it added.
    "sublayers": {
        **_RECOMMENDED,
        "inject_between": "sublayers",
        "inject_branch": True,
        "inject_activation": "none",
        "shadow_alpha": 2.0,
        "r": 32,
        "alpha_rank": 8,
        "shadow_num_attention_heads": 1,
        "shadow_intermediate_size": 32,
        "auxiliary_loss_weight": 0.2,
    },
    "authors": {"shadow_layer_types": "base"},
    "peft": {
        "shadow_layer_types": "base",
        "first_block": 0,
        "dropout_at": "input",
        "down_init": "linear",
        "update_norm": "none",
        "update_activation": "gelu",
        "update_bias": True,
        "transform_dropout": False,
        "r": 8,
        "update_hidden_size": 8,
    },
}


def preset_fields(name: str, shadow_model: str) -> dict[str, Any]:
    """What a preset sets beside this shadow: its sizes are those of an implicit one."""
    is_implicit = shadow_model == "implicit"
    return {field: value for field, value in PRESETS[name].items() if is_implicit or field not in IMPLICIT_SIZES}


def preset_over_others(name: str, shadow_model: str) -> dict[str, Any]:
    """What a preset sets where another may have been: its own fields, and the defaults of what any other sets but sizes."""
    sizes = {*IMPLICIT_SIZES, "r", "update_hidden_size"}
    others = {field for preset in PRESETS.values() for field in preset} - sizes
    defaults = {item.name: item.default for item in fields(ShadowConfig) if item.name in others}
    return defaults | preset_fields(name, shadow_model)


def check_types(config: Any) -> None:
    """Refuses a config dataclass with a field whose value is not of the field's type."""
    hints = get_type_hints(type(config))
    for item in fields(config):
        value, hint = getattr(config, item.name), hints[item.name]
        if get_origin(hint) is Literal:
            require(value in get_args(hint), item.name, value, f"one of {', '.join(map(repr, get_args(hint)))}")
            continue
        allowed = tuple(get_args(hint)) or (hint,)
        allowed += (int,) if float in allowed else ()
        is_bool_mismatch = isinstance(value, bool) and bool not in allowed
        ok = isinstance(value, allowed) and not is_bool_mismatch
        require(ok, item.name, value, f"of type {' or '.join(t.__name__ for t in allowed)}")


def check_keys(values: dict[str, Any], known: set[str], *, what: str) -> None:
    """Refuses keys outside ``known``, suggesting the nearest one."""
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, sorted(known), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(sorted(known))}"
            raise ConfigError(f"unknown key {key!r} in {what}{hint}")


def require(condition: bool, name: str, value: Any, expected: str) -> None:
    """Raises ConfigError for a field whose value does not meet a condition."""
    if not condition:
        raise ConfigError(f"{name}={value!r} is not valid: expected {expected}")
