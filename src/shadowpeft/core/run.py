"""The state of one forward pass."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shadowpeft.core.network import ShadowNetwork
from shadowpeft.errors import AdapterError


class ShadowRun:
    """The shadow state of one call, handed to every block as a keyword; nothing of it is kept on a module.

    The state in front of every block whose input has a gradient is kept (autograd holds it anyway), so that
    a block that is recomputed by gradient checkpointing sees the state it saw the first time. In front of
    others only the newest state is kept. The same goes for the residual stream behind corrections, where the config asks what
    was added to it since, or corrects it between sublayers.

    Args:
        network: whose steps refine this call.
        initial: s(0), [B, T, d] (Eq. 1).
        before_block: (index of a block, what to call when its input is ready), if anything.
    """

    __slots__ = ("_before_block", "_inputs", "_last_between", "_states", "_stream", "_with_grad", "initial", "network")

    def __init__(
        self, network: ShadowNetwork, initial: Tensor, *, before_block: tuple[int, Callable[[], Any]] | None = None
    ) -> None:
        self.network = network
        self._before_block = before_block
        self.initial = initial
        self._with_grad = torch.is_grad_enabled()
        self._states: dict[int, Tensor] = {-1: initial}
        # By block: the stream behind its last correction, which is that between its sublayers where there are such.
        self._stream: dict[int, Tensor] = {}
        # By block: its corrected input, for what happens within.
        self._inputs: dict[int, Tensor] = {}
        self._last_between = -1

    @property
    def goes_into_blocks(self) -> bool:
        """Whether attention needs the run too: :meth:`between` corrects what comes out of it."""
        return self.network.config.has_midpoints

    def step(self, block_index: int, h: Tensor) -> Tensor:
        """The corrected input of block ``block_index``; ``h`` is the previous block's output, [B, T, d].

        Raises:
            RuntimeError: gradients are switched off inside a call that started with them (re-entrant checkpointing).
            ValueError: state and hidden states differ in shape.
            AdapterError: the last block corrected nothing between its sublayers, as it was to.
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
        config = self.network.config
        if config.has_midpoints and self._last_between < block_index - 1:
            raise AdapterError(
                f"block {block_index - 1} ran without handing its keywords to its attention, so nothing was corrected behind "
                "it; use inject_between='blocks' on this base"
            )
        reads_branch = config.inject_branch and block_index >= max(config.first_block, 1)
        stream = self._stream[block_index - 1].to(h.device) if reads_branch else None
        corrected, state = self.network.step(block_index, h, previous.to(h.device), stream)
        # By the gradient of the stream, if only by the weights of the step: s(0) of a frozen shadow has none.
        self._states = _with(self._states, block_index, state, keep=corrected.requires_grad)
        if config.has_midpoints:
            self._inputs = _with(self._inputs, block_index, corrected)
        elif config.inject_branch:
            self._stream = _with(self._stream, block_index, corrected)
        if self._before_block is not None and self._before_block[0] == block_index:
            self._before_block[1]()
        return corrected

    def between(self, block_index: int, added: Tensor) -> Tensor:
        """What attention of block ``block_index`` is to add to the residual stream for the ``added`` [B, T, d] it did.

        Only for ``inject_between="sublayers"``: the correction of what goes into the MLP lies in it.
        """
        self._last_between = max(self._last_between, block_index)
        stream = self._inputs[block_index].to(added.device)
        h = stream + added
        corrected = self.network.step_between(block_index, h, self._states[block_index].to(added.device), stream)
        if self.network.config.inject_branch:
            self._stream = _with(self._stream, block_index, corrected)
        return added if corrected is h else added + (corrected.to(added.device) - h)


def _with(kept: dict[int, Tensor], block_index: int, tensor: Tensor, *, keep: bool | None = None) -> dict[int, Tensor]:
    """``kept`` with one more, or that one alone without gradients (``keep``: by those of ``tensor``)."""
    if tensor.requires_grad if keep is None else keep:
        kept.setdefault(block_index, tensor)
        return kept
    return {block_index: tensor}
