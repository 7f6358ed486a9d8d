"""Run folders and the checkpoints in them."""

import json
from pathlib import Path
from typing import Any

import yaml

from shadowpeft.errors import ConfigError
from shadowpeft.files import STAGING_PREFIX, contents, write_files
from shadowpeft.model.checkpoint import CONFIG_FILE, WEIGHTS_FILE

ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE)
RUN_FILE = "config.yaml"
# A checkpoint is renamed into place when all of it is written. Copies may still be cut off: one without these was.
# The optimizer's is a folder or another file where it was sharded.
_COMPLETE = ("optimizer*", "scheduler.pt", "rng_state*.pth", "trainer_state.json")


def newest_checkpoint(folder: Path, weights: tuple[str, ...] = ADAPTER_FILES) -> Path | None:
    """The newest complete checkpoint below ``folder``; cut-off ones are passed over. ``weights``: the model's files."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.split("-")[1].isdigit()]
    complete = [path for path in found if all(any(path.glob(name)) for name in (*weights, *_COMPLETE)) and _is_json(path)]
    return max(complete, key=lambda path: int(path.name.split("-")[1]), default=None)


def _is_json(checkpoint: Path) -> bool:
    """Whether the trainer's state, which it writes last, is there to its end."""
    try:
        return isinstance(json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8")), dict)
    except ValueError:
        return False


def check_run_folder(folder: Path, *, resume: bool, weights: tuple[str, ...] = ADAPTER_FILES) -> Path | None:
    """Whether a run may write here; returns the checkpoint to resume from, if asked for. Changes nothing.

    None with ``resume`` means from the first step: the run was cut off before its first checkpoint.

    Raises:
        ConfigError: the folder holds something and ``resume`` is off, or there is no run to resume.
    """
    is_used = any(not path.name.startswith(STAGING_PREFIX) for path in contents(folder))
    if is_used and not resume:
        raise ConfigError(f"the output folder {folder} is not empty; choose another, or pass --resume to go on in it")
    if resume and not (folder / RUN_FILE).is_file():
        raise ConfigError(f"nothing to resume in {folder}: no run was started there; start without --resume")
    return newest_checkpoint(folder / "checkpoints", weights) if resume else None


def write_run_file(folder: Path, settings: dict[str, Any]) -> None:
    """Writes the file from which the same run can be started or, with ``--resume``, gone on with."""
    text = yaml.safe_dump(settings, sort_keys=False)
    write_files(folder, lambda staging: (staging / RUN_FILE).write_text(text, encoding="utf-8"))
