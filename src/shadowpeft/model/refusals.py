"""What a call of a task model is refused for, instead of doing something else than it was asked to."""

from typing import Any

from transformers import PreTrainedConfig

from shadowpeft.core.head_loss import IGNORE
from shadowpeft.errors import AdapterError, ConfigError


def refuse_rows(kwargs: dict[str, Any]) -> None:
    """Raises AdapterError for PEFT's ``adapter_names``: an adapter for each row, which this model does not have."""
    if kwargs.get("adapter_names") is not None:
        raise AdapterError("adapter_names is not supported: a call uses one adapter; pass adapter=NAME for each group")


def refuse_ignore_index(kwargs: dict[str, Any]) -> None:
    """Raises ConfigError for an ``ignore_index`` of transformers' losses that these losses do not have."""
    value = kwargs.get("ignore_index", IGNORE)
    if value != IGNORE:
        raise ConfigError(f"ignore_index={value} is not supported: labels that are {IGNORE} are left out; write {IGNORE} there")


def refuse_other_losses(config: PreTrainedConfig, kwargs: dict[str, Any]) -> None:
    """Raises ConfigError for what would change the loss of transformers' causal language models, and does not change these."""
    refuse_ignore_index(kwargs)
    asked = kwargs.get("output_router_logits")
    if getattr(config, "output_router_logits", False) if asked is None else asked:
        raise ConfigError(
            "output_router_logits=True beside labels asks for the loss that balances a mixture's experts, and the base's "
            "router is frozen: leave it out, set config.output_router_logits=False, or ask for the logits without labels"
        )


def refuse_without_shadow(output_shadow_logits: bool, output_logits: bool | None = None) -> None:
    """Raises ConfigError for what a call of the base alone cannot give: the shadow's logits, or a loss without logits."""
    if output_shadow_logits:
        raise ConfigError(
            "output_shadow_logits=True asks for the shadow's logits, but this call uses the base alone; leave it out, or call "
            "with an adapter"
        )
    if output_logits is False:
        raise ConfigError("output_logits=False is not for a call of the base alone, which always has logits; leave it out")
