"""A running batch: rows of any adapters and modes that advance by one token together."""

import contextlib
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache

from shadowpeft.deploy.serve import joining
from shadowpeft.deploy.serve.errors import ApiError
from shadowpeft.deploy.serve.exported import ExportedModel, Served
from shadowpeft.deploy.serve.mixed import mixed_logits
from shadowpeft.deploy.serve.sampling import choose, facts
from shadowpeft.deploy.serve.sequence import Sequence
from shadowpeft.model import ShadowModel
from shadowpeft.model.positions import num_positions, rope_border


@dataclass(kw_only=True)
class Batch:
    """Rows that are decoded together.

    Attributes:
        sequences: one for each row.
        mask: [B, W], 1 where a column of a row holds a token; every row ends in the last column.
        tokens: [B], the newest token of each row, which no cache has seen yet.
        caches: ``base`` and one ``shadow:NAME`` for each adapter, over those rows that need it, in batch order.
    """

    sequences: list[Sequence] = field(default_factory=list)
    mask: Tensor | None = None
    tokens: Tensor | None = None
    caches: dict[str, Cache] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.sequences)


def most_tokens(model: Served) -> float:
    """Tokens that a row may have, prompt and answer: those the model was made for, but none past the border of a long rope.

    Behind it a whole pass is turned by other factors: the shorter rows beside it too, and unlike what was cached before.
    """
    configs: list[Any] = [model.config]
    if isinstance(model, ShadowModel):
        configs += [model.network(name).backbone.config for name in model.networks]
    borders = map(rope_border, configs)
    return min(num_positions(model.config), *(border for border in borders if border is not None), math.inf)


@torch.inference_mode()
def prefill(model: Served, sequences: list[Sequence]) -> Batch:
    """Reads the prompts and takes one token for each; rows that end with it are left out of the result."""
    width = max(len(sequence.job.prompt) for sequence in sequences)
    rows = [torch.tensor(sequence.job.prompt) for sequence in sequences]
    ids = torch.stack([F.pad(row, (width - len(row), 0)) for row in rows]).to(model.device)
    mask = torch.stack([F.pad(torch.ones_like(row), (width - len(row), 0)) for row in rows]).to(model.device)
    batch = Batch(sequences=list(sequences), mask=mask)
    return _advance(batch, _next_logits(model, batch, ids))


@torch.inference_mode()
def step(model: Served, batch: Batch) -> Batch:
    """One token more for every row."""
    assert batch.mask is not None and batch.tokens is not None
    batch.mask = F.pad(batch.mask, (0, 1), value=1)
    return _advance(batch, _next_logits(model, batch, batch.tokens[:, None]))


@torch.inference_mode()
def merge(first: Batch, second: Batch) -> Batch:
    """Both batches as one; the narrower one gets empty columns on its left.

    Should there be no memory for it, ``first`` is what it was before: its rows can go on without the others.
    """
    if not len(first) or not len(second):
        return first if len(first) else second
    assert first.mask is not None and second.mask is not None
    assert first.tokens is not None and second.tokens is not None
    width = max(first.mask.shape[1], second.mask.shape[1])
    masks = [F.pad(mask, (width - mask.shape[1], 0)) for mask in (first.mask, second.mask)]
    with contextlib.ExitStack() as undo:
        for cache in first.caches.values():
            undo.callback(joining.cut, cache, num_rows=joining.num_rows(cache), width=first.mask.shape[1])
        for cache in (*first.caches.values(), *second.caches.values()):
            joining.widen(cache, width)
        caches = dict(first.caches)
        for name, cache in second.caches.items():
            if name in caches:
                joining.join(caches[name], cache)
            else:
                caches[name] = cache
        merged = Batch(
            sequences=first.sequences + second.sequences,
            mask=torch.cat(masks),
            tokens=torch.cat([first.tokens, second.tokens]),
            caches=caches,
        )
        undo.pop_all()
    return merged


@torch.inference_mode()
def keep(batch: Batch, rows: list[int]) -> Batch:
    """Only ``rows`` (ascending), without columns that are empty for all of them."""
    if len(rows) == len(batch):
        return batch
    if not rows:
        return Batch()
    assert batch.mask is not None and batch.tokens is not None
    chosen = torch.tensor(rows, device=batch.mask.device)
    mask = batch.mask[chosen]
    empty = int((mask.cumsum(-1) == 0).all(0).sum())
    caches = {}
    for name, cache in batch.caches.items():
        owners = [row for row, s in enumerate(batch.sequences) if name in s.job.path.caches()]
        places = [place for place, row in enumerate(owners) if row in set(rows)]
        if places:
            joining.keep(cache, torch.tensor(places, device=mask.device))
            joining.narrow(cache, mask.shape[1] - empty)
            caches[name] = cache
    return Batch(
        sequences=[batch.sequences[row] for row in rows],
        mask=mask[:, empty:],
        tokens=batch.tokens[chosen],
        caches=caches,
    )


def _next_logits(model: Served, batch: Batch, ids: Tensor) -> Tensor:
    """[B, V], behind the new tokens ``ids`` [B, T], which the mask counts already."""
    assert batch.mask is not None
    if isinstance(model, ExportedModel):
        return model.next_logits(ids, batch.mask, batch.caches)
    return mixed_logits(model, [s.job.path for s in batch.sequences], ids, batch.mask, batch.caches)


def _advance(batch: Batch, logits: Tensor) -> Batch:
    """Draws a token for every row from ``logits`` [B, V] and drops the rows that are done."""
    is_sound = logits.isfinite().all(-1).tolist()
    best = logits.argmax(-1)
    greedy = best.tolist()
    tokens, going = [], []
    for row, sequence in enumerate(batch.sequences):
        job = sequence.job
        if not is_sound[row]:
            tokens.append(0)
            sequence.fail(ApiError("the model returned values that are not finite", status=500, code="model_failed"))
            continue
        is_greedy = job.sampling.temperature == 0
        token = greedy[row] if is_greedy else choose(logits[row], job.sampling, sequence.generator)
        tokens.append(token)
        if sequence.take(token, None if job.num_top is None else facts(logits[row], token, job.num_top)):
            going.append(row)
    batch.tokens = torch.tensor(tokens, device=logits.device)
    return keep(batch, going)
