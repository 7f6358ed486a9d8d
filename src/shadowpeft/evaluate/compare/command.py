"""``shadowpeft compare``: plan, run, report."""

import tempfile
from pathlib import Path

from filelock import AcquireReturnProxy, FileLock, Timeout
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from shadowpeft.errors import ConfigError
from shadowpeft.evaluate.compare.estimate import Estimated, estimate, num_labels, times_of_results
from shadowpeft.evaluate.compare.gather import gather
from shadowpeft.evaluate.compare.measure import measure_steps
from shadowpeft.evaluate.compare.plan import cells_of, plan_cells
from shadowpeft.evaluate.compare.recipe import SEARCH, SECTIONS, known, read_recipe, unused_methods
from shadowpeft.evaluate.compare.report import write_report
from shadowpeft.evaluate.compare.runner import Counts, pending_cells, run_cells, worker_command
from shadowpeft.evaluate.compare.store import Store


def compare(
    recipe: Path,
    console: Console,
    *,
    output: Path | None = None,
    data_root: Path | None = None,
    workers: int = 1,
    threads: int = 1,
    timeout: float = 24 * 3600.0,
    sections: list[str] | None = None,
    plan: bool = False,
    measure: bool = False,
    retry_failed: bool = False,
    report_only: bool = False,
) -> Counts | list[Estimated]:
    """Runs what is not done yet and writes the report; with ``plan`` it only says what there is to do, with
    ``measure`` after timing some steps of every method on this machine.

    Returns:
        what was done, or the lines of the plan.

    Raises:
        ShadowPeftError: of any kind, before the first cell.
    """
    read, text = read_recipe(recipe), recipe.read_bytes()
    known({SEARCH: None, **SECTIONS}, sections or (), "section")
    if workers < 1 or threads < 1:
        raise ConfigError(f"workers={workers} and threads={threads} must both be at least 1")
    if data_root is not None and not data_root.is_dir():
        raise ConfigError(f"there is no folder {data_root}; --data-root is where the recipe's relative paths start")
    if unused := unused_methods(read):
        console.print(f"in no section of the recipe, so never run: {', '.join(unused)}", markup=False)
    output = Path("runs") / read.name if output is None else output
    if plan or measure:
        store = Store(recipe=read, output=output, data_root=data_root)
        return show_plan(store, console, sections, measure=measure)
    counts = Counts()
    if not report_only:
        with _alone_in(output), tempfile.TemporaryDirectory() as folder:
            cells = pending_cells(read, output, retry_failed=retry_failed, sections=sections)
            console.print(f"{len(cells)} of {len(plan_cells(read))} cells to run, results in {output}")
            # Workers read the recipe as it is now, whatever becomes of the file while they run.
            own = Path(folder) / recipe.name
            own.write_bytes(text)
            counts = run_cells(
                read,
                cells,
                output,
                worker_command(own, output.resolve(), None if data_root is None else data_root.resolve()),
                workers=workers,
                threads=threads,
                timeout=timeout,
                tell=lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True),
            )
    gathered = write_report(read, output)
    console.print(
        f"{len(gathered.results)} cells done, {len(gathered.failed)} failed, {len(gathered.missing)} missing; "
        f"report: {output / 'report.md'}, {output / 'report.html'}"
    )
    set_apart = sum(result["status"] == "done" for _, result in gathered.failed)
    if set_apart:
        console.print(f"{set_apart} of the failed were made of other data than the rest; the report says which file to delete")
    if len(gathered.failed) > set_apart:
        console.print("run again with --retry-failed to try the failed ones again")
    return counts


def _alone_in(output: Path) -> AcquireReturnProxy:
    """Holds a folder of results, or refuses: two runs in it would make the same searches and overwrite each other's choice."""
    output.mkdir(parents=True, exist_ok=True)
    try:
        return FileLock(output / ".lock").acquire(timeout=0)
    except Timeout as error:
        raise ConfigError(
            f"another comparison is running in {output}: wait until it is done, and give it more --workers for more at a time"
        ) from error


def show_plan(store: Store, console: Console, sections: list[str] | None, *, measure: bool) -> list[Estimated]:
    """Prints cells, sizes, memory and hours."""
    recipe = store.recipe
    cells = cells_of(recipe, sections)
    gathered = gather(recipe, store.output)
    times = times_of_results(gathered, f"the results in {store.output}")
    if measure:
        measured = measure_steps(cells, store, {name: num_labels(name, store) for name in {cell.task for cell in cells}})
        times |= measured
        for key, time in measured.items():
            console.print(f"{', '.join(key)}: {time.seconds:.4f} s a step", markup=False)
    lines = estimate(cells, store, times, {cell.id for cell in gathered.missing})
    table = Table(title=f"{recipe.name}: {len(cells)} cells")
    for heading in ("section", "base", "task", "method", "variant"):
        table.add_column(heading, overflow="fold")  # a name or number that is cut off is no use
    for heading in ("cells", "left", "trained parameters", "of budget", "steps", "GiB", "hours"):
        table.add_column(heading, justify="right", overflow="fold")
    for line in lines:
        table.add_row(line.section, line.base, line.task, line.method, line.variant, *_numbers(line))
    if not console.is_terminal:  # a file or a pipe: one line a row, however long
        options = console.options.update(max_width=10_000)
        console.width = max(console.width, Measurement.get(console, options, table).maximum)
    console.print(table)
    for problem in dict.fromkeys(line.problem for line in lines if line.problem):
        console.print(f"problem: {problem}", markup=False, soft_wrap=True)
    console.print(_hours_said(lines), markup=False, soft_wrap=True)
    return lines


def _hours_said(lines: list[Estimated]) -> str:
    timed = [(line.hours, line.left / line.cells) for line in lines if line.hours is not None]
    sources = sorted({line.source for line in lines if line.source})
    said = []
    if sources:
        whole, left = sum(hours for hours, _ in timed), sum(hours * share for hours, share in timed)
        said.append(
            f"training, without scoring: {whole:,.1f} hours, {left:,.1f} of them left, by step times measured on "
            f"{', '.join(sources)}"
        )
    unknown = sum(line.hours is None and line.section != "latency" for line in lines)
    if unknown:
        said.append(f"not counted: {unknown} lines without a measured step time (bases: step_seconds)")
    return "; ".join(said)


def _numbers(line: Estimated) -> list[str]:
    sized = line.sized
    share = "" if sized is None or not sized.target else f"{100 * sized.trainable / sized.target:.2f}%"
    return [
        f"{line.cells}",
        f"{line.left}",
        "?" if sized is None else f"{sized.trainable:,}",
        share,
        "?" if line.steps is None else f"{line.steps:,}",
        "?" if line.memory_gib is None else f"{line.memory_gib:.1f}",
        "?" if line.hours is None else f"{line.hours:.2f}",
    ]
