"""What a person sees while models are scored."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


@contextmanager
def scoring_bars(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Yields what to call with (mode, prompts done, prompts in all); each mode has a bar with the time left."""
    bars = Progress(
        TextColumn("scoring {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("prompts"),
        TimeRemainingColumn(),
        console=console,
    )
    tasks: dict[str, TaskID] = {}

    def show(mode: str, done: int, total: int) -> None:
        if mode not in tasks:
            tasks[mode] = bars.add_task(mode, total=total)
        bars.update(tasks[mode], completed=done)

    with bars:
        yield show
