"""Shapes as types.

With jaxtyping installed the names below carry shapes, which tests check on every call (``tests/conftest.py``
installs its import hook). Without it, as in production, they are plain tensors and cost nothing. Within one call
``*batch`` and every other dimension has one size, so a state [1, T, d] beside hidden states [B, T, d] is an error.
"""

from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    Float: Any
else:
    try:
        from jaxtyping import Float
    except ImportError:
        Float = None


def _floats(dimensions: str) -> Any:
    return Tensor if Float is None else Float[Tensor, dimensions]


if TYPE_CHECKING:
    States = Down = Up = Narrow = Wide = Tensor
else:
    States = _floats("*batch d")  # h and s: [B, T, d]
    Down, Up = _floats("d r"), _floats("r d")  # W_down, W_up
    Narrow, Wide = _floats("d h_g"), _floats("h_g d")  # W_T1, W_G1 and W_T2, W_G2
