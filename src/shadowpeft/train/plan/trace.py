"""One training step on tensors without memory: what is alive at its peak, what is kept, what is computed.

The forward pass, losses, backward pass and optimizer are those that train, run by torch on fake tensors; nothing is
estimated by a formula. What differs from a real step is the scratch inside kernels and the allocator's rounding.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from shadowpeft.core.losses import shared_head_losses
from shadowpeft.model.architectures import head_of
from shadowpeft.model.tasks import ShadowModelForCausalLM
from shadowpeft.train.groups import parameter_groups
from shadowpeft.train.plan.ledger import Ledger, Phase
from shadowpeft.train.plan.skeleton import Skeleton, bytes_of


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """What a step is made of. Its rows are of unequal lengths, as rows are, which brings an attention mask [B, 1, T, T].

    Attributes:
        batch, length: rows and tokens of each.
        labelled: share of the tokens that carry a label; the head runs on these alone.
        accumulates: whether gradients of an earlier forward pass are there already.
        chunk_rows: rows of logits in memory at a time; None: as on a CPU.
    """

    batch: int
    length: int
    labelled: float = 1.0
    accumulates: bool = False
    chunk_rows: int | None = None

    @property
    def num_tokens(self) -> int:
        return self.batch * self.length

    @property
    def num_labels(self) -> int:
        """Labelled positions; the last of a row has no next token."""
        return max(1, round(self.labelled * self.batch * (self.length - 1)))


@dataclass(frozen=True, kw_only=True)
class StepTrace:
    """Bytes of one step.

    Attributes:
        base, adapter, gradients, optimizer, batch: what has to be there.
        kept: what autograd keeps from forward to backward pass, without weights and batch.
        loss_chunk: what the losses need at once beyond that.
        peaks: phase -> bytes of all tensors at its worst moment.
        operations: (floating point operations, bytes moved) of each operation.
    """

    shape: StepShape
    base: int
    adapter: int
    gradients: int
    optimizer: int
    batch: int
    kept: int
    loss_chunk: int
    peaks: dict[str, int]
    operations: list[tuple[int, int]]

    @property
    def peak(self) -> int:
        return max(self.peaks.values())

    @property
    def worst_phase(self) -> str:
        return max(self.peaks, key=lambda name: self.peaks[name])

    @property
    def flops(self) -> int:
        return sum(flops for flops, _ in self.operations)


def trace_step(skeleton: Skeleton, shape: StepShape) -> StepTrace:
    """Traces the second step of a run: the optimizer's states are there, gradients only where they accumulate."""
    model = skeleton.model
    ledger = Ledger(num_labels=shape.num_labels)
    with skeleton.mode, ledger:
        trained = [p for p in model.network().parameters() if p.requires_grad]
        for tensor in (*model.parameters(), *model.buffers()):
            ledger.add(tensor)
        optimizer = torch.optim.AdamW(parameter_groups(model, learning_rate=1e-3), fused=True)
        _fill_states(optimizer, trained)
        if shape.accumulates:
            _give_gradients(trained)
        fixed = ledger.live
        batch = _batch(shape, is_classifier=not isinstance(model, ShadowModelForCausalLM))
        size = ledger.live - fixed
        with ledger.phase("forward"):
            step = _forward(model, batch)
        with ledger.phase("loss") as losses:
            loss = step if isinstance(step, Tensor) else _loss(model, step, batch, shape.chunk_rows)
            del step
        with ledger.phase("backward"):
            loss.backward()
            del loss
        with ledger.phase("optimizer"):
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
        states = bytes_of(value for state in optimizer.state.values() for value in state.values())
        gradients = bytes_of(p.grad for p in trained)
        optimizer.zero_grad()
    base = bytes_of((*model.base.parameters(), *model.base.buffers()))
    return StepTrace(
        shape=shape,
        base=base,
        adapter=bytes_of((*model.parameters(), *model.buffers())) - base,
        gradients=gradients,
        optimizer=states,
        batch=size,
        kept=losses.end - fixed - size,
        loss_chunk=losses.peak - losses.end,
        peaks={name: phase.peak for name, phase in ledger.phases.items()},
        operations=_operations(ledger.phases),
    )


def _operations(phases: dict[str, Phase]) -> list[tuple[int, int]]:
    return [operation for phase in phases.values() for operation in phase.operations]


def cache_bytes(skeleton: Skeleton, *, batch: int, length: int) -> int:
    """Bytes of the keys and values of base and shadow after ``length`` tokens of generation."""
    model = skeleton.model
    cache = DynamicCache(config=model.config)
    with skeleton.mode, Ledger(num_labels=1), torch.no_grad():
        ids = torch.zeros(batch, length, dtype=torch.int64)
        options: dict[str, Any] = {"attention_mask": None, "inputs_embeds": None}
        model._run_attached(model.network(), input_ids=ids, past_key_values=cache, use_cache=True, **options)
        return bytes_of(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))  # type: ignore[attr-defined]


def _fill_states(optimizer: torch.optim.Optimizer, trained: list[nn.Parameter]) -> None:
    _give_gradients(trained)
    optimizer.step()
    optimizer.zero_grad()


def _give_gradients(trained: list[nn.Parameter]) -> None:
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)


def _batch(shape: StepShape, *, is_classifier: bool) -> dict[str, Tensor]:
    ids = torch.zeros(shape.batch, shape.length, dtype=torch.int64)
    labels = ids[:, 0] if is_classifier else ids
    return {"input_ids": ids, "labels": labels.clone(), "attention_mask": torch.ones_like(ids)}


def _forward(model: Any, batch: dict[str, Tensor]) -> Any:
    """(last hidden states, s(0)) of a language model; of a classifier the loss itself, whose head is small."""
    if not isinstance(model, ShadowModelForCausalLM):
        return model(**batch).loss
    return model.training_states(batch["input_ids"], batch["attention_mask"])


def _loss(model: Any, states: tuple[Tensor, Tensor], batch: dict[str, Tensor], rows: int | None) -> Tensor:
    spec = dataclasses.replace(model.loss_spec(), chunk_rows=rows)
    return shared_head_losses(spec, head_of(model.base), *states, batch["labels"]).total
