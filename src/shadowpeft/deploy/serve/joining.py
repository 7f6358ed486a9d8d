"""Caches of left-padded rows that grow together: joining two batches, dropping rows, dropping empty columns.

A row's keys end in the last column; columns in front of its first token hold zeros and are masked. ``width`` counts
all columns. A windowed layer stores only its last ``window - 1`` columns.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from shadowpeft.errors import ArchitectureError


def new_cache(config: PreTrainedConfig) -> DynamicCache:
    """An empty cache whose layers can be joined.

    Raises:
        ArchitectureError: the model keeps something else than keys and values.
    """
    cache = DynamicCache(config=config)
    for layer in cache.layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise ArchitectureError(
                f"a {config.model_type} model caches with {type(layer).__name__}, which cannot be joined row by row; "
                "it cannot be served in batches"
            )
    return cache


def layers_of(cache: Cache) -> list[Any]:
    """Its layers, which hold keys and values [b, heads, columns, head size]; transformers' own type promises less."""
    return cache.layers


def stored_columns(layer: DynamicLayer, width: int) -> int:
    return min(width, layer.sliding_window - 1) if isinstance(layer, DynamicSlidingWindowLayer) else width


def widen(cache: Cache, width: int) -> None:
    """Adds empty columns on the left until there are ``width``."""
    for layer in layers_of(cache):
        missing = stored_columns(layer, width) - layer.keys.shape[-2]
        if missing:
            layer.keys, layer.values = (F.pad(part, (0, 0, missing, 0)) for part in (layer.keys, layer.values))
        _set_width(layer, width)


def narrow(cache: Cache, width: int) -> None:
    """Drops columns on the left until there are ``width``."""
    for layer in layers_of(cache):
        surplus = layer.keys.shape[-2] - stored_columns(layer, width)
        if surplus:
            layer.keys, layer.values = layer.keys[..., surplus:, :], layer.values[..., surplus:, :]
        _set_width(layer, width)


def join(first: Cache, second: Cache) -> None:
    """Appends the rows of ``second`` to ``first``; both have the same width."""
    for left, right in zip(layers_of(first), layers_of(second), strict=True):
        left.keys, left.values = torch.cat([left.keys, right.keys]), torch.cat([left.values, right.values])


def num_rows(cache: Cache) -> int:
    return layers_of(cache)[0].keys.shape[0]


def cut(cache: Cache, *, num_rows: int, width: int) -> None:
    """Takes back what :func:`widen` and :func:`join` added, also where they stopped half way: views, which need no memory."""
    for layer in layers_of(cache):
        layer.keys, layer.values = layer.keys[:num_rows], layer.values[:num_rows]
    narrow(cache, width)


def keep(cache: Cache, rows: Tensor) -> None:
    """Keeps ``rows``, in that order."""
    cache.batch_select_indices(rows)


def realign(cache: Cache, *, num_columns: int, ends: Tensor, width: int) -> None:
    """Moves every row so that it ends in the last of ``width`` columns; what is behind its end is dropped.

    Args:
        num_columns: columns so far. Windows were recorded since the last call (``generate.rollback.recording``), so
            that they still hold what a row that moves to the right needs.
        ends: [b], the column behind each row's last token.
    """
    for layer in layers_of(cache):
        stored, kept = layer.keys.shape[-2], stored_columns(layer, width)
        columns = torch.arange(width - kept, width, device=ends.device) + (ends[:, None] - width)
        # Columns in front of a row's first token may come from anywhere, since masks hide them.
        places = (columns - (num_columns - stored)).clamp(min=0).to(layer.keys.device)[:, None, :, None]
        layer.keys = layer.keys.gather(-2, places.expand(*layer.keys.shape[:2], -1, layer.keys.shape[-1]))
        layer.values = layer.values.gather(-2, places.expand(*layer.values.shape[:2], -1, layer.values.shape[-1]))
        _set_width(layer, width)


def _set_width(layer: DynamicLayer, width: int) -> None:
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = width
