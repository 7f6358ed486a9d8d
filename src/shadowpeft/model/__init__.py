"""Contact with transformers: architectures, attaching, cache, task models, checkpoints."""

from shadowpeft.model.architectures import ARCHITECTURES
from shadowpeft.model.tasks import (
    ShadowModelForCausalLM,
    ShadowModelForSequenceClassification,
    get_shadow_model,
)
from shadowpeft.model.wrapper import ShadowModel

__all__ = [
    "ARCHITECTURES",
    "ShadowModel",
    "ShadowModelForCausalLM",
    "ShadowModelForSequenceClassification",
    "get_shadow_model",
]
