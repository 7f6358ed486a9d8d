"""One cache for both paths: the shadow's layers sit behind the base's in the same ``Cache``.

Crop, reorder, reset, repeat, select and offload then act on both paths, and ``generate`` needs no override.
"""

from dataclasses import fields

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


def one_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """The cache of a call that takes it under both names.

    Raises:
        ConfigError: it was given twice.
    """
    if past_key_values is not None and cache is not None:
        raise ConfigError("past_key_values= and cache= are two names of one thing; give one of them")
    return cache if past_key_values is None else past_key_values


def shadow_view(cache: Cache, *, base: PreTrainedConfig, shadow: PreTrainedConfig) -> Cache:
    """A view of the shadow's layers of ``cache``, which are appended on first use.

    Args:
        cache: the cache of the call, made by anyone; changed in place.
        base: config of the base, whose layers come first.
        shadow: config of the shadow backbone.

    Raises:
        ConfigError: the cache has neither the base's number of layers nor that of both paths, or only the base has seen
            some of its tokens.
    """
    num_base, num_shadow = base.num_hidden_layers, shadow.num_hidden_layers
    if len(cache.layers) < num_base and cache.layer_class_to_replicate is not None:
        missing = num_base - len(cache.layers)
        cache.layers.extend(cache.layer_class_to_replicate() for _ in range(missing))
    if len(cache.layers) == num_base:
        if cache.get_seq_length() > 0:
            raise ConfigError(_ONE_SIDED)
        cache.layers.extend(_new_layers(cache, shadow))
    if len(cache.layers) != num_base + num_shadow:
        raise ConfigError(
            f"the cache has {len(cache.layers)} layers; expected {num_base} (the base's) or {num_base + num_shadow} "
            "(base and shadow): it was made for another model or adapter"
        )
    # Static layers count on their device, where asking would be a wait, or a break in a compiled graph. The shadow may be
    # ahead, of what it drafts.
    if _static_length(cache) is None and cache.get_seq_length() > cache.get_seq_length(num_base):
        raise ConfigError(_ONE_SIDED)
    return _view(cache, num_base)


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


def _view(cache: Cache, start: int) -> Cache:
    view = Cache(layers=cache.layers[start:])
    view.offloading = cache.offloading
    if cache.offloading:
        view.only_non_sliding, view.prefetch_stream = cache.only_non_sliding, cache.prefetch_stream
    return view
