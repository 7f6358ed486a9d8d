"""The state of one forward pass."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shadowpeft.core.network import ShadowNetwork
from shadowpeft.errors import AdapterError


class ShadowRun:
    """The shadow state of one call, handed to every block as a keyword; nothing of it is kept on a module.

    The state in front of every block that gradient checkpointing can recompute is kept, so that the block sees what
    it saw the first time; in front of others only the newest state is. The same goes for the residual stream behind
    corrections, where the config asks what was added to it since, or corrects it between sublayers. Only the newest
    tensors are kept with their graphs: checkpoints may hold the run, and graphs hold checkpoints.

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
    def corrects_between(self) -> bool:
        """Whether attention needs the run too: :meth:`between` corrects what comes out of it."""
        return self.network.config.has_midpoints

    def step(self, block_index: int, h: Tensor) -> Tensor:
        """The corrected input of block ``block_index``; ``h`` is the previous block's output, [B, T, d].

        Raises:
            RuntimeError: gradients are switched off inside a call that started with them (re-entrant checkpointing).
            ValueError: state and hidden states differ in shape.
            AdapterError: as :meth:`check`, of the block in front.
        """
        self._refuse_reentrant()
        previous = self._states[block_index - 1]
        if previous.shape != h.shape:
            raise ValueError(
                f"the shadow state has shape {tuple(previous.shape)} but block {block_index} receives "
                f"{tuple(h.shape)}: both paths must see the same tokens (pass the same cache to every call)"
            )
        self.check(block_index)
        config = self.network.config
        reads_branch = config.inject_branch and block_index >= max(config.first_block, 1)
        added = h - self._stream[block_index - 1].to(h.device) if reads_branch else None
        corrected, state = self.network.step(block_index, h, previous.to(h.device), added)
        # By the weights of a step, if by nothing else: s(0) of a frozen shadow has no gradient, nor may h have one.
        again = corrected.requires_grad or (self._with_grad and self.network.midpoint(block_index) is not None)
        self._states = _with(self._states, block_index, state, again)
        if config.has_midpoints:
            self._inputs = _with(self._inputs, block_index, corrected, again)
        elif config.inject_branch:
            self._stream = _with(self._stream, block_index, corrected, again)
        if self._before_block is not None and self._before_block[0] == block_index:
            self._before_block[1]()
        return corrected

    def between(self, block_index: int, added: Tensor) -> Tensor:
        """What attention of block ``block_index`` is to add to the residual stream for the ``added`` [B, T, d] it did.

        Only for ``inject_between="sublayers"``: the correction of what goes into the MLP lies in it.

        Raises:
            RuntimeError: as :meth:`step`.
        """
        self._refuse_reentrant()
        self._last_between = max(self._last_between, block_index)
        stream = self._inputs[block_index].to(added.device)
        h = stream + added
        corrected = self.network.step_between(block_index, h, self._states[block_index].to(added.device), added)
        if corrected is not h:
            added = added + (corrected.to(added.device) - h)
        if self.network.config.inject_branch:
            # As the block adds it, so that what is added behind it is told from it to the last digit.
            stream = stream + added
            self._stream = _with(self._stream, block_index, stream, stream.requires_grad)
        return added

    def check(self, num_blocks: int) -> None:
        """Refuses that the last of the first ``num_blocks`` blocks corrected nothing between its sublayers, as it was to.

        Raises:
            AdapterError: so it is.
        """
        if self.network.config.has_midpoints and self._last_between < num_blocks - 1:
            raise AdapterError(
                f"block {num_blocks - 1} ran without handing its keywords to its attention, so nothing was corrected behind "
                "it; use inject_between='blocks' on this base"
            )

    def release(self) -> None:
        """Lets go of graphs, behind the last block; blocks can still be recomputed."""
        if self._with_grad and not torch.compiler.is_compiling():
            self._states = {index: tensor if index < 0 else _value(tensor) for index, tensor in self._states.items()}
            self._inputs = {index: _value(tensor) for index, tensor in self._inputs.items()}
            self._stream = {index: _value(tensor) for index, tensor in self._stream.items()}

    def _refuse_reentrant(self) -> None:
        if self._with_grad and not torch.is_grad_enabled():
            raise RuntimeError(
                "re-entrant gradient checkpointing would lose the gradient of the shadow state; call "
                'gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})'
            )


def _with(kept: dict[int, Tensor], block_index: int, tensor: Tensor, again: bool) -> dict[int, Tensor]:
    """``kept`` with one more if its block can be run ``again``, else that one alone."""
    if not again:
        return {block_index: tensor}
    if block_index in kept:  # of the first time
        return kept
    older = kept if torch.compiler.is_compiling() else {index: _value(one) for index, one in kept.items()}
    return {**older, block_index: tensor}


def _value(tensor: Tensor) -> Tensor:
    """A tensor without what made it; a recomputed block records the same of it."""
    return tensor if tensor.grad_fn is None else tensor.detach().requires_grad_()
