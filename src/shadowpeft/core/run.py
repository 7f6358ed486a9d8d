"""The state of one forward pass."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shadowpeft.core.network import ShadowNetwork


class ShadowRun:
    """The shadow state of one call, handed to every block as a keyword; nothing of it is kept on a module.

    The state in front of every block whose input has a gradient is kept (autograd holds it anyway), so that
    a block that is recomputed by gradient checkpointing sees the state it saw the first time. In front of
    others only the newest state is kept.

    Args:
        network: whose steps refine this call.
        initial: s(0), [B, T, d] (Eq. 1).
        before_block: (index of a block, what to call when its input is ready), if anything.
    """

    __slots__ = ("_before_block", "_states", "_with_grad", "initial", "network")

    def __init__(
        self, network: ShadowNetwork, initial: Tensor, *, before_block: tuple[int, Callable[[], Any]] | None = None
    ) -> None:
        self.network = network
        self._before_block = before_block
        self.initial = initial
        self._with_grad = torch.is_grad_enabled()
        self._states: dict[int, Tensor] = {-1: initial}

    def step(self, block_index: int, h: Tensor) -> Tensor:
        """The corrected input of block ``block_index``; ``h`` is the previous block's output, [B, T, d].

        Raises:
            RuntimeError: gradients are switched off inside a call that started with them (re-entrant checkpointing).
            ValueError: state and hidden states differ in shape.
        """
        if self._with_grad and not torch.is_grad_enabled():
            raise RuntimeError(
                "re-entrant gradient checkpointing would lose the gradient of the shadow state; call "
                'gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})'
            )
        previous = self._states[block_index - 1]
        if previous.shape != h.shape:
            raise ValueError(
                f"the shadow state has shape {tuple(previous.shape)} but block {block_index} receives "
                f"{tuple(h.shape)}: both paths must see the same tokens (pass the same cache to every call)"
            )
        corrected, state = self.network.step(block_index, h, previous.to(h.device))
        if corrected.requires_grad:  # if only by the weights of the step: s(0) of a frozen shadow has no gradient
            self._states.setdefault(block_index, state)
        else:
            self._states = {block_index: state}
        if self._before_block is not None and self._before_block[0] == block_index:
            self._before_block[1]()
        return corrected
