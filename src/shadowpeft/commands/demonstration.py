"""`shadowpeft demo`: the main job on the base and data that come with the package."""

import dataclasses
from typing import Any

from rich.console import Console

from shadowpeft.commands.training import train
from shadowpeft.train.config import TrainConfig

# The main job in about three minutes on two cores; see LOG.md for what was tried.
DEMO = {
    "base": "embedded",
    "task": "robot",
    "output": "runs/demo",
    "epochs": 3.0,
    "learning_rate": 1.5e-3,
    "batch_size": 16,
    "max_length": 64,
    "shadow": {"preset": "recommended"},
}


def demo(flags: dict[str, Any], console: Console) -> dict[str, Any] | None:
    """:func:`train` with the settings of the demonstration; ``flags`` that are not None override them."""
    given = {name: value for name, value in flags.items() if value is not None}
    shadow_names = {item.name for item in dataclasses.fields(TrainConfig().shadow)}
    settings = {**DEMO, **{name: value for name, value in given.items() if name not in shadow_names}}
    settings["shadow"] = {**DEMO["shadow"], **{name: value for name, value in given.items() if name in shadow_names}}
    return train(TrainConfig.from_dict(settings), console)
