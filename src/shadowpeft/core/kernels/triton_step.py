"""The step on an NVIDIA GPU: one Triton kernel forward, two backward.

A program of the forward kernel, and of the first backward one, owns a few tokens and walks over the width: all that
must be known of a token before the next walk is narrow (two moments, r and h_g wide products). The second backward
kernel owns a few columns and walks over the tokens: given the narrow quantities, all else is local to a column, and
the gradients of the weights are summed in registers in a fixed order. Arithmetic is in fp32; products of 16-bit
states use TF32, whose mantissa is longer than theirs.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton  # type: ignore[import-not-found]
import triton.language as tl  # type: ignore[import-not-found]
from torch import Tensor

from shadowpeft.core.kernels.reference import StepGradients, StepOutput
from shadowpeft.core.kernels.spec import StepSpec, StepWeights


class Tiles(NamedTuple):
    """What one program holds at a time: ``tokens`` x ``columns``, on ``warps`` warps."""

    tokens: int
    columns: int
    warps: int = 4


# Fastest of those tried at 4096 tokens x 4096 (H200, bf16): see LOG.md, 2026-11-26. Fp32 and other GPUs have room for less.
FORWARD = {"update": Tiles(32, 64), "no update": Tiles(32, 256)}
BACKWARD_TOKENS = {"update": Tiles(32, 64), "no update": Tiles(16, 256)}
BACKWARD_WEIGHTS = {"update": Tiles(32, 128), "no update": Tiles(32, 128)}
# With a wider r or h_g than this a program holds more, so that it takes fewer columns.
_WIDEST_FOR_LARGE_TILES = 32
_NARROW = Tiles(16, 64)
_HOPPER_SHARED_MEMORY = 227 * 1024
# Parts of the token axis that the second backward kernel walks over at the same time.
_MOST_SPLITS = 16


@triton.jit
def _tile(pointer, rows, columns, stride, num_rows, num_columns):
    """[rows, columns] of a matrix in fp32, zero outside of it."""
    inside = (rows[:, None] < num_rows) & (columns[None, :] < num_columns)
    offsets = rows[:, None].to(tl.int64) * stride + columns[None, :]
    return tl.load(pointer + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _put(pointer, values, rows, columns, stride, num_rows, num_columns):
    inside = (rows[:, None] < num_rows) & (columns[None, :] < num_columns)
    offsets = rows[:, None].to(tl.int64) * stride + columns[None, :]
    tl.store(pointer + offsets, values.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _vector(pointer, columns, num_columns):
    return tl.load(pointer + columns, mask=columns < num_columns, other=0.0).to(tl.float32)


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _act(x, GELU: tl.constexpr):
    if GELU:  # noqa: SIM108 (Triton chooses at compile time between statements, not within one)
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        y = x * tl.sigmoid(x)
    return y


@triton.jit
def _slope(x, GELU: tl.constexpr):
    if GELU:
        y = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    else:
        gate = tl.sigmoid(x)
        y = gate * (1.0 + x * (1.0 - gate))
    return y


@triton.jit
def _mask(seed, rows, narrow, WIDTH: tl.constexpr, dropout):
    """Entries 0 and 1 / (1 - dropout), a function of seed and position alone."""
    kept = tl.rand(seed, rows[:, None] * WIDTH + narrow[None, :]) >= dropout
    return tl.where(kept, 1.0 / (1.0 - dropout), 0.0)


@triton.jit
def _normed(values, columns, mean, rstd, norm_weight, norm_bias, D, HAS_NORM: tl.constexpr):
    if HAS_NORM:
        weight, bias = _vector(norm_weight, columns, D), _vector(norm_bias, columns, D)
        values = (values - mean[:, None]) * rstd[:, None] * weight[None, :] + bias[None, :]
    return values


@triton.jit
def _survey(h, rows, narrow, stride, norm_weight, norm_bias, W_T1, W_G1, b_T1, b_G1, N, D, HG, eps,
            SCALES: tl.constexpr, HAS_UPDATE: tl.constexpr, HAS_NORM: tl.constexpr, HAS_BIAS: tl.constexpr,
            PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, HP: tl.constexpr):  # fmt: skip
    """All that must be known of a token before the new state, in one walk over the width.

    (mean, 1 / standard deviation, root mean square, what goes into the activations of transform and gate [BLOCK_T, HP]).
    The norm is applied behind the products, W^T (w (h - m) / sd + b) = (W^T w (h - c) - (m - c) W^T w) / sd + W^T b,
    around c, the mean of the first columns, so that a large mean cancels nothing.
    """
    centre = tl.zeros([BLOCK_T], tl.float32)
    if HAS_NORM:
        centre += tl.sum(_tile(h, rows, tl.arange(0, BLOCK_D), stride, N, D), 1) / tl.minimum(D, BLOCK_D)
    total = tl.zeros([BLOCK_T], tl.float32)
    spread = tl.zeros([BLOCK_T], tl.float32)
    squares = tl.zeros([BLOCK_T], tl.float32)
    pre_T = tl.zeros([BLOCK_T, HP], tl.float32)
    pre_G = tl.zeros([BLOCK_T, HP], tl.float32)
    level_T = tl.zeros([HP], tl.float32)
    level_G = tl.zeros([HP], tl.float32)
    bias_T = tl.zeros([HP], tl.float32)
    bias_G = tl.zeros([HP], tl.float32)
    for start in range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        x = _tile(h, rows, columns, stride, N, D)
        if SCALES:
            squares += tl.sum(x * x, 1)
        if HAS_UPDATE:
            into_T, into_G = _tile(W_T1, columns, narrow, HG, D, HG), _tile(W_G1, columns, narrow, HG, D, HG)
            if HAS_NORM:
                x = tl.where(columns[None, :] < D, x - centre[:, None], 0.0)
                total += tl.sum(x, 1)
                spread += tl.sum(x * x, 1)
                weight, bias = _vector(norm_weight, columns, D), _vector(norm_bias, columns, D)
                bias_T += tl.sum(bias[:, None] * into_T, 0)
                bias_G += tl.sum(bias[:, None] * into_G, 0)
                into_T *= weight[:, None]
                into_G *= weight[:, None]
                level_T += tl.sum(into_T, 0)
                level_G += tl.sum(into_G, 0)
            pre_T += _dot(x, into_T, PRECISION)
            pre_G += _dot(x, into_G, PRECISION)
    shift = total / D
    rstd = 1.0 / tl.sqrt(tl.maximum(spread / D - shift * shift, 0.0) + eps)
    if HAS_NORM:
        pre_T = (pre_T - shift[:, None] * level_T[None, :]) * rstd[:, None] + bias_T[None, :]
        pre_G = (pre_G - shift[:, None] * level_G[None, :]) * rstd[:, None] + bias_G[None, :]
    if HAS_BIAS:
        pre_T += _vector(b_T1, narrow, HG)[None, :]
        pre_G += _vector(b_G1, narrow, HG)[None, :]
    return centre + shift, rstd, tl.sqrt(squares / D), pre_T, pre_G


@triton.jit
def _new_state(s, old, act_T, act_G, columns, narrow, W_T2, W_G2, b_T2, b_G2, D, HG,
               HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """(t, g, the new state as it is stored) for some columns (Eq. 5-7)."""
    t = _dot(act_T, _tile(W_T2, narrow, columns, D, HG, D), PRECISION)
    g = _dot(act_G, _tile(W_G2, narrow, columns, D, HG, D), PRECISION)
    if HAS_BIAS:
        t += _vector(b_T2, columns, D)[None, :]
        g += _vector(b_G2, columns, D)[None, :]
    g = tl.sigmoid(g)
    return t, g, (old + g * (t - old)).to(s.dtype.element_ty).to(tl.float32)


@triton.jit
def _forward(h, s, h_out, s_out, bottleneck, scales, W_down, W_up, W_T1, W_T2, W_G1, W_G2, b_T1, b_T2, b_G1, b_G2,
             norm_weight, norm_bias, diagonal, seed, N, D, R, HG, h_stride, s_stride, alpha, eps,
             inject_dropout, transform_dropout, SCALES: tl.constexpr, HAS_DIAGONAL: tl.constexpr,
             HAS_UPDATE: tl.constexpr, HAS_NORM: tl.constexpr, HAS_BIAS: tl.constexpr, GELU: tl.constexpr,
             FROM_STATE: tl.constexpr, DROPS_INJECT: tl.constexpr, DROPS_TRANSFORM: tl.constexpr,
             PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, RP: tl.constexpr,
             HP: tl.constexpr):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    ranks, narrow = tl.arange(0, RP), tl.arange(0, HP)
    act_T = tl.zeros([BLOCK_T, HP], tl.float32)
    act_G = tl.zeros([BLOCK_T, HP], tl.float32)
    scale = tl.full([BLOCK_T], 1.0, tl.float32)
    if HAS_UPDATE or SCALES:
        _mean, _rstd, rms, pre_T, pre_G = _survey(h, rows, narrow, h_stride, norm_weight, norm_bias, W_T1, W_G1, b_T1,
                                                  b_G1, N, D, HG, eps, SCALES, HAS_UPDATE, HAS_NORM, HAS_BIAS,
                                                  PRECISION, BLOCK_T, BLOCK_D, HP)  # fmt: skip
        if HAS_UPDATE:
            act_T, act_G = _act(pre_T, GELU), _act(pre_G, GELU)
            if DROPS_TRANSFORM:
                act_T *= _mask(seed + 1, rows, narrow, HP, transform_dropout)
        if SCALES:
            scale = rms
            tl.store(scales + rows, scale, mask=rows < N)
    z = tl.zeros([BLOCK_T, RP], tl.float32)
    for start in range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        state = _tile(s, rows, columns, s_stride, N, D)
        if HAS_UPDATE:
            _t, _g, state = _new_state(s, state, act_T, act_G, columns, narrow, W_T2, W_G2, b_T2, b_G2, D, HG,
                                     HAS_BIAS, PRECISION)  # fmt: skip
            _put(s_out, state, rows, columns, D, N, D)
        source = state * scale[:, None]
        if not FROM_STATE:
            source = _tile(h, rows, columns, h_stride, N, D) - source
        z += _dot(source, _tile(W_down, columns, ranks, R, D, R), PRECISION)
    if DROPS_INJECT:
        z *= _mask(seed, rows, ranks, RP, inject_dropout)
    _put(bottleneck, z, rows, ranks, R, N, R)
    for start in range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        lifted = _dot(z, _tile(W_up, ranks, columns, D, R, D), PRECISION)
        if HAS_DIAGONAL:
            state = _tile(s, rows, columns, s_stride, N, D)
            if HAS_UPDATE:  # once more: what the first walk stored need not be visible to other threads yet
                _t, _g, state = _new_state(s, state, act_T, act_G, columns, narrow, W_T2, W_G2, b_T2, b_G2, D, HG,
                                         HAS_BIAS, PRECISION)  # fmt: skip
            lifted += _vector(diagonal, columns, D)[None, :] * state * scale[:, None]
        _put(h_out, _tile(h, rows, columns, h_stride, N, D) + alpha * lifted, rows, columns, D, N, D)


@triton.jit
def _grad_scaled(dz, grad_h, rows, columns, ranks, W_down, diagonal, alpha, N, D, R,
                 FROM_STATE: tl.constexpr, HAS_DIAGONAL: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """The gradient of the state as it met h, for some columns."""
    grad = _dot(dz, tl.trans(_tile(W_down, columns, ranks, R, D, R)), PRECISION)
    if not FROM_STATE:
        grad = -grad
    if HAS_DIAGONAL:
        grad += alpha * _tile(grad_h, rows, columns, D, N, D) * _vector(diagonal, columns, D)[None, :]
    return grad


@triton.jit
def _backward_tokens(h, s, grad_h, grad_s, grad_h_in, grad_s_in, grad_z, kept_T, kept_G, grad_T, grad_G, means, rstds,
                     scales, W_down, W_up, W_T1, W_T2, W_G1, W_G2, b_T1, b_T2, b_G1, b_G2, norm_weight, norm_bias,
                     diagonal, seed, N, D, R, HG, h_stride, s_stride, alpha, eps, inject_dropout,
                     transform_dropout, SCALES: tl.constexpr, HAS_DIAGONAL: tl.constexpr,
                     HAS_UPDATE: tl.constexpr, HAS_NORM: tl.constexpr, HAS_BIAS: tl.constexpr, GELU: tl.constexpr,
                     FROM_STATE: tl.constexpr, DROPS_INJECT: tl.constexpr, DROPS_TRANSFORM: tl.constexpr,
                     HAS_GRAD_S: tl.constexpr, NEEDS_H: tl.constexpr, PRECISION: tl.constexpr,
                     BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, RP: tl.constexpr, HP: tl.constexpr):  # fmt: skip
    """Gradients of h and s, and the narrow quantities that the gradients of the weights are made of."""
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    ranks, narrow = tl.arange(0, RP), tl.arange(0, HP)
    dz = tl.zeros([BLOCK_T, RP], tl.float32)
    for start in range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        dz += _dot(_tile(grad_h, rows, columns, D, N, D), tl.trans(_tile(W_up, ranks, columns, D, R, D)), PRECISION)
    dz *= alpha
    if DROPS_INJECT:
        dz *= _mask(seed, rows, ranks, RP, inject_dropout)
    _put(grad_z, dz, rows, ranks, R, N, R)

    mean = tl.zeros([BLOCK_T], tl.float32)
    rstd = tl.zeros([BLOCK_T], tl.float32)
    act_T = tl.zeros([BLOCK_T, HP], tl.float32)
    act_G = tl.zeros([BLOCK_T, HP], tl.float32)
    pre_T = tl.zeros([BLOCK_T, HP], tl.float32)
    pre_G = tl.zeros([BLOCK_T, HP], tl.float32)
    d_T = tl.zeros([BLOCK_T, HP], tl.float32)
    d_G = tl.zeros([BLOCK_T, HP], tl.float32)
    scale = tl.full([BLOCK_T], 1.0, tl.float32)
    if HAS_UPDATE or SCALES:
        mean, rstd, rms, pre_T, pre_G = _survey(h, rows, narrow, h_stride, norm_weight, norm_bias, W_T1, W_G1, b_T1,
                                                b_G1, N, D, HG, eps, SCALES, HAS_UPDATE, HAS_NORM, HAS_BIAS, PRECISION,
                                                BLOCK_T, BLOCK_D, HP)  # fmt: skip
        if HAS_NORM:
            tl.store(means + rows, mean, mask=rows < N)
            tl.store(rstds + rows, rstd, mask=rows < N)
        if SCALES:
            scale = rms
            tl.store(scales + rows, scale, mask=rows < N)
    if HAS_UPDATE:
        act_T, act_G = _act(pre_T, GELU), _act(pre_G, GELU)
        if DROPS_TRANSFORM:
            act_T *= _mask(seed + 1, rows, narrow, HP, transform_dropout)
        _put(kept_T, act_T, rows, narrow, HG, N, HG)
        _put(kept_G, act_G, rows, narrow, HG, N, HG)
    d_scale = tl.zeros([BLOCK_T], tl.float32)
    for start in range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        old = _tile(s, rows, columns, s_stride, N, D)
        state, t, g = old, old, old
        if HAS_UPDATE:
            t, g, state = _new_state(s, old, act_T, act_G, columns, narrow, W_T2, W_G2, b_T2, b_G2, D, HG,
                                     HAS_BIAS, PRECISION)  # fmt: skip
        d_state = _grad_scaled(dz, grad_h, rows, columns, ranks, W_down, diagonal, alpha, N, D, R,
                               FROM_STATE, HAS_DIAGONAL, PRECISION)  # fmt: skip
        if SCALES:
            d_scale += tl.sum(d_state * state, 1)
            d_state *= scale[:, None]
        if HAS_GRAD_S:
            d_state += _tile(grad_s, rows, columns, D, N, D)
        if HAS_UPDATE:
            dt = d_state * g
            dg = dt * (t - old) * (1.0 - g)
            d_T += _dot(dt, tl.trans(_tile(W_T2, narrow, columns, D, HG, D)), PRECISION)
            d_G += _dot(dg, tl.trans(_tile(W_G2, narrow, columns, D, HG, D)), PRECISION)
            d_state -= dt
        _put(grad_s_in, d_state, rows, columns, D, N, D)
    if HAS_UPDATE:
        if DROPS_TRANSFORM:
            d_T *= _mask(seed + 1, rows, narrow, HP, transform_dropout)
        d_T *= _slope(pre_T, GELU)
        d_G *= _slope(pre_G, GELU)
        _put(grad_T, d_T, rows, narrow, HG, N, HG)
        _put(grad_G, d_G, rows, narrow, HG, N, HG)
    if NEEDS_H:
        along = tl.zeros([BLOCK_T], tl.float32)
        level = tl.zeros([BLOCK_T], tl.float32)
        if HAS_UPDATE and HAS_NORM:
            for start in range(0, D, BLOCK_D):
                columns = start + tl.arange(0, BLOCK_D)
                dx = _dot(d_T, tl.trans(_tile(W_T1, columns, narrow, HG, D, HG)), PRECISION)
                dx += _dot(d_G, tl.trans(_tile(W_G1, columns, narrow, HG, D, HG)), PRECISION)
                dx *= _vector(norm_weight, columns, D)[None, :]  # zero outside
                x = (_tile(h, rows, columns, h_stride, N, D) - mean[:, None]) * rstd[:, None]
                along += tl.sum(dx * x, 1)
                level += tl.sum(dx, 1)
        for start in range(0, D, BLOCK_D):
            columns = start + tl.arange(0, BLOCK_D)
            out = _tile(grad_h, rows, columns, D, N, D)
            if not FROM_STATE:
                out += _dot(dz, tl.trans(_tile(W_down, columns, ranks, R, D, R)), PRECISION)
            if SCALES:
                out += _tile(h, rows, columns, h_stride, N, D) * (d_scale / tl.maximum(scale * D, 1e-37))[:, None]
            if HAS_UPDATE:
                dx = _dot(d_T, tl.trans(_tile(W_T1, columns, narrow, HG, D, HG)), PRECISION)
                dx += _dot(d_G, tl.trans(_tile(W_G1, columns, narrow, HG, D, HG)), PRECISION)
                if HAS_NORM:
                    dx *= _vector(norm_weight, columns, D)[None, :]
                    x = (_tile(h, rows, columns, h_stride, N, D) - mean[:, None]) * rstd[:, None]
                    dx = rstd[:, None] * (dx - level[:, None] / D - x * along[:, None] / D)
                out += dx
            _put(grad_h_in, out, rows, columns, D, N, D)


@triton.jit
def _backward_weights(h, s, grad_h, grad_s, bottleneck, grad_z, kept_T, kept_G, grad_T, grad_G, means, rstds,
                      scales, W_down, W_T1, W_T2, W_G1, W_G2, b_T2, b_G2, norm_weight, norm_bias, diagonal, tall, flat,
                      vectors, N, D, R, HG, h_stride, s_stride, alpha, rows_a_split,
                      SCALES: tl.constexpr, HAS_DIAGONAL: tl.constexpr,
                      HAS_UPDATE: tl.constexpr, HAS_NORM: tl.constexpr, HAS_BIAS: tl.constexpr,
                      FROM_STATE: tl.constexpr, HAS_GRAD_S: tl.constexpr, PRECISION: tl.constexpr,
                      BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, RP: tl.constexpr, HP: tl.constexpr):  # fmt: skip
    """Sums over the tokens of one split, for some columns.

    ``tall`` [splits, D, R + 2 HG]: W_down, W_T1, W_G1; ``flat`` [splits, R + 2 HG, D]: W_up, W_T2, W_G2;
    ``vectors`` [splits, 5, D]: b_T2, b_G2, norm weight, norm bias, diagonal.
    """
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.program_id(1)
    ranks, narrow = tl.arange(0, RP), tl.arange(0, HP)
    wide = R + 2 * HG
    tall += split.to(tl.int64) * D * wide
    flat += split.to(tl.int64) * D * wide
    vectors += split.to(tl.int64) * D * 5
    d_down = tl.zeros([BLOCK_D, RP], tl.float32)
    d_up = tl.zeros([RP, BLOCK_D], tl.float32)
    d_T1 = tl.zeros([BLOCK_D, HP], tl.float32)
    d_G1 = tl.zeros([BLOCK_D, HP], tl.float32)
    d_T2 = tl.zeros([HP, BLOCK_D], tl.float32)
    d_G2 = tl.zeros([HP, BLOCK_D], tl.float32)
    d_b_T2 = tl.zeros([BLOCK_D], tl.float32)
    d_b_G2 = tl.zeros([BLOCK_D], tl.float32)
    d_weight = tl.zeros([BLOCK_D], tl.float32)
    d_bias = tl.zeros([BLOCK_D], tl.float32)
    d_diagonal = tl.zeros([BLOCK_D], tl.float32)
    for start in range(split * rows_a_split, tl.minimum((split + 1) * rows_a_split, N), BLOCK_T):
        rows = start + tl.arange(0, BLOCK_T)
        dz = _tile(grad_z, rows, ranks, R, N, R)
        z = _tile(bottleneck, rows, ranks, R, N, R)
        values = _tile(h, rows, columns, h_stride, N, D)
        old = _tile(s, rows, columns, s_stride, N, D)
        state = old
        scale = tl.full([BLOCK_T], 1.0, tl.float32)
        if SCALES:
            scale = _vector(scales, rows, N)
        d_up += _dot(tl.trans(z), _tile(grad_h, rows, columns, D, N, D), PRECISION)
        if HAS_UPDATE:
            act_T = _tile(kept_T, rows, narrow, HG, N, HG)
            act_G = _tile(kept_G, rows, narrow, HG, N, HG)
            t, g, state = _new_state(s, old, act_T, act_G, columns, narrow, W_T2, W_G2, b_T2, b_G2, D, HG,
                                     HAS_BIAS, PRECISION)  # fmt: skip
            d_state = scale[:, None] * _grad_scaled(dz, grad_h, rows, columns, ranks, W_down, diagonal, alpha, N, D, R,
                                                    FROM_STATE, HAS_DIAGONAL, PRECISION)  # fmt: skip
            if HAS_GRAD_S:
                d_state += _tile(grad_s, rows, columns, D, N, D)
            dt = d_state * g
            dg = dt * (t - old) * (1.0 - g)
            d_T2 += _dot(tl.trans(act_T), dt, PRECISION)
            d_G2 += _dot(tl.trans(act_G), dg, PRECISION)
            d_T = _tile(grad_T, rows, narrow, HG, N, HG)
            d_G = _tile(grad_G, rows, narrow, HG, N, HG)
            x = values
            if HAS_NORM:
                mean, rstd = _vector(means, rows, N), _vector(rstds, rows, N)
                unit = (values - mean[:, None]) * rstd[:, None]
                dx = _dot(d_T, tl.trans(_tile(W_T1, columns, narrow, HG, D, HG)), PRECISION)
                dx += _dot(d_G, tl.trans(_tile(W_G1, columns, narrow, HG, D, HG)), PRECISION)
                d_weight += tl.sum(dx * unit, 0)
                d_bias += tl.sum(dx, 0)
                x = _normed(values, columns, mean, rstd, norm_weight, norm_bias, D, HAS_NORM)
            d_T1 += _dot(tl.trans(x), d_T, PRECISION)
            d_G1 += _dot(tl.trans(x), d_G, PRECISION)
            if HAS_BIAS:
                d_b_T2 += tl.sum(dt, 0)
                d_b_G2 += tl.sum(dg, 0)
        scaled = state * scale[:, None]
        if HAS_DIAGONAL:
            d_diagonal += tl.sum(scaled * _tile(grad_h, rows, columns, D, N, D), 0)
        source = scaled if FROM_STATE else values - scaled
        d_down += _dot(tl.trans(source), dz, PRECISION)
    _put(tall, d_down, columns, ranks, wide, D, R)
    _put(flat, alpha * d_up, ranks, columns, D, R, D)
    if HAS_DIAGONAL:
        tl.store(vectors + 4 * D + columns, alpha * d_diagonal, mask=columns < D)
    if HAS_UPDATE:
        _put(tall + R, d_T1, columns, narrow, wide, D, HG)
        _put(tall + R + HG, d_G1, columns, narrow, wide, D, HG)
        _put(flat + R * D, d_T2, narrow, columns, D, HG, D)
        _put(flat + (R + HG) * D, d_G2, narrow, columns, D, HG, D)
        inside = columns < D
        tl.store(vectors + columns, d_b_T2, mask=inside)
        tl.store(vectors + D + columns, d_b_G2, mask=inside)
        tl.store(vectors + 2 * D + columns, d_weight, mask=inside)
        tl.store(vectors + 3 * D + columns, d_bias, mask=inside)


def forward(spec: StepSpec, h: Tensor, s: Tensor, w: StepWeights) -> StepOutput:
    """As :func:`shadowpeft.core.kernels.reference.forward`; the dropout state is a seed from torch's CPU generator."""
    assert w.diagonal is None or spec.diagonal_ratio == 1.0  # see variant_obstacle
    h, s, w = _rows(h), _rows(s), _contiguous(w)
    seed = torch.randint(2**31 - 2, (), dtype=torch.int64) if spec.has_dropout else None
    num_tokens = len(h)
    h_out = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    s_out = None if w.W_T1 is None else torch.empty(s.shape, dtype=s.dtype, device=s.device)
    bottleneck = torch.empty(num_tokens, w.W_down.shape[1], dtype=torch.float32, device=h.device)
    scale = torch.empty(num_tokens, 1, dtype=torch.float32, device=h.device) if spec.scales_state else None
    tiles = _tiles(FORWARD, w, h)
    with _device_of(h):
        _forward[(triton.cdiv(num_tokens, tiles.tokens),)](  # type: ignore[index]
            h, s, h_out, h_out if s_out is None else s_out, bottleneck, bottleneck if scale is None else scale,
            *_pointers(w, h), *_numbers(spec, h, s, w, seed), **_switches(spec, h, w), **_launch(tiles),
        )  # fmt: skip
    return StepOutput(h_out, s_out, bottleneck, seed, scale)


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
) -> StepGradients:
    """As :func:`shadowpeft.core.kernels.reference.backward`."""
    h, s, grad_h, given = _rows(h), _rows(s), grad_h.contiguous(), w
    w = _contiguous(w)
    grad_s = None if grad_s is None else grad_s.contiguous()
    (num_tokens, width), rank = h.shape, w.W_down.shape[1]
    hidden = 1 if w.W_T1 is None else w.W_T1.shape[1]

    def narrow(columns: int) -> Tensor:
        return torch.empty(num_tokens, columns, dtype=torch.float32, device=h.device)

    grad_h_in = torch.empty(h.shape, dtype=h.dtype, device=h.device) if needs_grad_h else None
    grad_s_in = torch.empty(s.shape, dtype=s.dtype, device=s.device)
    grad_z, mean, rstd, scale = narrow(rank), narrow(1), narrow(1), narrow(1)
    kept_T, kept_G, grad_T, grad_G = (narrow(hidden) for _ in range(4))
    switches = _switches(spec, h, w)
    has_grad_s = grad_s is not None
    upstream = (grad_h, grad_s if grad_s is not None else grad_h)
    tiles = _tiles(BACKWARD_TOKENS, w, h)
    with _device_of(h):
        _backward_tokens[(triton.cdiv(num_tokens, tiles.tokens),)](  # type: ignore[index]
            h, s, *upstream, grad_s_in if grad_h_in is None else grad_h_in, grad_s_in, grad_z, kept_T, kept_G, grad_T,
            grad_G, mean, rstd, scale, *_pointers(w, h), *_numbers(spec, h, s, w, rng_state),
            HAS_GRAD_S=has_grad_s, NEEDS_H=needs_grad_h, **switches, **_launch(tiles),
        )  # fmt: skip
    tiles = _tiles(BACKWARD_WEIGHTS, w, h)
    splits = max(min(_MOST_SPLITS, triton.cdiv(num_tokens, 8 * tiles.tokens)), 1)
    rows_a_split = triton.cdiv(triton.cdiv(num_tokens, splits), tiles.tokens) * tiles.tokens
    wide = rank + 2 * hidden
    tall = torch.empty(splits, width, wide, dtype=torch.float32, device=h.device)
    flat = torch.empty(splits, wide, width, dtype=torch.float32, device=h.device)
    vectors = torch.empty(splits, 5, width, dtype=torch.float32, device=h.device)
    p = dict(zip(StepWeights._fields, _pointers(w, h), strict=True))
    for unused in ("GELU", "DROPS_INJECT", "DROPS_TRANSFORM"):
        del switches[unused]
    with _device_of(h):
        _backward_weights[(triton.cdiv(width, tiles.columns), splits)](  # type: ignore[index]
            h, s, *upstream, bottleneck, grad_z, kept_T, kept_G, grad_T, grad_G, mean, rstd, scale,
            p["W_down"], p["W_T1"], p["W_T2"], p["W_G1"], p["W_G2"], p["b_T2"], p["b_G2"], p["norm_weight"],
            p["norm_bias"], p["diagonal"], tall, flat, vectors, num_tokens, width, rank, hidden, h.stride(0), s.stride(0),
            spec.alpha, rows_a_split, HAS_GRAD_S=has_grad_s, **switches, **_launch(tiles),
        )  # fmt: skip
    found = _gradients(given, tall.sum(0), flat.sum(0), vectors.sum(0), grad_T, grad_G)
    return StepGradients(grad_h_in, grad_s_in, found)


def _gradients(
    w: StepWeights, tall: Tensor, flat: Tensor, vectors: Tensor, grad_T: Tensor, grad_G: Tensor
) -> StepWeights:
    """The sums under the names and in the dtypes of the weights."""
    rank = w.W_down.shape[1]
    hidden = 0 if w.W_T1 is None else w.W_T1.shape[1]
    ends = (rank, rank + hidden, rank + 2 * hidden)
    found = {
        "W_down": tall[:, : ends[0]], "W_T1": tall[:, ends[0] : ends[1]], "W_G1": tall[:, ends[1] : ends[2]],
        "W_up": flat[: ends[0]], "W_T2": flat[ends[0] : ends[1]], "W_G2": flat[ends[1] : ends[2]],
        "b_T1": grad_T.sum(0), "b_G1": grad_G.sum(0),
        "b_T2": vectors[0], "b_G2": vectors[1], "norm_weight": vectors[2], "norm_bias": vectors[3],
        "diagonal": vectors[4],
    }  # fmt: skip
    there = {name: weight for name, weight in w._asdict().items() if weight is not None}
    return StepWeights(**{name: found[name].to(weight.dtype) for name, weight in there.items()})


def _tiles(choices: dict[str, Tiles], w: StepWeights, h: Tensor) -> Tiles:
    widest = max(w.W_down.shape[1], 1 if w.W_T1 is None else w.W_T1.shape[1])
    if widest > _WIDEST_FOR_LARGE_TILES or h.element_size() > 2 or _shared_memory(h.device) < _HOPPER_SHARED_MEMORY:
        return _NARROW
    return choices["no update" if w.W_T1 is None else "update"]


def _shared_memory(device: torch.device) -> int:
    """Bytes that one program can have; those of Hopper in the interpreter."""
    if device.type != "cuda":
        return _HOPPER_SHARED_MEMORY
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def _device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which with a ``device_map`` need not be the one the tensors are on."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _launch(tiles: Tiles) -> dict[str, int]:
    return {"BLOCK_T": tiles.tokens, "BLOCK_D": tiles.columns, "num_warps": tiles.warps}


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _contiguous(w: StepWeights) -> StepWeights:
    return StepWeights(*(None if weight is None else weight.contiguous() for weight in w))  # type: ignore[arg-type]


def _pointers(w: StepWeights, placeholder: Tensor) -> list[Tensor]:
    """All weights; what is not there is never read."""
    return [placeholder if weight is None else weight for weight in w]


def _numbers(spec: StepSpec, h: Tensor, s: Tensor, w: StepWeights, seed: Tensor | None) -> list[Any]:
    hidden = 1 if w.W_T1 is None else w.W_T1.shape[1]
    return [
        0 if seed is None else int(seed), *h.shape, w.W_down.shape[1], hidden, h.stride(0), s.stride(0),
        spec.alpha, spec.norm_eps, spec.inject_dropout, spec.transform_dropout,
    ]  # fmt: skip


def _switches(spec: StepSpec, h: Tensor, w: StepWeights) -> dict[str, Any]:
    hidden = 1 if w.W_T1 is None else w.W_T1.shape[1]
    return {
        "SCALES": spec.scales_state,
        "HAS_DIAGONAL": w.diagonal is not None,
        "HAS_UPDATE": w.W_T1 is not None,
        "HAS_NORM": w.norm_weight is not None,
        "HAS_BIAS": w.b_T1 is not None,
        "GELU": spec.activation == "gelu",
        "FROM_STATE": spec.from_state,
        "DROPS_INJECT": spec.inject_dropout > 0,
        "DROPS_TRANSFORM": spec.transform_dropout > 0,
        "PRECISION": "ieee" if h.dtype == torch.float32 else "tf32",
        "RP": max(triton.next_power_of_2(w.W_down.shape[1]), 16),
        "HP": max(triton.next_power_of_2(hidden), 16),
    }
