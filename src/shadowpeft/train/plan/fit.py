"""The largest batch that fits, and how to spread a training over devices."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from shadowpeft.train.plan.trace import StepTrace

MOST_ROWS = 2**16
Kind = Literal["single", "ddp", "sharded"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What each process holds.

    Attributes:
        kind: ``single`` (one process), ``ddp`` (each holds everything) or ``sharded`` (FSDP2).
        processes: their number.
        block_bytes: of every block, the units that sharding gathers one after the other.
    """

    kind: Kind
    processes: int
    block_bytes: tuple[int, ...]

    def per_process(self, step: StepTrace) -> int:
        """Peak bytes of one process.

        A single process: as traced. DDP adds a bucket for every gradient. Under sharding weights, gradients and states
        are cut into equal shares; gathered are all weights outside the blocks, and two blocks: the one that computes and
        the next. The last two are arithmetic on the trace, not a trace of several processes.
        """
        if self.kind == "single":
            return step.peak
        if self.kind == "ddp":
            return step.peak + step.gradients
        held = step.base + step.adapter + step.optimizer + step.gradients
        outside = step.base + step.adapter - sum(self.block_bytes)
        pair = sum(sorted(self.block_bytes)[-2:])
        traced = step.peak + (0 if step.worst_phase == "backward" or step.shape.accumulates else step.gradients)
        return traced - held + -(-held // self.processes) + outside + pair


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A layout and the most rows a process can take in it; 0: not even one."""

    layout: Layout
    batch: int


def largest_batch(fits: Callable[[int], bool], guess: int = 1) -> int:
    """The largest number of rows that fits, 0 if one does not; memory must not fall as rows are added.

    Exact: the result was tried, and so was one more (up to ``MOST_ROWS``).

    Args:
        guess: where to look first; a good one saves most of the tries.
    """
    if not fits(1):
        return 0
    low, high, step = 1, MOST_ROWS + 1, 1
    probe = min(max(guess, 2), MOST_ROWS)
    while high - low > 1:
        # Away from the guess in growing steps; by halves where they leave what is still open.
        if fits(probe):
            low, probe = probe, probe + step
        else:
            high, probe = probe, probe - step
        step *= 2
        if not low < probe < high:
            probe = (low + high) // 2
    return low


def choose(
    trace: Callable[[int], StepTrace], *, processes: int, memory: int, block_bytes: list[int]
) -> tuple[Fit, list[Layout]]:
    """(the layout to use with its largest batch, all that were considered).

    Sharding is for bases that do not fit on one device: each process then waits for the others' shares in every block.

    Args:
        trace: rows of a process -> a traced step.
        memory: bytes that tensors may take on each device.
    """
    kinds: tuple[Kind, ...] = ("single",) if processes == 1 else ("ddp", "sharded")
    layouts = [Layout(kind=kind, processes=processes, block_bytes=tuple(block_bytes)) for kind in kinds]
    for layout in layouts:
        if layout.per_process(trace(1)) <= memory or layout is layouts[-1]:
            return Fit(layout=layout, batch=_rows(trace, layout, memory)), layouts
    raise AssertionError("the last layout is always taken")


def _rows(trace: Callable[[int], StepTrace], layout: Layout, memory: int) -> int:
    def fits(rows: int) -> bool:
        return layout.per_process(trace(rows)) <= memory

    if not fits(1):
        return 0
    one, two = (layout.per_process(trace(rows)) for rows in (1, 2))
    a_row = max(two - one, 1)
    guess = 1 + (memory - one) // a_row
    if 2 < guess <= MOST_ROWS:
        # What a row takes settles once the chunks of the losses are full.
        a_row = max((layout.per_process(trace(guess)) - one) // (guess - 1), 1)
        guess = 1 + (memory - one) // a_row
    return largest_batch(fits, guess)
