"""One cache for both paths: the shadow's layers sit behind the base's in the same ``Cache``.

Crop, reorder, reset, repeat and select then act on both paths, and ``generate`` needs no override. Where the cache offloads,
the shadow's few layers stay where they are computed.
"""

from dataclasses import fields
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig, StaticCache
from transformers.cache_utils import StaticLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from shadowpeft.errors import ConfigError

# What transformers calls a cache in its keywords, outputs and model_kwargs: "cache" since 5.24, "past_key_values" before.
CACHE = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"
_ONE_SIDED = (
    "this cache holds tokens that only the base has seen; the shadow needs them too: start with an empty cache, or with one "
    "of whose calls none went to the base alone"
)
_FILLER = "shadow_filler"


class Filler:
    """Which network filled a cache. A copy of it knows that too; one out of a file does not, as its network is a new one."""

    def __init__(self, identity: str | None = None) -> None:
        self.identity = identity

    def __deepcopy__(self, memo: dict[int, Any]) -> "Filler":
        return self

    def __reduce__(self) -> tuple[type["Filler"], tuple[()]]:
        return Filler, ()


def one_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """The cache of a call that takes it under both names.

    Raises:
        ConfigError: it was given twice.
    """
    if past_key_values is not None and cache is not None:
        raise ConfigError("past_key_values= and cache= are two names of one thing; give one of them")
    return cache if past_key_values is None else past_key_values


def shadow_view(cache: Cache, *, base: PreTrainedConfig, shadow: PreTrainedConfig, identity: str) -> Cache:
    """A view of the shadow's layers of ``cache``, which are appended on first use.

    Args:
        cache: the cache of the call, made by anyone; changed in place.
        base: config of the base, whose layers come first.
        shadow: config of the shadow backbone.
        identity: of the shadow's network.

    Raises:
        ConfigError: the cache has neither the base's number of layers nor that of both paths, or only the base has seen
            some of its tokens, or another network has.
    """
    num_base, num_shadow = base.num_hidden_layers, shadow.num_hidden_layers
    if len(cache.layers) < num_base and cache.layer_class_to_replicate is not None:
        missing = num_base - len(cache.layers)
        cache.layers.extend(cache.layer_class_to_replicate() for _ in range(missing))
    if len(cache.layers) == num_base:
        if cache.get_seq_length() > 0:
            raise ConfigError(_ONE_SIDED)
        is_recording = any(getattr(layer, "record_past", False) for layer in cache.layers)
        cache.layers.extend(_new_layers(cache, shadow))
        if is_recording:  # assisted decoding asked the layers there were, before the shadow's
            cache.activate_past_recording()
    if len(cache.layers) != num_base + num_shadow:
        raise ConfigError(
            f"the cache has {len(cache.layers)} layers; expected {num_base} (the base's) or {num_base + num_shadow} "
            "(base and shadow): it was made for another model or adapter"
        )
    # Static layers count on their device, where asking would be a wait, or a break in a compiled graph. The shadow may be
    # ahead, of what it drafts.
    if _static_length(cache) is None and cache.get_seq_length() > cache.get_seq_length(num_base):
        raise ConfigError(_ONE_SIDED)
    view = Cache(layers=cache.layers[num_base:])
    if cache.offloading:
        # Each layer's update fetches the one behind it. The base's first was fetched behind the base's last, where the shadow's
        # are now; on the stream of the copies to the host, which it has to wait for.
        cache.layers[0].prefetch()
    if not torch.compiler.is_compiling():  # where a note on the cache would be one more thing that a graph depends on
        _note(cache, view, identity)
    return view


def _note(cache: Cache, view: Cache, identity: str) -> None:
    """Notes on ``cache`` that a network fills it.

    Raises:
        ConfigError: another one has, of which the shadow's layers still hold tokens.
    """
    known = getattr(cache, _FILLER, Filler()).identity
    if known == identity:
        return
    if known is not None and int(view.get_seq_length()) > 0:
        raise ConfigError(
            "this cache was filled under another adapter, whose shadow left its keys there: it was made for another model or "
            "adapter; start with an empty cache, or go on with the adapter that filled it"
        )
    setattr(cache, _FILLER, Filler(identity))


def _new_layers(cache: Cache, shadow: PreTrainedConfig) -> list:
    if cache.layer_class_to_replicate is not None:  # a bare DynamicCache(): masks look at one layer of each kind
        return [cache.layer_class_to_replicate() for _ in range(shadow.num_hidden_layers)]
    length = _static_length(cache)
    if length is None:
        return DynamicCache(config=shadow).layers
    return StaticCache(config=shadow, max_cache_len=length).layers


def _static_length(cache: Cache) -> int | None:
    lengths = [layer.max_cache_len for layer in cache.layers if isinstance(layer, StaticLayer)]
    return max(lengths) if lengths else None
