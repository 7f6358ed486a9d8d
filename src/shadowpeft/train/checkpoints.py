"""Run folders and the checkpoints in them."""

import json
from pathlib import Path

from shadowpeft.errors import ConfigError
from shadowpeft.model.checkpoint import CONFIG_FILE, WEIGHTS_FILE

ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE)
# What the trainer writes last; a checkpoint without one of these was cut off.
_COMPLETE = ("optimizer.pt", "scheduler.pt", "trainer_state.json")


def newest_checkpoint(folder: Path, weights: tuple[str, ...] = ADAPTER_FILES) -> Path | None:
    """The newest complete checkpoint below ``folder``; cut-off ones are passed over. ``weights``: the model's files."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.split("-")[1].isdigit()]
    complete = [path for path in found if all((path / name).is_file() for name in (*weights, *_COMPLETE)) and _is_json(path)]
    return max(complete, key=lambda path: int(path.name.split("-")[1]), default=None)


def _is_json(checkpoint: Path) -> bool:
    """Whether the trainer's state, which it writes last, is there to its end."""
    try:
        return isinstance(json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8")), dict)
    except ValueError:
        return False


def check_run_folder(folder: Path, *, resume: bool, weights: tuple[str, ...] = ADAPTER_FILES) -> Path | None:
    """Whether a run may write here; returns the checkpoint to resume from, if asked for. Changes nothing.

    Raises:
        ConfigError: the folder holds something and ``resume`` is off, or there is nothing to resume.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; choose another output folder")
    is_used = folder.is_dir() and any(folder.iterdir())
    if is_used and not resume:
        raise ConfigError(f"the output folder {folder} is not empty; choose another, or pass --resume to go on in it")
    checkpoint = newest_checkpoint(folder / "checkpoints", weights)
    if resume and checkpoint is None:
        raise ConfigError(f"nothing to resume in {folder}: it holds no complete checkpoint; start without --resume")
    return checkpoint
