"""Work in the last block that nothing reads, left out.

Behind the last block only labelled positions reach the head. What attention of that block needs from the other
positions are their keys and values; their queries, the projection behind attention and the MLP lead nowhere. Within
:func:`only_rows` those products are taken at the labelled positions alone, and are zero elsewhere: loss and gradients
are the same to rounding, hidden states at unlabelled positions are not.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from shadowpeft.core.losses import is_plain_linear

# Layers whose output at a position is read for the block's output at that position and no other: not keys and values.
_ROW_WISE = frozenset(
    ["q_proj", "o_proj", "out_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj", "fc1", "fc2", "c_fc", "c_proj"]
    + ["dense", "dense_h_to_4h", "dense_4h_to_h"]
)
# With more of the rows needed, gathering and scattering cost what the smaller products save.
_MOST_NEEDED = 0.75


def row_wise_weights(block: nn.Module) -> frozenset[int]:
    """``id`` of the weights of a decoder block's plain linear layers that work on each position by itself."""
    layers = (module for name, module in block.named_modules() if name.rsplit(".", 1)[-1] in _ROW_WISE)
    return frozenset(id(layer.weight) for layer in layers if is_plain_linear(layer))


class _OnlyRows(TorchFunctionMode):
    def __init__(self, weights: frozenset[int], rows: Tensor, shape: torch.Size) -> None:
        super().__init__()
        self._weights, self._rows, self._shape = weights, rows, shape

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func is F.linear and id(args[1]) in self._weights and args[0].shape[:-1] == self._shape:
            return self._at_rows(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _at_rows(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rows = self._rows.to(x.device)
        found = F.linear(x.flatten(0, 1).index_select(0, rows), weight, bias)
        whole = found.new_zeros(self._shape.numel(), found.shape[-1])
        return whole.index_copy(0, rows, found).view(*self._shape, -1)


@contextmanager
def only_rows(weights: frozenset[int], needed: Tensor) -> Iterator[None]:
    """Within the block, products with ``weights`` are taken where ``needed`` is true.

    Args:
        weights: of :func:`row_wise_weights`.
        needed: [B, T], bool. If most of it is true, nothing is left out.
    """
    rows = needed.flatten().nonzero().squeeze(1)
    if len(rows) > _MOST_NEEDED * needed.numel():
        yield
        return
    with _OnlyRows(weights, rows, needed.shape):
        yield
