"""How long a text a model was made for."""

import math
from typing import Any

from transformers import PreTrainedConfig


def num_positions(config: Any) -> float:
    """Positions the model was made for; unlimited where its config names none."""
    return getattr(config, "max_position_embeddings", None) or math.inf


def within_positions(length: int, *configs: Any) -> int:
    """The asked length, but never past the positions that any of these models was made for."""
    return int(min(length, *map(num_positions, configs)))


def rope_border(config: PreTrainedConfig) -> int | None:
    """Length of text past which a "longrope" model turns all positions by other factors; None where they never change.

    Keys that were cached up to there do not fit queries behind it.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return None
    return rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)


def dynamic_rope_border(config: PreTrainedConfig) -> int | None:
    """Length of text past which a "dynamic" model turns positions by the longest one of each pass; None where it never does."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope] if "rope_type" in rope else [kind for kind in rope.values() if isinstance(kind, dict)]  # by type of layer
    is_dynamic = any("dynamic" in str(kind.get("rope_type")) for kind in kinds)
    return config.max_position_embeddings if is_dynamic else None  # type: ignore[attr-defined]
