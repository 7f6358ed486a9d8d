"""One pass of the base for rows that different shadows refine, and rows that none does."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig, PreTrainedModel

from shadowpeft.core import ShadowRun
from shadowpeft.deploy.serve.joining import new_cache
from shadowpeft.model import ShadowModel
from shadowpeft.model.architectures import architecture_of, decoder_of, head_of
from shadowpeft.model.attach import RUN_KEYWORD


@dataclass(frozen=True, kw_only=True)
class Path:
    """Which networks a row runs through.

    Attributes:
        adapter: whose shadow, or None.
        uses_base: whether the base runs. Without it the answer is the detached shadow's.
    """

    adapter: str | None
    uses_base: bool

    def caches(self) -> list[str]:
        """Names of the caches that hold keys of such a row."""
        shadow = [] if self.adapter is None else [f"shadow:{self.adapter}"]
        return ["base"] * self.uses_base + shadow


class MixedRun:
    """The shadow states of one call whose rows belong to several adapters (or none).

    Stands where a :class:`ShadowRun` does. Adapters are corrected one after the other, each on its own rows; the
    frozen block, which costs most, runs once over all of them.

    Args:
        parts: (indices [b] of the rows, their run), with no row in two of them.
    """

    __slots__ = ("parts",)

    def __init__(self, parts: Sequence[tuple[Tensor, ShadowRun]]) -> None:
        self.parts = parts

    def step(self, block_index: int, h: Tensor) -> Tensor:
        """The corrected input of block ``block_index``, [B, T, d]."""
        for rows, run in self.parts:
            h = h.index_copy(0, rows.to(h.device), run.step(block_index, h[rows]))
        return h


def mixed_logits(model: PreTrainedModel, paths: Sequence[Path], ids: Tensor, mask: Tensor, caches: dict[str, Cache]) -> Tensor:
    """Logits of the next token of every row, [B, V].

    Args:
        model: a :class:`ShadowModel`, or any causal language model if every path is the base's.
        paths: one for each row.
        ids: [B, T], the new tokens, left-padded.
        mask: [B, W], 1 for tokens, W columns so far with the new ones.
        caches: by name; grown in place, made where missing.
    """
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]

    def inputs(rows: Tensor) -> dict[str, Any]:
        return {"attention_mask": mask[rows], "position_ids": positions[rows], "use_cache": True}

    hidden: Tensor | None = None
    parts: list[tuple[Tensor, ShadowRun]] = []
    with_base = _rows(paths, lambda path: path.uses_base, ids)
    place_in_base = torch.zeros(len(paths), dtype=torch.long, device=ids.device)
    place_in_base[with_base] = torch.arange(len(with_base), device=ids.device)
    pieces: list[tuple[Tensor, Tensor]] = []
    for name in dict.fromkeys(path.adapter for path in paths if path.adapter is not None):
        assert isinstance(model, ShadowModel)
        network = model.network(name)
        rows = _rows(paths, lambda path, name=name: path.adapter == name, ids)
        cache = _cache(caches, f"shadow:{name}", network.backbone.config)
        initial = model._initial_state(network, ids[rows], None, None, inputs(rows) | {"past_key_values": cache})
        attached = torch.tensor([paths[row].uses_base for row in rows.tolist()], device=ids.device)
        if attached.any():
            parts.append((place_in_base[rows[attached]], ShadowRun(network, initial[attached])))
        if not attached.all():
            pieces.append((rows[~attached], initial[~attached][:, -1]))
    if len(with_base):
        pieces.append((with_base, _base_hidden(model, ids[with_base], inputs(with_base), parts, caches)))
    for rows, piece in pieces:
        hidden = piece.new_empty(len(paths), piece.shape[-1]) if hidden is None else hidden
        hidden[rows] = piece
    assert hidden is not None
    base = model.base if isinstance(model, ShadowModel) else model
    return architecture_of(base.config).finish_logits(base.config, head_of(base)(hidden))


def _base_hidden(
    model: PreTrainedModel,
    ids: Tensor,
    inputs: dict[str, Any],
    parts: list[tuple[Tensor, ShadowRun]],
    caches: dict[str, Cache],
) -> Tensor:
    """The last hidden state of the rows that use the base, [b, d]."""
    decoder = decoder_of(model.base if isinstance(model, ShadowModel) else model)
    cache = _cache(caches, "base", decoder.config)
    run = {RUN_KEYWORD: MixedRun(parts)} if parts else {}
    return decoder(input_ids=ids, past_key_values=cache, **inputs, **run).last_hidden_state[:, -1]


def _cache(caches: dict[str, Cache], name: str, config: PreTrainedConfig) -> Cache:
    if name not in caches:
        caches[name] = new_cache(config)
    return caches[name]


def _rows(paths: Sequence[Path], wanted: Any, ids: Tensor) -> Tensor:
    return torch.tensor([i for i, path in enumerate(paths) if wanted(path)], dtype=torch.long, device=ids.device)
