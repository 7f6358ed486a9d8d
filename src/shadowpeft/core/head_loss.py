"""Next-token losses behind a head, chunk by chunk, so that no logits are kept and few are ever in memory.

The head is applied to a few hundred positions at a time. As the loss is the last thing in the graph, the gradient of
every chunk's logits is known right there, and is turned into the gradient of the hidden states (and of a trained
head's weights) before the next chunk overwrites it.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE = -100
# Logits in memory at a time: 128 MB in fp32 on a CPU, where products of 1,024 rows run a tenth faster than of 512; a GPU
# needs more rows to be busy.
_CHUNK_LOGITS = {"cpu": 2**25, "cuda": 2**27}
_MOST_ROWS = {"cpu": 1024, "cuda": 2048}


@dataclass(frozen=True, kw_only=True)
class LogitFinish:
    """What a model does to ``head(hidden)``: ``cap * tanh(x * multiply / divide / cap)``; 1 and None: nothing."""

    multiply: float = 1.0
    divide: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        if self.multiply != 1.0:
            logits = logits * self.multiply
        if self.divide != 1.0:
            logits = logits / self.divide
        return logits if self.cap is None else (logits / self.cap).tanh() * self.cap

    def backward_(self, grad: Tensor, finished: Tensor) -> Tensor:
        """Turns the gradient of finished logits into that of raw ones, in place."""
        if self.cap is not None:
            grad.mul_(1 - (finished / self.cap).square_())
        return grad if self.multiply == self.divide else grad.mul_(self.multiply / self.divide)


@dataclass(frozen=True, kw_only=True)
class LossSpec:
    """The losses to take.

    Attributes:
        finish: what the model does to its logits.
        label_smoothing: epsilon; the target distribution is (1 - epsilon) one-hot + epsilon / V.
        shadow_weight: lambda of Eq. 8.
        distillation_weight, temperature: of KL(attached || shadow), both softened by the temperature and the result
            multiplied by its square; the attached side gets no gradient from it.
        chunk_rows: rows of logits in memory at a time; None: by vocabulary and device.
    """

    finish: LogitFinish = LogitFinish()
    label_smoothing: float = 0.0
    shadow_weight: float = 0.0
    distillation_weight: float = 0.0
    temperature: float = 1.0
    chunk_rows: int | None = None

    def rows_at_a_time(self, vocabulary: int, device: torch.device) -> int:
        return self.chunk_rows or usual_rows(vocabulary, device.type)


def usual_rows(vocabulary: int, device_type: str) -> int:
    """Rows of logits that a device of this type has in memory at a time."""
    kind = "cpu" if device_type == "cpu" else "cuda"
    return max(min(_CHUNK_LOGITS[kind] // vocabulary, _MOST_ROWS[kind]), 32)


class HeadLosses(NamedTuple):
    """Scalars in fp32 or wider; only ``total`` carries a gradient. Parts are unweighted, None where not asked for."""

    total: Tensor
    main: Tensor
    shadow: Tensor | None
    distillation: Tensor | None


def head_losses(
    spec: LossSpec,
    *,
    hidden: Tensor,
    shadow: Tensor | None,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    count: Tensor | int | float,
) -> HeadLosses:
    """``main + lambda * shadow + omega * distillation``, each a sum over the targets divided by ``count``.

    Rows whose target is -100 never reach the head, except inside torch.compile, where shapes may not depend on data.

    Args:
        hidden: [N, d], in front of the head.
        shadow: [N, d] for the shadow's terms, or None.
        targets: [N], -100 where there is nothing to learn.
        weight, bias: of the head, [V, d] and [V]; frozen or trained.
    """
    if not torch.compiler.is_compiling():
        rows = (targets != IGNORE).nonzero().squeeze(1)
        if len(rows) < len(targets):
            hidden, targets = hidden.index_select(0, rows), targets.index_select(0, rows)
            shadow = None if shadow is None else shadow.index_select(0, rows)
    divisor = torch.as_tensor(count, dtype=_wide(weight), device=hidden.device)
    needs_grad = torch.is_grad_enabled()
    total, main, auxiliary, distillation = _HeadLosses.apply(
        spec, needs_grad, hidden, shadow, targets, weight, bias, divisor
    )
    return HeadLosses(
        total=total,
        main=main,
        shadow=auxiliary if shadow is not None else None,
        distillation=distillation if shadow is not None and spec.distillation_weight else None,
    )


class _HeadLosses(torch.autograd.Function):
    """Computes the gradients in the forward pass; keeps those of the hidden states, never logits."""

    @staticmethod
    def forward(
        ctx: Any,
        spec: LossSpec,
        needs_grad: bool,
        hidden: Tensor,
        shadow: Tensor | None,
        targets: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        count: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        _, _, for_hidden, for_shadow, _, for_weight, for_bias, _ = ctx.needs_input_grad
        wanted = _Wanted(
            hidden=needs_grad and for_hidden,
            shadow=needs_grad and for_shadow,
            weight=needs_grad and for_weight,
            bias=needs_grad and for_bias,
        )
        with torch.autocast(hidden.device.type, enabled=False):
            sums, grads = _chunks(spec, wanted, hidden, shadow, targets, weight, bias, count)
        ctx.save_for_backward(*grads)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, shadow, weight, bias)]
        sums = sums / count
        main, auxiliary, distillation = sums.unbind()
        total = main + spec.shadow_weight * auxiliary + spec.distillation_weight * distillation
        ctx.mark_non_differentiable(main, auxiliary, distillation)
        return total, main, auxiliary, distillation

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple:  # type: ignore[override]
        hidden, shadow, weight, bias = (
            None if g is None else (g * grad.to(g.dtype)).to(dtype)
            for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return None, None, hidden, shadow, None, weight, bias, None


class _Wanted(NamedTuple):
    hidden: bool
    shadow: bool
    weight: bool
    bias: bool


def _chunks(
    spec: LossSpec,
    wanted: _Wanted,
    hidden: Tensor,
    shadow: Tensor | None,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    count: Tensor,
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """(sums [3] of main, shadow and distillation losses; gradients of hidden, shadow, weight, bias, over ``count``)."""
    sums = torch.zeros(3, dtype=_wide(weight), device=hidden.device)
    chunk_rows = spec.rows_at_a_time(len(weight), hidden.device)
    head = _Head(spec, weight, bias, wanted, min(chunk_rows, max(len(targets), 1)))
    grad_hidden = _unscaled_gradient(hidden) if wanted.hidden else None
    grad_shadow = _unscaled_gradient(shadow) if wanted.shadow and shadow is not None else None
    distils = spec.distillation_weight > 0
    for start in range(0, len(targets), chunk_rows):
        part = slice(start, start + chunk_rows)
        labels = targets[part]
        teacher = None
        x = hidden[part].to(weight.dtype)
        logits = head.logits(x)
        if distils and shadow is not None:
            teacher = torch.log_softmax(logits / spec.temperature, -1)
        loss, grad = head.cross_entropy(logits, labels)
        sums[0] += loss
        head.push(grad, logits, x, 1 / count, None if grad_hidden is None else grad_hidden[part])
        if shadow is None:
            continue
        x = shadow[part].to(weight.dtype)
        logits = head.logits(x)
        student = None if teacher is None else torch.log_softmax(logits / spec.temperature, -1)
        loss, grad = head.cross_entropy(logits, labels)
        sums[1] += loss
        grad.mul_(spec.shadow_weight)
        if teacher is not None and student is not None:
            divergence, grad_student = _distillation(teacher, student, labels, spec.temperature)
            sums[2] += divergence
            grad.add_(grad_student, alpha=spec.distillation_weight)
        head.push(grad, logits, x, 1 / count, None if grad_shadow is None else grad_shadow[part])
    return sums, (grad_hidden, grad_shadow, head.grad_weight, head.grad_bias)


class _Head:
    """The head and the buffers that every chunk uses again."""

    def __init__(self, spec: LossSpec, weight: Tensor, bias: Tensor | None, wanted: _Wanted, num_rows: int) -> None:
        self.spec, self.weight, self.bias = spec, weight, bias
        self.wide = _wide(weight)
        self.raw = weight.new_empty(num_rows, weight.shape[0])
        self.probabilities = torch.empty(num_rows, weight.shape[0], dtype=self.wide, device=weight.device)
        self.grad_weight = torch.zeros_like(weight) if wanted.weight else None
        self.grad_bias = torch.zeros_like(bias) if wanted.bias and bias is not None else None

    def logits(self, x: Tensor) -> Tensor:
        """Finished logits of a chunk, [R, d] -> [R, V], fp32 or wider; overwritten by the next call."""
        raw = self.raw[: len(x)]
        if self.bias is None:
            torch.mm(x, self.weight.t(), out=raw)
        else:
            torch.addmm(self.bias, x, self.weight.t(), out=raw)
        return self.spec.finish(raw).to(self.wide)

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(sum over the labelled rows, its gradient with respect to raw logits; the latter is overwritten)."""
        smoothing, probabilities = self.spec.label_smoothing, self.probabilities[: len(labels)]
        labelled = labels != IGNORE
        index = labels.masked_fill(~labelled, 0).unsqueeze(1)  # any other label below 0 is torch's error
        chosen = logits.gather(1, index)
        torch.softmax(logits, -1, out=probabilities)
        # log-sum-exp from the largest entry, whose probability is at least 1 / V: no second exponential.
        normaliser = logits.amax(-1, keepdim=True) - probabilities.amax(-1, keepdim=True).log()
        loss = normaliser - (1 - smoothing) * chosen
        if smoothing:
            loss = loss - smoothing * logits.mean(-1, keepdim=True)
        loss = (loss.squeeze(1) * labelled).sum()
        probabilities.scatter_add_(1, index, torch.full_like(chosen, smoothing - 1))
        if smoothing:
            probabilities.sub_(smoothing / logits.shape[-1])
        return loss, _only(probabilities, labelled)

    def push(self, grad: Tensor, finished: Tensor, x: Tensor, scale: Tensor, grad_x: Tensor | None) -> None:
        """Carries the gradient of a chunk's finished logits on to the hidden states and to a trained head."""
        if grad_x is None and self.grad_weight is None and self.grad_bias is None:
            return
        grad = self.spec.finish.backward_(grad, finished).to(self.weight.dtype)
        if grad_x is not None:
            product = grad @ self.weight
            product = product.float() if product.dtype == torch.float16 else product
            grad_x.copy_(product.mul_(scale.to(product.dtype)))
        if self.grad_weight is not None:
            self.grad_weight.addmm_(grad.t(), x * scale.to(x.dtype))
        if self.grad_bias is not None:
            self.grad_bias.add_((grad.sum(0) * scale).to(self.grad_bias.dtype))


def _unscaled_gradient(x: Tensor) -> Tensor:
    """Zeros for the gradient of ``x`` before the factor of a loss scaler reaches it.

    In fp32 for float16, whose smallest number is 6e-8: over the labels of a step, most entries would be zero in it.
    """
    return torch.zeros_like(x, dtype=torch.float32 if x.dtype == torch.float16 else x.dtype)


def _wide(weight: Tensor) -> torch.dtype:
    """In which losses are taken."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _distillation(teacher: Tensor, student: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(sum over labelled rows of T^2 KL(teacher || student), its gradient with respect to the student's logits)."""
    labelled = labels != IGNORE
    target = teacher.exp()
    divergence = (target * (teacher - student)).sum(-1)
    grad = student.exp_().sub_(target).mul_(temperature)
    return (divergence * labelled).sum() * temperature**2, _only(grad, labelled)


def _only(grad: Tensor, labelled: Tensor) -> Tensor:
    """Zero rows where there is no label; outside torch.compile there are none."""
    return grad.mul_(labelled.unsqueeze(1)) if torch.compiler.is_compiling() else grad
