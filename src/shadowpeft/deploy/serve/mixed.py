"""One pass of the base for rows that different shadows refine, and rows that none does."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig, PreTrainedModel

from shadowpeft.core import ShadowRun
from shadowpeft.deploy.serve.joining import new_cache
from shadowpeft.model import ShadowModel
from shadowpeft.model.architectures import architecture_of, blocks_of, decoder_of, head_of
from shadowpeft.model.attach import RUN_KEYWORD
from shadowpeft.model.cache import CACHE


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

    @property
    def corrects_between(self) -> bool:
        return any(run.corrects_between for _, run in self.parts)

    def step(self, block_index: int, h: Tensor) -> Tensor:
        """The corrected input of block ``block_index``, [B, T, d]."""
        for rows, run in self.parts:
            h = h.index_copy(0, rows.to(h.device), run.step(block_index, h[rows]))
        return h

    def between(self, block_index: int, added: Tensor) -> Tensor:
        """What attention of block ``block_index`` is to add to the residual stream, [B, T, d]."""
        for rows, run in self.parts:
            if run.corrects_between:
                corrected = run.between(block_index, added[rows])
                added = added.index_copy(0, rows.to(added.device), corrected.to(added.dtype))
        return added

    def check(self, num_blocks: int) -> None:
        """As :meth:`ShadowRun.check`, of every run."""
        for _, run in self.parts:
            run.check(num_blocks)


# Of each adapter: indices [b] of its rows, and their s(0) [b, T, d].
States = dict[str, tuple[Tensor, Tensor]]


def mixed_logits(
    model: PreTrainedModel, paths: Sequence[Path], ids: Tensor, mask: Tensor, caches: dict[str, Cache]
) -> Tensor:
    """Logits of the next token of every row, [B, V].

    Args:
        model: a :class:`ShadowModel`, or any causal language model if every path is the base's.
        paths: one for each row.
        ids: [B, T], the new tokens, left-padded.
        mask: [B, W], 1 for tokens, W columns so far with the new ones.
        caches: by name; grown in place, made where missing.
    """
    states = initial_states(model, paths, ids, mask, caches)
    pieces: list[tuple[Tensor, Tensor]] = []
    for rows, initial in states.values():
        alone = torch.tensor([not paths[row].uses_base for row in rows.tolist()], device=ids.device)
        if alone.any():
            pieces.append((rows[alone], initial[alone][:, -1]))
    with_base = _rows(paths, lambda path: path.uses_base, ids)
    if len(with_base):
        pieces.append((with_base, base_hidden(model, paths, states, ids, mask, caches)[:, -1]))
    return head_logits(model, _in_order(pieces))


def initial_states(
    model: PreTrainedModel, paths: Sequence[Path], ids: Tensor, mask: Tensor, caches: dict[str, Cache]
) -> States:
    """s(0) of the new tokens of every row that has a shadow; arguments as for :func:`mixed_logits`."""
    states: States = {}
    for name in dict.fromkeys(path.adapter for path in paths if path.adapter is not None):
        assert isinstance(model, ShadowModel)
        network = model.network(name)
        rows = _rows(paths, lambda path, name=name: path.adapter == name, ids)
        cache = _cache(caches, f"shadow:{name}", network.backbone.config)
        inputs = _inputs(rows, ids, mask) | {CACHE: cache}
        states[name] = rows, model._initial_state(network, ids[rows], None, None, inputs)
    return states


def base_hidden(
    model: PreTrainedModel,
    paths: Sequence[Path],
    states: States,
    ids: Tensor,
    mask: Tensor,
    caches: dict[str, Cache],
) -> Tensor:
    """The last hidden states [b, T, d] of the b rows that use the base, each refined by its shadow.

    Args:
        states: of the same tokens, as :func:`initial_states` gives them.
    """
    rows = _rows(paths, lambda path: path.uses_base, ids)
    place = torch.zeros(len(paths), dtype=torch.long, device=ids.device)
    place[rows] = torch.arange(len(rows), device=ids.device)
    parts = []
    for name, (owners, initial) in states.items():
        assert isinstance(model, ShadowModel)
        attached = torch.tensor([paths[row].uses_base for row in owners.tolist()], device=ids.device)
        if attached.any():
            parts.append((place[owners[attached]], ShadowRun(model.network(name), initial[attached])))
    decoder = decoder_of(model.base if isinstance(model, ShadowModel) else model)
    cache = _cache(caches, "base", decoder.config)
    run = MixedRun(parts)
    inputs = _inputs(rows, ids, mask) | {CACHE: cache} | ({RUN_KEYWORD: run} if parts else {})
    hidden = decoder(input_ids=ids[rows], **inputs).last_hidden_state
    run.check(len(blocks_of(decoder)))
    return hidden


def head_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """The base's head on [..., d] -> [..., V]."""
    base = model.base if isinstance(model, ShadowModel) else model
    return architecture_of(base.config).finish_logits(base.config, head_of(base)(hidden))


def draft_logits(model: PreTrainedModel, states: States) -> Tensor:
    """What the shadows alone expect behind the newest token of every row, [B, V]; every row has a shadow."""
    return head_logits(model, _in_order([(rows, initial[:, -1]) for rows, initial in states.values()]))


def _in_order(pieces: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """(indices [b], values [b, d]) of disjoint rows -> [B, d]."""
    rows, values = (torch.cat(part) for part in zip(*pieces, strict=True))
    return values[rows.argsort()]


def _inputs(rows: Tensor, ids: Tensor, mask: Tensor) -> dict[str, Any]:
    mask = mask[rows]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return {"attention_mask": mask, "position_ids": positions, "use_cache": True}


def _cache(caches: dict[str, Cache], name: str, config: PreTrainedConfig) -> Cache:
    if name not in caches:
        caches[name] = new_cache(config)
    return caches[name]


def _rows(paths: Sequence[Path], wanted: Callable[[Path], bool], ids: Tensor) -> Tensor:
    return torch.tensor([i for i, path in enumerate(paths) if wanted(path)], dtype=torch.long, device=ids.device)
