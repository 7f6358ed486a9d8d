"""Equations 2-7, 13 and 14 as functions, and the trained weights of one step between two blocks.

Shapes: ``h`` is a block's output and ``s`` the shadow state, both [B, T, d]. Weights are stored as the
paper writes them, ``[in, out]``, and used as ``h @ W``.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shadowpeft.core.config import ShadowConfig
from shadowpeft.core.shapes import Down, Narrow, States, Up, Wide

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu, "none": lambda x: x}


def discrepancy(h: States, s: States) -> States:
    """Eq. 2: ``delta = h - s``, [B, T, d]."""
    return h - s


def rms(h: States) -> Tensor:
    """The root mean square of each token's ``h``, [B, T, 1] in its dtype.

    Taken in fp32 or wider: the square of an entry above 255 is infinite in float16, and blocks give such entries.
    """
    # One pass where h.square().mean() is three: a fifth of its time for one token.
    wide = torch.float64 if h.dtype == torch.float64 else torch.float32
    return (torch.linalg.vector_norm(h, dim=-1, keepdim=True, dtype=wide) * h.shape[-1] ** -0.5).to(h.dtype)


def unit(h: States, scale: Tensor) -> States:
    """``h`` divided by its RMS ``scale``; zero where h is zero."""
    return h / scale.clamp_min(torch.finfo(scale.dtype).tiny)


# An addition to the residual stream whose RMS is smaller counts as one of this RMS: attention may add nothing at all.
SMALLEST_BRANCH = 1e-4


def unit_of_branch(added: Tensor) -> tuple[Tensor, Tensor]:
    """What was added to the residual stream divided by its RMS, [B, T, d], and that RMS, [B, T, 1], in fp32 or wider."""
    added = added.to(torch.promote_types(added.dtype, torch.float32))
    scale = rms(added).clamp_min(SMALLEST_BRANCH)
    return added / scale, scale


def correction(delta: States, W_down: Down, W_up: Up, *, dropout: float = 0.0, at: str = "bottleneck") -> States:
    """Eq. 3: ``Dropout(delta W_down) W_up``; W_down [d, r], W_up [r, d]. ``at="input"`` drops delta instead."""
    if at == "input":
        return F.dropout(delta, dropout) @ W_down @ W_up
    return F.dropout(delta @ W_down, dropout) @ W_up


def inject(h: States, correction: States, alpha: float) -> States:
    """Eq. 4: ``h + alpha * correction``, in the dtype of ``h``."""
    return torch.add(h, correction.to(h.dtype), alpha=alpha)


def transform(z: States, W_1: Narrow, W_2: Wide, *, act: Callable[[Tensor], Tensor], dropout: float = 0.0) -> States:
    """Eq. 5 and 13: ``Dropout(act(z W_1)) W_2``; W_1 [d, h_g], W_2 [h_g, d]."""
    return F.dropout(act(z @ W_1), dropout) @ W_2


def gate(z: States, W_1: Narrow, W_2: Wide, *, act: Callable[[Tensor], Tensor]) -> States:
    """Eq. 6 and 14: ``sigmoid(act(z W_1) W_2)``, element-wise, [B, T, d]."""
    return torch.sigmoid(act(z @ W_1) @ W_2)


def update(s: States, g: States, t: States) -> States:
    """Eq. 7: ``(1 - g) * s + g * t``."""
    return torch.lerp(s, t, g)


class Injection(nn.Module):
    """The low-rank correction of one block's input (Eq. 2-4). ``W_up`` starts at zero: at first nothing changes.

    Beyond the paper, ``scale_state`` replaces s by ``rms(h) * s``, and ``inject_diagonal`` adds ``v * s`` to the
    correction, with a trained vector ``diagonal`` that starts at zero too. ``inject_activation`` puts an activation into
    the bottleneck, which then reads ``h / rms(h) - s`` and whose result is multiplied by ``rms(h)``; without an activation
    that is the same as the above. ``alpha_rank`` weighs the bottleneck by the inverse of its rank. With ``inject_branch``
    the bottleneck also reads the last addition to the residual stream, divided by its RMS, by weights ``W_branch`` of its own.

    Args:
        has_branch: whether anything was added to the stream in front of it: not so in front of the first block.
    """

    W_branch: nn.Parameter | None
    diagonal: nn.Parameter | None

    def __init__(self, width: int, config: ShadowConfig, *, has_branch: bool = True) -> None:
        super().__init__()
        self.config = config
        self.W_down = nn.Parameter(torch.empty(width, config.r))
        self.W_up = nn.Parameter(torch.empty(config.r, width))
        reads_branch = config.inject_branch and has_branch
        self.register_parameter("W_branch", nn.Parameter(torch.empty(width, config.r)) if reads_branch else None)
        self.register_parameter("diagonal", nn.Parameter(torch.empty(width)) if config.inject_diagonal else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in (self.W_down, self.W_branch):
            if weight is None:
                continue
            if self.config.down_init == "normal":
                # An activation wants inputs of size one, and has entries of size one to make them from.
                nn.init.normal_(weight, std=weight.shape[0] ** -0.5 if self.config.in_units else 0.02)
            else:
                linear_init_(weight)
        nn.init.zeros_(self.W_up)
        if self.diagonal is not None:
            nn.init.zeros_(self.diagonal)

    def forward(self, h: Tensor, s: Tensor, added: Tensor | None = None) -> Tensor:
        """[B, T, d], [B, T, d] -> [B, T, d]: the corrected input of the block (or sublayer).

        ``added``: what was added to the residual stream last, [B, T, d], None in front of the first block; read where there
        is ``W_branch``.
        """
        config = self.config
        dropout = config.shadow_dropout if self.training else 0.0
        if config.in_units:
            return inject(h, self._in_units(h, s, added, dropout), config.bottleneck_alpha)
        if config.scale_state:
            s = s * rms(h)
        source = discrepancy(h, s) if config.inject_from == "difference" else s
        source = source.to(self.W_down.dtype)
        added = correction(source, self.W_down, self.W_up, dropout=dropout, at=config.dropout_at)
        if self.diagonal is not None:
            added = torch.addcmul(added, self.diagonal, s.to(self.diagonal.dtype), value=config.diagonal_ratio)
        return inject(h, added, config.bottleneck_alpha)

    def _in_units(self, h: Tensor, s: Tensor, branch: Tensor | None, dropout: float) -> Tensor:
        """``rms(h) * (act(Dropout((h / rms(h) - s) W_down + b / rms(b) W_branch)) W_up + ratio v * s)``, [B, T, d]."""
        config = self.config
        s = s.to(self.W_down.dtype)
        scale = rms(h).to(s.dtype)
        source = unit(h.to(s.dtype), scale) - s if config.inject_from == "difference" else s
        drops_input = config.dropout_at == "input"
        source = F.dropout(source, dropout) if drops_input else source
        hidden = source @ self.W_down
        if self.W_branch is not None and branch is not None:
            branch = unit_of_branch(branch)[0].to(s.dtype)
            hidden = hidden + (F.dropout(branch, dropout) if drops_input else branch) @ self.W_branch
        hidden = hidden if drops_input else F.dropout(hidden, dropout)
        added = ACTIVATIONS[config.inject_activation](hidden) @ self.W_up
        if self.diagonal is not None:
            added = torch.addcmul(added, self.diagonal, s, value=config.diagonal_ratio)
        return added * scale


class Update(nn.Module):
    """The gated advance of the shadow state after one block (Eq. 5-7)."""

    b_T1: nn.Parameter | None
    b_T2: nn.Parameter | None
    b_G1: nn.Parameter | None
    b_G2: nn.Parameter | None

    def __init__(self, width: int, config: ShadowConfig) -> None:
        super().__init__()
        hidden = config.update_hidden_size
        self.config = config
        self.W_T1 = nn.Parameter(torch.empty(width, hidden))
        self.W_T2 = nn.Parameter(torch.empty(hidden, width))
        self.W_G1 = nn.Parameter(torch.empty(width, hidden))
        self.W_G2 = nn.Parameter(torch.empty(hidden, width))
        for name, size in (("b_T1", hidden), ("b_T2", width), ("b_G1", hidden), ("b_G2", width)):
            self.register_parameter(name, nn.Parameter(torch.empty(size)) if config.update_bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name in ("T1", "T2", "G1", "G2"):
            weight, bias = getattr(self, f"W_{name}"), getattr(self, f"b_{name}")
            linear_init_(weight)
            if bias is not None:
                bound = 1 / math.sqrt(weight.shape[0])
                nn.init.uniform_(bias, -bound, bound)

    def named_weights(self) -> dict[str, Tensor | None]:
        """Its weights and biases by name; None for the biases it does not have."""
        kinds = ("T1", "T2", "G1", "G2")
        return {f"{kind}_{name}": getattr(self, f"{kind}_{name}") for kind in ("W", "b") for name in kinds}

    def forward(self, z: Tensor, s: Tensor) -> Tensor:
        """``z``: the (normed) block output, ``s``: the state before it; returns the state after it, [B, T, d]."""
        config = self.config
        act = ACTIVATIONS[config.update_activation]
        dropout = config.shadow_dropout if self.training and config.transform_dropout else 0.0
        z, state = z.to(self.W_T1.dtype), s.to(self.W_T1.dtype)
        if config.update_bias:
            t = F.dropout(act(z @ self.W_T1 + self.b_T1), dropout) @ self.W_T2 + self.b_T2  # type: ignore[operator]
            g = torch.sigmoid(act(z @ self.W_G1 + self.b_G1) @ self.W_G2 + self.b_G2)  # type: ignore[operator]
        else:
            t = transform(z, self.W_T1, self.W_T2, act=act, dropout=dropout)
            g = gate(z, self.W_G1, self.W_G2, act=act)
        return update(state, g.to(state.dtype), t.to(state.dtype)).to(s.dtype)


def linear_init_(weight: Tensor) -> None:
    """What ``nn.Linear`` does by default (uniform in +-1/sqrt(fan in)), for a weight stored as [in, out]."""
    bound = 1 / math.sqrt(weight.shape[0])
    nn.init.uniform_(weight, -bound, bound)
