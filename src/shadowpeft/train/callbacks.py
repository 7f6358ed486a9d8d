"""What a person sees of a run, and what stays of it: a progress line, metrics as JSON lines, a clean stop."""

import json
import signal
import threading
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from shadowpeft.files import save_errors, write_files


class ProgressLine(TrainerCallback):
    """A bar with loss, shadow loss, tokens a second and time left."""

    def __init__(self, console: Console, *, tokens_per_step: float) -> None:
        self._tokens_per_step = tokens_per_step
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeRemainingColumn(),
            console=console,
        )

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._task = self._progress.add_task("training", total=state.max_steps, completed=state.global_step, shown="")
        self._started, self._first_step = time.monotonic(), state.global_step
        self._progress.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._progress.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        speed = (state.global_step - self._first_step) * self._tokens_per_step / (time.monotonic() - self._started)
        shadow = f"  shadow {float(logs['shadow_loss']):.3f}" if "shadow_loss" in logs else ""
        shown = f"loss {float(logs['loss']):.3f}{shadow}  {speed:,.0f} tokens/s"
        self._progress.update(self._task, shown=shown)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Gives the terminal back. transformers ends no callback of a run that an error ended."""
        self._progress.stop()


class AskedIntervals(TrainerCallback):
    """A resumed run logs, evaluates and saves as often as it is asked to now. transformers keeps to what it was begun with."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        state.compute_steps(args, state.max_steps)


class MetricLines(TrainerCallback):
    """Appends every log of the trainer to ``metrics.jsonl``, with the seconds of the run, all of its parts together."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._before, self._started = 0.0, time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the run began, without the time between its parts."""
        return self._before + time.monotonic() - self._started

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """A resumed run takes the lines behind its checkpoint out: those steps are run again."""
        self._before, self._started = 0.0, time.monotonic()
        if state.is_world_process_zero and self._path.is_file():
            lines = self._path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if is_kept(line, state.global_step)]
            self._before = json.loads(kept[-1]).get("seconds", 0.0) if kept else 0.0
            text = "".join(f"{line}\n" for line in kept)
            write_files(self._path.parent, lambda staging: (staging / self._path.name).write_text(text, "utf-8"))

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        what, way_out = f"could not write to {self._path}", "free some space, then go on with --resume"
        with save_errors(what, way_out), self._path.open("a", encoding="utf-8") as lines:
            begun = {"step": state.global_step, "epoch": state.epoch, "seconds": round(self.seconds, 1)}
            lines.write(json.dumps({**begun, **(logs or {})}) + "\n")


def is_kept(line: str, step: int) -> bool:
    """Whether a metrics line is whole, not past ``step`` and not the summary of an ended run."""
    try:
        entry = json.loads(line)
    except ValueError:
        return False
    return entry["step"] <= step and "train_runtime" not in entry


class StopOnInterrupt(TrainerCallback):
    """Ctrl-C ends the run behind the current step, with a checkpoint; a second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self.stopped = False
        self._previous: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if threading.current_thread() is threading.main_thread():  # no other may set a handler, and none gets a Ctrl-C
            self._previous = signal.signal(signal.SIGINT, self._note)

    def _note(self, number: int, frame: Any) -> None:
        self.stopped = True
        signal.signal(signal.SIGINT, self._previous)

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        if self.stopped:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Ctrl-C means again what it meant before the run, also where an error ended it."""
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
