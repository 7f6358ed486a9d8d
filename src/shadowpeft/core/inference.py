"""The step between two blocks without gradients: the equations of :mod:`shadowpeft.core.step` in fewer passes.

At one token a step the work is a handful of matrix-vector products, so the number of operations decides its cost. Every
operand is read from the network at the time of the call; nothing is derived ahead, so nothing can grow stale.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shadowpeft.core.step import ACTIVATIONS, rms, unit, unit_of_branch

if TYPE_CHECKING:
    from shadowpeft.core.network import ShadowNetwork
    from shadowpeft.core.step import Injection, Update


def step(
    network: "ShadowNetwork", block_index: int, h: Tensor, s: Tensor, added: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``network.step`` for a network in evaluation mode while gradients are off; shapes and results as there."""
    if block_index < network.config.first_block:
        return h, s
    injection, update = network.parts(block_index)
    h, s, added = beside(injection.W_down, h, s, added)
    if update is not None:
        s = advance(update, h if network.update_norm is None else layer_norm(network.update_norm, h), s)
    return correct(injection, h, s, added), s


def beside(weight: Tensor, h: Tensor, s: Tensor, added: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """What a step reads on the device of its weights, which is that of the block it feeds."""
    device = weight.device
    if h.device == s.device == device and (added is None or added.device == device):
        return h, s, added
    return h.to(device), s.to(device), None if added is None else added.to(device)


def layer_norm(norm: nn.LayerNorm, h: Tensor) -> Tensor:
    """The norm that all updates share, wherever ``h`` is, in its own dtype."""
    weight, bias = norm.weight.to(h.device), norm.bias.to(h.device)
    return F.layer_norm(h.to(weight.dtype), norm.normalized_shape, weight, bias, norm.eps)


def advance(update: "Update", z: Tensor, s: Tensor) -> Tensor:
    """Eq. 5-7: ``z`` the (normed) block output, ``s`` the state before it; the state after it, [B, T, d]."""
    W_T1, W_G1 = update.W_T1, update.W_G1
    z = z.to(W_T1.dtype)
    hidden_t, hidden_g = z @ W_T1, z @ W_G1
    if update.b_T1 is not None and update.b_G1 is not None:
        hidden_t += update.b_T1
        hidden_g += update.b_G1
    if update.config.update_activation == "silu":
        hidden_t, hidden_g = F.silu(hidden_t, inplace=True), F.silu(hidden_g, inplace=True)
    else:
        hidden_t, hidden_g = F.gelu(hidden_t), F.gelu(hidden_g)
    t, g = hidden_t @ update.W_T2, hidden_g @ update.W_G2
    if update.b_T2 is not None and update.b_G2 is not None:
        t += update.b_T2
        g += update.b_G2
    return torch.lerp(s.to(t.dtype), t, g.sigmoid_()).to(s.dtype)


def correct(injection: "Injection", h: Tensor, s: Tensor, added: Tensor | None = None) -> Tensor:
    """Eq. 2-4: the corrected input of the block (or sublayer), [B, T, d], in the dtype of ``h``."""
    config = injection.config
    W_down, W_up = injection.W_down, injection.W_up
    if config.in_units:
        s = s.to(W_down.dtype)
        scale = rms(h).to(s.dtype)
        source = unit(h.to(s.dtype), scale) - s if config.inject_from == "difference" else s
        hidden = source @ W_down
        if injection.W_branch is not None and added is not None:
            hidden += unit_of_branch(added)[0].to(s.dtype) @ injection.W_branch
        lifted = ACTIVATIONS[config.inject_activation](hidden) @ W_up
        if injection.diagonal is not None:
            lifted = lifted.addcmul_(injection.diagonal, s, value=config.diagonal_ratio)
        return torch.add(h, lifted.mul_(scale).to(h.dtype), alpha=config.bottleneck_alpha)
    if config.scale_state:
        s = s * rms(h)
    source = h - s if config.inject_from == "difference" else s
    lifted = source.to(W_down.dtype) @ W_down @ W_up
    if injection.diagonal is not None:
        lifted = lifted.addcmul_(injection.diagonal, s.to(lifted.dtype), value=config.diagonal_ratio)
    return torch.add(h, lifted.to(h.dtype), alpha=config.bottleneck_alpha)
