"""Speculative decoding with the shadow as its own model's draft."""

from shadowpeft.generate.api import SpeculativeFallbackWarning
from shadowpeft.generate.config import SpeculativeConfig, as_speculative
from shadowpeft.generate.statistics import SpeculativeOutput, SpeculativeStatistics, collect_statistics

__all__ = [
    "SpeculativeConfig",
    "SpeculativeFallbackWarning",
    "SpeculativeOutput",
    "SpeculativeStatistics",
    "as_speculative",
    "collect_statistics",
]
