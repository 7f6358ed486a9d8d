"""ShadowPEFT: a frozen decoder-only language model, adapted by a small shadow network."""

from shadowpeft._version import __version__
from shadowpeft.core import ShadowConfig, ShadowNetwork, ShadowRun
from shadowpeft.generate import SpeculativeConfig, collect_statistics
from shadowpeft.model import (
    ShadowModel,
    ShadowModelForCausalLM,
    ShadowModelForSequenceClassification,
    get_shadow_model,
)

__all__ = [
    "ShadowConfig",
    "ShadowModel",
    "ShadowModelForCausalLM",
    "ShadowModelForSequenceClassification",
    "ShadowNetwork",
    "ShadowRun",
    "SpeculativeConfig",
    "__version__",
    "collect_statistics",
    "get_shadow_model",
]
