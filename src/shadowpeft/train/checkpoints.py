"""Run folders and the checkpoints in them."""

import json
from pathlib import Path
from typing import Any

import yaml

from shadowpeft.errors import ConfigError
from shadowpeft.files import STAGING_PREFIX, contents, write_files
from shadowpeft.model.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from shadowpeft.train.config import TrainConfig, read_yaml
from shadowpeft.train.pretrain_config import PretrainConfig

RunConfig = TrainConfig | PretrainConfig

ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE)
RUN_FILE = "config.yaml"
# Settings that may differ when a run goes on: where it is, what it says, and what changes no number.
FREE = {"output", "resume", "log_every", "save_every", "report_to", "eval_batch_size", "limit_eval", "gradient_checkpointing"}
# A checkpoint is renamed into place when all of it is written. Copies may still be cut off: one without these was.
# The optimizer's is a folder or another file where it was sharded, and DeepSpeed's own folder has the scheduler's too.
_COMPLETE = ("rng_state*.pth", "trainer_state.json")
_OPTIMIZER = (("optimizer*", "scheduler.pt"), ("global_step*", "latest"))


def newest_checkpoint(folder: Path, weights: tuple[str, ...] = ADAPTER_FILES) -> Path | None:
    """The newest complete checkpoint below ``folder``; cut-off ones are passed over. ``weights``: the model's files."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.split("-")[1].isdigit()]
    complete = [path for path in found if _is_complete(path, weights)]
    return max(complete, key=lambda path: int(path.name.split("-")[1]), default=None)


def _is_complete(checkpoint: Path, weights: tuple[str, ...]) -> bool:
    has_optimizer = any(_has(checkpoint, names) for names in _OPTIMIZER)
    return has_optimizer and _has(checkpoint, (*weights, *_COMPLETE)) and _is_json(checkpoint)


def _has(checkpoint: Path, names: tuple[str, ...]) -> bool:
    return all(any(checkpoint.glob(name)) for name in names)


def _is_json(checkpoint: Path) -> bool:
    """Whether the trainer's state, which it writes last, is there to its end."""
    try:
        return isinstance(json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8")), dict)
    except ValueError:
        return False


def check_run_folder(
    folder: Path, config: RunConfig, *, weights: tuple[str, ...] = ADAPTER_FILES, num_processes: int = 1
) -> Path | None:
    """Whether a run may write here; returns the checkpoint to resume from, if ``config.resume`` is on. Changes nothing.

    None with ``resume`` means from the first step: the run was cut off before its first checkpoint.

    Raises:
        ConfigError: the folder holds something and ``resume`` is off; there is no run to resume; or its settings, or the
            number of its processes, were others.
    """
    is_used = any(not path.name.startswith(STAGING_PREFIX) for path in contents(folder))
    if is_used and not config.resume:
        raise ConfigError(f"the output folder {folder} is not empty; choose another, or pass --resume to go on in it")
    if not config.resume:
        return None
    if not (folder / RUN_FILE).is_file():
        raise ConfigError(f"nothing to resume in {folder}: no run was started there; start without --resume")
    _check_same_run(folder, config)
    checkpoint = newest_checkpoint(folder / "checkpoints", weights)
    if checkpoint is not None:
        _check_num_processes(checkpoint, num_processes)
    return checkpoint


def _check_num_processes(checkpoint: Path, num_processes: int) -> None:
    """As many as the checkpoint has random states: with fewer, a step has fewer rows, and the schedule is stretched.

    Raises:
        ConfigError: the run had another number of them.
    """
    begun = len(list(checkpoint.glob("rng_state*.pth")))
    if begun != num_processes:
        raise ConfigError(
            f"{checkpoint} was written by {begun} process{'es' * (begun > 1)}, and this is a run of {num_processes}, whose "
            f"steps have other rows; start it as before (accelerate launch --num_processes {begun} ...), or another run in "
            "another folder"
        )


def _check_same_run(folder: Path, config: RunConfig) -> None:
    """Whether ``config`` is that of the run in ``folder``: one that goes on with other rows, rates or seeds is no run.

    Raises:
        ConfigError: settings differ that decide what is learnt; the first of them is named.
    """
    settings, begun = (_flat(each) for each in (config, type(config).from_dict(read_yaml(folder / RUN_FILE))))
    for name, value in settings.items():
        if name not in FREE and value != begun[name]:
            raise ConfigError(
                f"the run in {folder} was started with {name}={begun[name]!r}, not {value!r}; go on with its own settings, "
                f"--config {folder / RUN_FILE} --resume, or start another run in another folder"
            )


def _flat(config: RunConfig) -> dict[str, Any]:
    """All settings by name, an adapter's own among them."""
    settings = config.to_dict()
    return settings | settings.pop("shadow") if isinstance(config, TrainConfig) else settings


def write_run_file(folder: Path, config: RunConfig) -> None:
    """Writes the file from which the same run can be started or, with ``--resume``, gone on with."""
    text = yaml.safe_dump({**config.to_dict(), "resume": False}, sort_keys=False)
    write_files(folder, lambda staging: (staging / RUN_FILE).write_text(text, encoding="utf-8"))
