"""One step between two blocks and its derivative, in plain torch operations, for every variant and device.

All tensors are matrices here: ``h``, ``s`` [N, d] with N = B * T tokens. The derivative recomputes everything
from one [N, d] tensor of each path and the [N, r] bottleneck.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from shadowpeft.core.kernels.masks import Masks
from shadowpeft.core.kernels.spec import Branch, StepSpec, StepWeights
from shadowpeft.core.step import ACTIVATIONS, SMALLEST_BRANCH, discrepancy, inject, rms, unit, unit_of_branch, update


class StepOutput(NamedTuple):
    """``h`` and ``s`` behind the step, the dropped bottleneck [N, r], and the dropout state (None without dropout).

    ``s`` is None where the step has no update; ``scale`` [N, 1] is the RMS of ``h``, None where s is not scaled.
    """

    h: Tensor
    s: Tensor | None
    bottleneck: Tensor
    rng_state: Tensor | None
    scale: Tensor | None = None


class StepGradients(NamedTuple):
    """``h`` [N, d] or None if it was not asked for, ``s`` [N, d], one entry for each weight, and those of a branch."""

    h: Tensor | None
    s: Tensor
    weights: StepWeights
    branch: Branch | None = None


class _Updated(NamedTuple):
    """Everything that Eq. 5-7 produce on the way from (h, s) to the new state."""

    normed: Tensor
    statistics: tuple[Tensor, Tensor] | None
    pre_T: Tensor
    pre_G: Tensor
    act_T: Tensor
    act_G: Tensor
    mask: Tensor | None
    t: Tensor
    g: Tensor
    state: Tensor


def forward(spec: StepSpec, h: Tensor, s: Tensor, w: StepWeights, branch: Branch | None = None) -> StepOutput:
    """Eq. 2-7, 13 and 14 on [N, d] tensors."""
    masks = Masks(h.device) if spec.has_dropout else None
    state = None if w.W_T1 is None else _updated(spec, h, s, w, masks).state.to(s.dtype)
    scale = rms(h) if spec.scales_state else None
    met = s if state is None else state
    source, mask = _source(spec, h, met, scale, w, masks)
    bottleneck = source @ w.W_down
    if branch is not None:
        read, _, _ = _read_branch(spec, branch, masks)
        bottleneck = bottleneck.addmm_(read, branch.weight)
    if mask is not None and not spec.drop_input:
        bottleneck = bottleneck * mask
    return StepOutput(
        h=inject(h, _lifted(spec, bottleneck, met, scale, w), spec.alpha),
        s=state,
        bottleneck=bottleneck,
        rng_state=None if masks is None else masks.state,
        scale=scale,
    )


def without_correction(
    spec: StepSpec, h_out: Tensor, injected: Tensor | None, bottleneck: Tensor, scale: Tensor | None, w: StepWeights
) -> Tensor:
    """``h`` from the corrected ``h_out``: the same correction, subtracted. Exact but for the rounding of ``h_out``.

    Args:
        injected: the state that met ``h``, [N, d]; None where there is no diagonal.
        bottleneck, scale: what came out of :func:`forward`.
    """
    return inject(h_out, _lifted(spec, bottleneck, injected, scale, w), -spec.alpha)


def _scaled(s: Tensor, scale: Tensor | None) -> Tensor:
    return s if scale is None else s * scale


def _lifted(spec: StepSpec, bottleneck: Tensor, s: Tensor | None, scale: Tensor | None, w: StepWeights) -> Tensor:
    """Eq. 3 from its bottleneck on, and the diagonal's part, [N, d]; ``s`` is read only where there is one."""
    if spec.bottleneck_activation is not None:
        assert scale is not None
        lifted = _raised(spec, ACTIVATIONS[spec.bottleneck_activation](bottleneck), s, w)
        return lifted.mul_(scale.to(lifted.dtype))
    return _raised(spec, bottleneck, None if s is None or w.diagonal is None else _scaled(s, scale), w)


def _raised(spec: StepSpec, hidden: Tensor, s: Tensor | None, w: StepWeights) -> Tensor:
    """``hidden W_up + ratio v * s``, [N, d], without the second part where there is no v."""
    lifted = hidden @ w.W_up
    if w.diagonal is None:
        return lifted
    assert s is not None
    return lifted.addcmul_(w.diagonal, s.to(lifted.dtype), value=spec.diagonal_ratio)


def backward(
    spec: StepSpec,
    *,
    grad_h: Tensor,
    grad_s: Tensor | None,
    h: Tensor,
    s: Tensor,
    bottleneck: Tensor,
    rng_state: Tensor | None,
    w: StepWeights,
    needs_grad_h: bool,
    branch: Branch | None = None,
) -> StepGradients:
    """The gradients of everything that went in.

    Args:
        grad_h, grad_s: gradients of the two outputs, [N, d]; ``grad_s`` is None where nothing reads the new state.
        h, s: what went in; ``bottleneck`` and ``rng_state``: what came out of :func:`forward`.
        needs_grad_h: False saves the work where nothing in front of ``h`` is trained.
    """
    dtype = w.W_down.dtype
    masks = None if rng_state is None else Masks(h.device, rng_state)
    updated = None if w.W_T1 is None else _updated(spec, h, s, w, masks)
    state = s if updated is None else updated.state.to(s.dtype)
    scale = rms(h) if spec.scales_state else None
    through = _backward_linear if spec.bottleneck_activation is None else _backward_units
    grads, grad_into_h, grad_state, grad_bottleneck = through(
        spec, grad_h.to(dtype), h, state, scale, masks, bottleneck, w, needs_grad_h
    )
    grad_branch = None
    if branch is not None:  # behind the rest, for its mask is drawn behind the rest's
        grad_branch = _backward_branch(spec, grad_bottleneck, branch, masks)
    if grad_s is not None:
        grad_state = grad_state.add_(grad_s.to(dtype))
    if updated is not None:
        grad_state, grad_into_h, grads = _backward_update(
            spec, updated, h, s.to(dtype), grad_state, grad_into_h, grads, w
        )
    return StepGradients(
        h=None if grad_into_h is None else grad_into_h.to(h.dtype),
        s=grad_state.to(s.dtype),
        weights=grads,
        branch=grad_branch,
    )


def _backward_linear(
    spec: StepSpec,
    grad: Tensor,
    h: Tensor,
    state: Tensor,
    scale: Tensor | None,
    masks: Masks | None,
    bottleneck: Tensor,
    w: StepWeights,
    needs_grad_h: bool,
) -> tuple[StepWeights, Tensor | None, Tensor, Tensor]:
    """Through Eq. 4, 3 and 2: (gradients of the injection's weights, of h, of the state that met it, of the bottleneck)."""
    dtype = grad.dtype
    grad_bottleneck = (grad @ w.W_up.t()).mul_(spec.alpha)
    grad_W_up = (bottleneck.t() @ grad).mul_(spec.alpha)
    grad_W_down, grad_source = _backward_down(spec, grad_bottleneck, *_source(spec, h, state, scale, w, masks), w)

    grads = StepWeights(W_down=grad_W_down, W_up=grad_W_up)
    grad_into_h = None
    if needs_grad_h:
        grad_into_h = grad if spec.from_state else grad + grad_source
    grad_state = grad_source if spec.from_state else grad_source.neg_()
    if w.diagonal is not None:
        weight = spec.alpha * spec.diagonal_ratio
        grads = grads._replace(diagonal=(grad * _scaled(state, scale)).sum(0).mul_(weight))
        grad_state = grad_state.addcmul_(grad, w.diagonal, value=weight)
    if scale is not None:
        if grad_into_h is not None:
            # The RMS has no slope at h = 0; as torch has it, that counts as 0.
            smallest = torch.finfo(dtype).tiny
            along = (grad_state * state).sum(-1, keepdim=True) / (scale.to(dtype) * h.shape[-1]).clamp_min(smallest)
            grad_into_h = torch.addcmul(grad_into_h, along.to(dtype), h.to(dtype))
        grad_state = grad_state.mul_(scale)
    return grads, grad_into_h, grad_state, grad_bottleneck


def _backward_units(
    spec: StepSpec,
    grad: Tensor,
    h: Tensor,
    state: Tensor,
    scale: Tensor | None,
    masks: Masks | None,
    bottleneck: Tensor,
    w: StepWeights,
    needs_grad_h: bool,
) -> tuple[StepWeights, Tensor | None, Tensor, Tensor]:
    """As :func:`_backward_linear`, through ``h + alpha rms(h) (act(bottleneck) W_up + ratio v * s)``."""
    assert spec.bottleneck_activation is not None and scale is not None
    grad_units = grad * (spec.alpha * scale.to(grad.dtype))
    hidden = ACTIVATIONS[spec.bottleneck_activation](bottleneck)
    grad_W_up = hidden.t() @ grad_units
    grad_bottleneck = (grad_units @ w.W_up.t()).mul_(_slope(spec.bottleneck_activation, bottleneck))
    grad_W_down, grad_source = _backward_down(spec, grad_bottleneck, *_source(spec, h, state, scale, w, masks), w)
    scale, state = scale.to(grad.dtype), state.to(grad.dtype)

    grads = StepWeights(W_down=grad_W_down, W_up=grad_W_up)
    grad_into_h = None
    if needs_grad_h:
        along = (grad * _raised(spec, hidden, state, w)).sum(-1, keepdim=True).mul_(spec.alpha)
        direction, grad_into_h = unit(h.to(grad.dtype), scale), grad
        if not spec.from_state:
            safe = scale.clamp_min(torch.finfo(scale.dtype).tiny)
            along -= (grad_source * direction).sum(-1, keepdim=True) / safe
            grad_into_h = torch.addcdiv(grad, grad_source, safe)
        # The RMS has no slope at h = 0; as torch has it, that counts as 0.
        grad_into_h = torch.addcmul(grad_into_h, along / h.shape[-1], direction)
    if w.diagonal is not None:
        grads = grads._replace(diagonal=(grad_units * state).sum(0).mul_(spec.diagonal_ratio))
    grad_state = grad_source if spec.from_state else grad_source.neg_()
    if w.diagonal is not None:
        grad_state = grad_state.addcmul_(grad_units, w.diagonal, value=spec.diagonal_ratio)
    return grads, grad_into_h, grad_state, grad_bottleneck


def _backward_down(
    spec: StepSpec, grad_bottleneck: Tensor, source: Tensor, mask: Tensor | None, w: StepWeights
) -> tuple[Tensor, Tensor]:
    """Through W_down and the dropout on either side of it: (its gradient, that of what it read); changes its argument."""
    if mask is not None and not spec.drop_input:
        grad_bottleneck.mul_(mask)
    grad_W_down = source.t() @ grad_bottleneck
    grad_source = grad_bottleneck @ w.W_down.t()
    if mask is not None and spec.drop_input:
        grad_source.mul_(mask)
    return grad_W_down, grad_source


def _read_branch(spec: StepSpec, branch: Branch, masks: Masks | None) -> tuple[Tensor, Tensor | None, Tensor]:
    """(What W_branch reads, [N, d], with its mask applied; that mask; the RMS that it was divided by, [N, 1], maybe wider)."""
    read, scale = unit_of_branch(branch.added)
    read = read.to(branch.weight.dtype)
    if masks is None or spec.inject_dropout == 0 or not spec.drop_input:
        return read, None, scale
    mask = masks.draw(read.shape, spec.inject_dropout, read.dtype)
    return read * mask, mask, scale


def _backward_branch(spec: StepSpec, grad_bottleneck: Tensor, branch: Branch, masks: Masks | None) -> Branch:
    """Through ``b / rms(b) W_branch``: the gradients of b and of W_branch."""
    read, mask, scale = _read_branch(spec, branch, masks)
    grad_weight = read.t() @ grad_bottleneck
    grad = grad_bottleneck @ branch.weight.t()
    if mask is not None:
        grad, read = grad.mul_(mask), unit_of_branch(branch.added)[0]
    # An addition smaller than that is divided by a constant.
    along = (grad * read).mean(-1, keepdim=True) * (scale > SMALLEST_BRANCH)
    return Branch(((grad - read * along) / scale).to(branch.added.dtype), grad_weight)


def _source(
    spec: StepSpec, h: Tensor, s: Tensor, scale: Tensor | None, w: StepWeights, masks: Masks | None
) -> tuple[Tensor, Tensor | None]:
    """What W_down reads, [N, d], and the mask of the injection: applied already where it falls on the input."""
    dtype = w.W_down.dtype
    if spec.bottleneck_activation is None:
        s = _scaled(s, scale)
        source = (s if spec.from_state else discrepancy(h, s)).to(dtype)
    else:
        assert scale is not None
        source = s.to(dtype) if spec.from_state else unit(h.to(dtype), scale.to(dtype)) - s.to(dtype)
    if masks is None or spec.inject_dropout == 0:
        return source, None
    shape = source.shape if spec.drop_input else torch.Size((source.shape[0], w.W_down.shape[1]))
    mask = masks.draw(shape, spec.inject_dropout, dtype)
    return (source * mask if spec.drop_input else source), mask


def _updated(spec: StepSpec, h: Tensor, s: Tensor, w: StepWeights, masks: Masks | None) -> _Updated:
    """Eq. 5-7."""
    assert w.W_T1 is not None and w.W_T2 is not None and w.W_G1 is not None and w.W_G2 is not None
    statistics = None
    if w.norm_weight is None:
        normed = h.to(w.W_T1.dtype)
    else:
        wide = h.to(w.norm_weight.dtype)
        normed, *moments = torch.native_layer_norm(wide, wide.shape[-1:], w.norm_weight, w.norm_bias, spec.norm_eps)
        normed, statistics = normed.to(w.W_T1.dtype), (moments[0], moments[1])
    pre_T, pre_G = normed @ w.W_T1, normed @ w.W_G1
    if w.b_T1 is not None and w.b_G1 is not None:
        pre_T, pre_G = pre_T.add_(w.b_T1), pre_G.add_(w.b_G1)
    act = ACTIVATIONS[spec.activation]
    act_T, act_G = act(pre_T), act(pre_G)
    mask = None
    if masks is not None and spec.transform_dropout > 0:
        mask = masks.draw(act_T.shape, spec.transform_dropout, act_T.dtype)
        act_T = act_T * mask
    t, g = act_T @ w.W_T2, act_G @ w.W_G2
    if w.b_T2 is not None and w.b_G2 is not None:
        t, g = t.add_(w.b_T2), g.add_(w.b_G2)
    g = g.sigmoid_()
    return _Updated(normed, statistics, pre_T, pre_G, act_T, act_G, mask, t, g, update(s.to(t.dtype), g, t))


def _backward_update(
    spec: StepSpec,
    u: _Updated,
    h: Tensor,
    s: Tensor,
    grad_state: Tensor,
    grad_into_h: Tensor | None,
    grads: StepWeights,
    w: StepWeights,
) -> tuple[Tensor, Tensor | None, StepWeights]:
    """Through Eq. 7, then 6 and 5: (gradient of the old state, of h, of all weights)."""
    assert w.W_T1 is not None and w.W_T2 is not None and w.W_G1 is not None and w.W_G2 is not None
    grad_t = grad_state * u.g
    grad_g = (u.t - s).mul_(grad_t).mul_(1 - u.g)  # through the sigmoid as well
    grad_old = grad_state.sub_(grad_t)
    grads = grads._replace(W_T2=u.act_T.t() @ grad_t, W_G2=u.act_G.t() @ grad_g)
    grad_T = grad_t @ w.W_T2.t()
    if u.mask is not None:
        grad_T.mul_(u.mask)
    grad_pre = torch.cat(
        [
            grad_T.mul_(_slope(spec.activation, u.pre_T)),
            (grad_g @ w.W_G2.t()).mul_(_slope(spec.activation, u.pre_G)),
        ],
        1,
    )
    grad_W_T1, grad_W_G1 = (u.normed.t() @ grad_pre).chunk(2, 1)
    grads = grads._replace(W_T1=grad_W_T1, W_G1=grad_W_G1)
    if w.b_T1 is not None:
        grad_b_T1, grad_b_G1 = grad_pre.sum(0).chunk(2)
        grads = grads._replace(b_T1=grad_b_T1, b_G1=grad_b_G1, b_T2=grad_t.sum(0), b_G2=grad_g.sum(0))
    if w.norm_weight is None and grad_into_h is None:
        return grad_old, None, grads
    grad_normed = grad_pre @ torch.cat([w.W_T1, w.W_G1], 1).t()
    if w.norm_weight is not None:
        assert u.statistics is not None
        wide = h.to(w.norm_weight.dtype)
        grad_normed, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
            grad_normed.to(wide.dtype),
            wide,
            wide.shape[-1:],
            *u.statistics,
            w.norm_weight,
            w.norm_bias,
            [grad_into_h is not None, True, True],
        )
        grads = grads._replace(norm_weight=grad_weight, norm_bias=grad_bias)
    if grad_into_h is None:
        return grad_old, None, grads
    return grad_old, grad_into_h + grad_normed.to(grad_into_h.dtype), grads


def _slope(activation: str, x: Tensor) -> Tensor:
    """The derivative of SiLU, (exact) GELU or nothing at ``x``."""
    if activation == "none":
        return torch.ones_like(x)
    if activation == "silu":
        gate = torch.sigmoid(x)
        return gate * (1 + x * (1 - gate))
    density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * density
