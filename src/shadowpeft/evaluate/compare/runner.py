"""Running all cells on several processes; what is done stays done, and what crashed is on record."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from shadowpeft.evaluate.compare.plan import Cell, cells_of, fingerprint, plan_cells
from shadowpeft.evaluate.compare.recipe import Recipe
from shadowpeft.evaluate.compare.results import current_result, read_result, write_failed

LOGS = "logs"
Tell = Callable[[str], None]


@dataclass(kw_only=True)
class Counts:
    """How many cells are done, failed and not begun after a run."""

    done: int = 0
    failed: int = 0
    skipped: int = 0


@dataclass(kw_only=True)
class Queue:
    """Cells still to run. A cell is handed out when every search it needs is done; latencies are timed with nothing beside."""

    pending: list[Cell]
    running: dict[str, Cell] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def take(self) -> Cell | None:
        """The first cell that can run, waiting for searches under way; None when there is nothing left.

        A cell whose search failed is handed out too; whoever takes it sees that from :meth:`blocker`.
        """
        with self.changed:
            while self.pending:
                cell = self._next()
                if cell is not None:
                    self.pending.remove(cell)
                    self.running[cell.id] = cell
                    return cell
                self.changed.wait()
            return None

    def _next(self) -> Cell | None:
        if any(cell.section == "latency" for cell in self.running.values()):
            return None
        unfinished = {cell.id for cell in self.pending} | self.running.keys()
        ready = (cell for cell in self.pending if not unfinished.intersection(cell.needs))
        return next((cell for cell in ready if cell.section != "latency" or not self.running), None)

    def blocker(self, cell: Cell) -> str | None:
        return next((needed for needed in cell.needs if needed in self.failed), None)

    def finish(self, cell: Cell, *, is_failed: bool) -> None:
        with self.changed:
            self.running.pop(cell.id, None)
            if is_failed:
                self.failed.add(cell.id)
            self.changed.notify_all()

    def clear(self) -> None:
        with self.changed:
            self.pending.clear()
            self.changed.notify_all()


def _ended(process: subprocess.Popen[str]) -> int:
    """How a process that has said its last ends: by itself in a moment, else it is killed."""
    try:
        return process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


class Worker:
    """One child process; see :mod:`shadowpeft.evaluate.compare.worker`. It is started when a cell first needs it."""

    def __init__(self, command: list[str], log: Path, *, threads: int, timeout: float, device: str | None = None) -> None:
        self._command, self._log, self._timeout = command, log, timeout
        self._environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        if device is not None:
            self._environment["CUDA_VISIBLE_DEVICES"] = device
        self._process: subprocess.Popen[str] | None = None

    def run(self, cell: Cell) -> str | None:
        """None when the cell is done, else why it is not; the process is gone then."""
        if self._process is None:
            self._start()
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        started = time.monotonic()  # before the watch, or a process that it stops would seem to have died early
        watch = threading.Timer(self._timeout, process.kill)
        watch.start()
        try:
            process.stdin.write(cell.id + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        finally:
            watch.cancel()
        if answer.strip() == f"done {cell.id}":
            return None
        self._process = None
        code = _ended(process)
        _close(process)
        said = self._log.read_text(encoding="utf-8", errors="replace") or "the process said nothing"
        if time.monotonic() - started >= self._timeout:
            return f"{said}\nstopped after {self._timeout:.0f} s, the limit for one cell"
        # A traceback says why in its last line; a process that was killed leaves none.
        return said if code == 1 else f"{said}\nthe process ended with code {code}"

    def _start(self) -> None:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=self._environment,
            )

    def stop(self) -> None:
        """Ends the process at once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            _close(self._process)

    def close(self) -> None:
        """Lets the process end by itself."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            self._process.wait()
            _close(self._process)


def _close(process: subprocess.Popen[str]) -> None:
    """Closes both pipes of a process that has ended; what it never read is dropped."""
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(BrokenPipeError):
                pipe.close()


def devices_of(workers: int) -> list[str | None]:
    """The accelerator of each worker, in turn; None where there is none.

    A process that saw several would train on all of them at once, with as many times the rows a step.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [f"{index}" for index in range(torch.cuda.device_count())]
    if visible is not None:
        names = [name.strip() for name in visible.split(",") if name.strip()][: len(names)]
    return [names[index % len(names)] if names else None for index in range(workers)]


def pending_cells(recipe: Recipe, output: Path, *, retry_failed: bool, sections: list[str] | None = None) -> list[Cell]:
    """Cells without a current result; with ``sections`` only of these, and what they need."""

    def is_left(result: dict[str, Any] | None) -> bool:
        return result is None or (retry_failed and result["status"] == "failed")

    return [cell for cell in cells_of(recipe, sections) if is_left(current_result(recipe, output, cell))]


def run_cells(
    recipe: Recipe,
    cells: list[Cell],
    output: Path,
    command: list[str],
    *,
    workers: int,
    threads: int,
    timeout: float,
    tell: Tell,
) -> Counts:
    """Runs ``cells``, each in one of ``workers`` processes; results are in ``output`` as soon as they are there.

    A process that dies costs its cell alone: that is written down as failed, with the last lines of its log, and a new
    process takes the next one. Ctrl-C ends the processes; cells that were under way are run again next time.

    Raises:
        SaveError: a failure could not be written down.
        OSError: a process could not be started.
        In both cases what was done before is kept, and what was under way is run again next time.
    """
    failed_before = {
        cell.id for cell in plan_cells(recipe)
        if (read_result(output, cell.id) or {}).get("status") == "failed" and cell not in cells
    }  # fmt: skip
    queue = Queue(pending=list(cells), failed=failed_before)
    counts, lock = Counts(), threading.Lock()
    crew = [
        Worker(command, output / LOGS / f"worker-{index}.log", threads=threads, timeout=timeout, device=device)
        for index, device in enumerate(devices_of(workers))
    ]
    stopped = threading.Event()

    def work(worker: Worker) -> None:
        is_complete = False
        try:
            while (cell := queue.take()) is not None and not stopped.is_set():
                run_one(cell, worker)
            is_complete = True
        finally:
            if is_complete and not stopped.is_set():
                worker.close()
            else:  # a full disk, no memory for a process: the others end too, instead of waiting for this cell
                queue.clear()
                worker.stop()

    def run_one(cell: Cell, worker: Worker) -> None:
        blocker = queue.blocker(cell)
        started = time.monotonic()
        reason = f"not run: {blocker} failed" if blocker else worker.run(cell)
        if stopped.is_set():
            return
        if reason is not None:
            write_failed(output, cell, fingerprint(recipe, cell), reason)
        queue.finish(cell, is_failed=reason is not None)
        with lock:
            counts.failed += reason is not None
            counts.done += reason is None
            number = counts.failed + counts.done
        state = "done" if reason is None else f"FAILED: {reason.strip().splitlines()[-1]}"
        tell(f"[{number}/{len(cells)}] {cell.id}: {state} ({time.monotonic() - started:.0f} s)")

    with ThreadPoolExecutor(workers) as pool:
        runs = [pool.submit(work, worker) for worker in crew]
        try:
            wait(runs)
        except KeyboardInterrupt:
            stopped.set()
            queue.clear()
            for worker in crew:
                worker.stop()
    for run in runs:
        run.result()
    counts.skipped = len(cells) - counts.done - counts.failed
    return counts


def worker_command(recipe: Path, output: Path, data_root: Path | None) -> list[str]:
    root = [] if data_root is None else ["--data-root", str(data_root)]
    return [sys.executable, "-m", "shadowpeft.evaluate.compare.worker", str(recipe), str(output), *root]
