"""Taking tokens back out of the joint cache."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from packaging.version import Version
from transformers import Cache, __version__
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

# Before 5.18 a window that records hands out all that it has recorded, not what its mask covers.
CAN_DRAFT_IN_WINDOWS = Version(__version__) >= Version("5.18")


def why_not_croppable(cache: Cache, final_length: int) -> str | None:
    """Why rejected tokens could not be taken out of ``cache`` again, or None if they can.

    Args:
        final_length: tokens the cache will hold at most.
    """
    for layer in cache.layers:
        if type(layer) is StaticSlidingWindowLayer:
            if final_length > layer.max_cache_len:
                return (
                    f"a static layer with a window of {layer.max_cache_len} overwrites old tokens, and {final_length} "
                    "may come; use a dynamic cache"
                )
        elif type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer):
            return f"a layer of type {type(layer).__name__} cannot give up its last tokens; use a dynamic cache"
    replicated = cache.layer_class_to_replicate
    if replicated not in (None, DynamicLayer):
        return f"layers of type {replicated.__name__} cannot give up their last tokens; use a dynamic cache"
    return None


def why_not_draftable(shadow_layers: Cache, final_length: int) -> str | None:
    """Why several drafts in a row could not be cached, or None if they can; arguments as above, for the shadow's layers."""
    windows = [layer for layer in shadow_layers.layers if isinstance(layer, DynamicSlidingWindowLayer)]
    if CAN_DRAFT_IN_WINDOWS or all(final_length < layer.sliding_window for layer in windows):
        return None
    return "the shadow's window has more keys than its mask as soon as it drafts twice; update transformers to 5.18 or later"


def roll_back(cache: Cache, num_tokens: int) -> None:
    """Removes the last ``num_tokens`` tokens (0 too: it lets windows drop what they kept only for this).

    In a static layer what lies behind its length is hidden by every mask and written over next, so the length is all
    there is to change.
    """
    layers: list[Any] = cache.layers  # only of the kinds that :func:`why_not_croppable` lets through
    for layer in layers:
        if isinstance(layer, StaticLayer):
            if num_tokens and layer.is_initialized:
                layer.cumulative_length.sub_(num_tokens)
                if isinstance(layer, StaticSlidingWindowLayer):
                    layer.cumulative_length_int -= num_tokens
        else:
            layer.crop(-num_tokens)


@contextmanager
def recording(cache: Cache) -> Iterator[None]:
    """Within the block, windows keep what they slide over until the next :func:`roll_back`."""
    windows = [layer for layer in cache.layers if isinstance(layer, DynamicSlidingWindowLayer)]
    before = [layer.record_past for layer in windows]
    for layer in windows:
        layer.activate_past_recording()
    try:
        yield
    finally:
        for layer, value in zip(windows, before, strict=True):
            layer.record_past = value
