"""The step as one node of the autograd graph: what it keeps, and how it gets everything else back."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shadowpeft.core.kernels import reference
from shadowpeft.core.kernels.spec import Branch, StepSpec, StepWeights

# In these, the norm in front of a block keeps the block's input as it is; narrower ones it widens to fp32 first.
_SHARED_WITH_BLOCK = (torch.float32, torch.float64)


class _Step(torch.autograd.Function):
    """(h, s) -> (h', s'), or -> h' where there is no update.

    Keeps one [N, d] tensor of each path and the [N, r] bottleneck, and of a branch what was added. For fp32 that tensor of
    the base's path is h', which the norm of a following block keeps anyway, so that it costs nothing; h is h' minus the
    correction. For 16-bit states, which no norm keeps as they are, it is h itself.
    """

    @staticmethod
    def forward(
        ctx: Any, spec: StepSpec, backend: str, h: Tensor, s: Tensor, added: Tensor | None, *weights: Tensor | None
    ) -> Any:
        w = StepWeights(*weights[1:])  # type: ignore[arg-type]
        width = h.shape[-1]
        with torch.autocast(h.device.type, enabled=False):
            branch = _branch(added, weights[0])
            out = _implementation(backend).forward(spec, h.reshape(-1, width), s.reshape(-1, width), w, **branch)
        h_out = out.h.view(h.shape)
        ctx.spec, ctx.backend, ctx.rng_state = spec, backend, out.rng_state
        s_out = None if out.s is None else out.s.view(s.shape)
        ctx.keeps_output = h.dtype in _SHARED_WITH_BLOCK
        # To take the correction from h' again; the new state is kept by the following step anyway.
        has_state = ctx.keeps_output and w.diagonal is not None
        has_scale = has_state or (ctx.keeps_output and spec.bottleneck_activation is not None)
        injected = (s if s_out is None else s_out) if has_state else None
        # The addition first: of a sum, a lean graph can do without what follows from it.
        kept = (added, h_out if ctx.keeps_output else h, s, out.bottleneck, injected, out.scale if has_scale else None)
        ctx.present = [tensor is not None for tensor in (*kept, *weights)]
        ctx.save_for_backward(*(tensor for tensor in (*kept, *weights) if tensor is not None))
        ctx.set_materialize_grads(False)
        return h_out if s_out is None else (h_out, s_out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:  # type: ignore[override]
        supply = iter(ctx.saved_tensors)
        saved: list[Any] = [next(supply) if there else None for there in ctx.present]
        added, kept, s, bottleneck, injected, scale, W_branch, *weights = saved
        w = StepWeights(*weights)
        shape, width = kept.shape, kept.shape[-1]
        injected = None if injected is None else injected.reshape(-1, width)
        kept, s = kept.reshape(-1, width), s.reshape(-1, width)
        grad_h = torch.zeros_like(kept) if grads[0] is None else grads[0].reshape(-1, width)
        grad_s = grads[1].reshape(-1, width) if len(grads) > 1 and grads[1] is not None else None
        needs_grad_h = ctx.needs_input_grad[2]
        with torch.autocast(kept.device.type, enabled=False):
            h = kept
            if ctx.keeps_output:
                h = reference.without_correction(ctx.spec, kept, injected, bottleneck, scale, w)
            found = _implementation(ctx.backend).backward(
                ctx.spec,
                grad_h=grad_h,
                grad_s=grad_s,
                h=h,
                s=s,
                bottleneck=bottleneck,
                rng_state=ctx.rng_state,
                w=w,
                needs_grad_h=needs_grad_h,
                **_branch(added, W_branch),
            )
        grad_into_h = None if found.h is None else found.h.view(shape)
        of_added, of_W_branch = (None, None) if found.branch is None else found.branch
        of_added = None if of_added is None else of_added.view(shape)
        return None, None, grad_into_h, found.s.view(shape), of_added, of_W_branch, *found.weights


def _branch(added: Tensor | None, weight: Tensor | None) -> dict[str, Branch]:
    """The keyword of an implementation that can read one, where there is one."""
    if added is None or weight is None:
        return {}
    return {"branch": Branch(added.reshape(-1, added.shape[-1]), weight)}


def _implementation(backend: str) -> Any:
    if backend == "triton":
        from shadowpeft.core.kernels import triton_step  # only where Triton is installed

        return triton_step
    return reference


def fused_step(
    backend: str, spec: StepSpec, h: Tensor, s: Tensor, w: StepWeights, branch: Branch | None = None
) -> tuple[Tensor, Tensor]:
    """(h', s') as one operation; gradients are those of the equations.

    Args:
        backend: ``recompute`` or ``triton``, as :func:`step_backend` chose it.
        h, s: [B, T, d].
        branch: for a correction that reads the last addition to the stream; ``recompute`` alone can.
    """
    added, weight = (None, None) if branch is None else branch
    out = _Step.apply(spec, backend, h, s, added, weight, *w)
    return out if isinstance(out, tuple) else (out, s)
