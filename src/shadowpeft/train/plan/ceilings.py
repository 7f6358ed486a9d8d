"""How fast a device computes and moves numbers, and what that leaves of a step's time at best."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from shadowpeft.train.plan.trace import StepTrace

ROUNDS = 5


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """Floating point operations and bytes (read and written) a second of one device.

    Attributes:
        source: ``measured here`` or ``given``.
    """

    flops: float
    bandwidth: float | None
    source: str

    def step_seconds(self, step: StepTrace) -> float:
        """Each operation at the slower of its two ceilings, one after the other. No real step is faster but by fusing."""
        if self.bandwidth is None:
            return step.flops / self.flops
        return sum(max(flops / self.flops, moved / self.bandwidth) for flops, moved in step.operations)


def measured_ceilings(dtype: torch.dtype, *, size: int = 2048, device: str | None = None) -> Ceilings:
    """The best of some products of two square matrices, and of some copies of memory, on this machine.

    Args:
        dtype: of the base.
        size: rows of the matrices; larger ones come nearer to what a GPU can do.
        device: default: the GPU if there is one.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    source = torch.zeros(16 * size * size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Ceilings(
        flops=2 * size**3 / _best(lambda: torch.mm(left, right, out=out), device),
        bandwidth=2 * source.numel() / _best(lambda: target.copy_(source), device),
        source="measured here",
    )


def _best(work: Callable[[], Tensor], device: str) -> float:
    """Seconds of the fastest round, behind one that warms up."""
    seconds = []
    for _ in range(ROUNDS + 1):
        _wait(device)
        started = time.perf_counter()
        work()
        _wait(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
