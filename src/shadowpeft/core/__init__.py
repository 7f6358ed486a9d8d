"""The method itself; depends on torch alone."""

from shadowpeft.core.config import PRESETS, ShadowConfig
from shadowpeft.core.network import ShadowNetwork
from shadowpeft.core.run import ShadowRun

__all__ = ["PRESETS", "ShadowConfig", "ShadowNetwork", "ShadowRun"]
