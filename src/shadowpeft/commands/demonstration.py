"""`shadowpeft demo`: the main job on the base and data that come with the package."""

from typing import Any

from rich.console import Console

from shadowpeft.commands.training import train
from shadowpeft.train.config import TrainConfig, merge, split_settings

# The main job in just under four minutes on two cores with nothing else to do; see LOG.md for what was tried.
DEMO: dict[str, Any] = {
    "base": "embedded",
    "task": "robot",
    "output": "runs/demo",
    "epochs": 3.0,
    "learning_rate": 4.5e-3,
    "batch_size": 16,
    "max_length": 64,
    "shadow": {"preset": "recommended"},
}


def demo(flags: dict[str, Any], console: Console) -> dict[str, Any] | None:
    """:func:`train` with the settings of the demonstration; ``flags`` that are not None override them."""
    settings, shadow = split_settings({name: value for name, value in flags.items() if value is not None})
    return train(TrainConfig.from_dict(merge(DEMO, {**settings, "shadow": shadow})), console)
