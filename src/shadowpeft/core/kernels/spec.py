"""What defines one step between two blocks, apart from its tensors, and the tensors it is made of."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from shadowpeft.core.config import ShadowConfig


@dataclass(frozen=True, kw_only=True)
class StepSpec:
    """One variant of the step.

    Attributes:
        alpha: scale of the correction (Eq. 4).
        diagonal_ratio: what ``v * s`` counts in the correction, where what the bottleneck brings counts 1.
        activation: ``silu`` or ``gelu``, inside transform and gate.
        from_state: correct from s alone instead of from h - s (Eq. 2).
        drop_input: dropout on the d-wide input of W_down instead of on its r-wide result.
        inject_dropout, transform_dropout: probabilities in effect; 0 outside training.
        norm_eps: the LayerNorm's epsilon.
        scales_state: s is multiplied by the RMS of h wherever it meets h.
        bottleneck_activation: ``silu``, ``gelu`` or ``none`` behind W_down, which then reads h in units of its RMS; None:
            linear, and in the unit of h.
    """

    alpha: float
    diagonal_ratio: float = 1.0
    activation: str = "silu"
    from_state: bool = False
    drop_input: bool = False
    inject_dropout: float = 0.0
    transform_dropout: float = 0.0
    norm_eps: float = 1e-5
    scales_state: bool = False
    bottleneck_activation: str | None = None

    @property
    def has_dropout(self) -> bool:
        return self.inject_dropout > 0 or self.transform_dropout > 0

    @classmethod
    def of(cls, config: ShadowConfig, *, training: bool, norm_eps: float = 1e-5) -> "StepSpec":
        dropout = config.shadow_dropout if training else 0.0
        return cls(
            alpha=config.bottleneck_alpha,
            diagonal_ratio=config.diagonal_ratio,
            activation=config.update_activation,
            from_state=config.inject_from == "state",
            drop_input=config.dropout_at == "input",
            inject_dropout=dropout,
            transform_dropout=dropout if config.transform_dropout else 0.0,
            norm_eps=norm_eps,
            scales_state=config.scale_state,
            bottleneck_activation=config.inject_activation if config.in_units else None,
        )


class StepWeights(NamedTuple):
    """The weights of one step; an update's are None in front of the first refined block, unused ones always.

    W_down [d, r], W_up [r, d], diagonal [d]; W_T1, W_G1 [d, h_g]; W_T2, W_G2 [h_g, d]; biases and norm as their
    names say.
    """

    W_down: Tensor
    W_up: Tensor
    W_T1: Tensor | None = None
    W_T2: Tensor | None = None
    W_G1: Tensor | None = None
    W_G2: Tensor | None = None
    b_T1: Tensor | None = None
    b_T2: Tensor | None = None
    b_G1: Tensor | None = None
    b_G2: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    diagonal: Tensor | None = None


class Branch(NamedTuple):
    """What a correction that also reads the last addition to the residual stream is given beside the rest.

    added [.., d]: that addition; weight [d, r]: W_branch.
    """

    added: Tensor
    weight: Tensor
