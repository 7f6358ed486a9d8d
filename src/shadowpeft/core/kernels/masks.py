"""Dropout masks that can be drawn a second time, so that none has to be stored.

The first draw uses torch's own generator of the device: seeds, gradient checkpointing with
``preserve_rng_state`` and resumed runs reproduce it, and on a CPU it is the very draw of ``F.dropout``. What is
kept is the state of that generator in front of the step (5 KB on a CPU, 16 bytes on an NVIDIA GPU).
"""

import torch
from torch import Tensor

# Device types with one torch.Generator a device that can be read and copied.
DEVICE_TYPES = ("cpu", "cuda")


class Masks:
    """Draws the masks of one step in a fixed order: transform first, then injection.

    Args:
        device: where they are needed.
        state: what an earlier :attr:`state` returned, to draw the same masks again without touching torch's generator.
    """

    __slots__ = ("_device", "_generator", "state")

    def __init__(self, device: torch.device, state: Tensor | None = None) -> None:
        self._device = device
        if state is None:
            self._generator = _default_generator(device)
            self.state = self._generator.get_state()
        else:
            self._generator = torch.Generator(device)
            self._generator.set_state(state)
            self.state = state

    def draw(self, shape: torch.Size, dropout: float, dtype: torch.dtype) -> Tensor:
        """A mask with entries 0 and 1 / (1 - dropout)."""
        mask = torch.empty(shape, dtype=dtype, device=self._device)
        return mask.bernoulli_(1 - dropout, generator=self._generator).div_(1 - dropout)


def _default_generator(device: torch.device) -> torch.Generator:
    if device.type == "cpu":
        return torch.default_generator
    assert device.type == "cuda", device
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.cuda.default_generators[index]
