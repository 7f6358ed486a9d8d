"""`shadowpeft info`: describe this installation or an adapter."""

import json
import platform
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table
from rich.text import Text

from shadowpeft._version import __version__
from shadowpeft.core import ShadowConfig
from shadowpeft.core.kernels import step_backend
from shadowpeft.errors import ConfigError
from shadowpeft.model import ARCHITECTURES
from shadowpeft.model.adapter_config import read_config
from shadowpeft.model.hub import find_folder
from shadowpeft.model.tensors import WEIGHTS_FILE
from shadowpeft.train.health import health
from shadowpeft.train.tasks import TASKS


def info(adapter: str | None, console: Console, *, with_health: bool = False) -> None:
    """Prints this installation, or an adapter's description; ``with_health`` adds what its run and weights tell.

    Raises:
        ConfigError: health without an adapter.
    """
    if with_health and adapter is None:
        raise ConfigError("--health looks at a saved adapter; name its folder")
    table = Table(show_header=False)
    if adapter is None:
        for key, value in _installation().items():
            table.add_row(key, value)
    else:
        folder = find_folder(adapter)
        for key, value in _description(folder).items():
            table.add_row(key, Text(value))  # which has no markup: a file may hold anything
        for key, value in (health(folder) if with_health else {}).items():
            table.add_row(f"health: {key}", value)
    console.print(table)


def _installation() -> dict[str, str]:
    return {
        "shadowpeft": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none (CPU)",
        "training step": "{}: {}".format(*step_backend(ShadowConfig(), device=_device(), dtype=_dtype())),
        "tasks": ", ".join(sorted(TASKS)),
        "architectures": ", ".join(sorted(ARCHITECTURES)),
    }


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _dtype() -> torch.dtype:
    """What a base is usually loaded in here."""
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def _description(folder: Path) -> dict[str, str]:
    described = read_config(folder)
    base = described["base"]
    size = (folder / WEIGHTS_FILE).stat().st_size if (folder / WEIGHTS_FILE).is_file() else 0
    settings = {key: json.dumps(value) for key, value in sorted(described["shadow"].items()) if value is not None}
    return {
        "base": f"{base['name_or_path']} ({base['architecture']}, {base['num_blocks']} blocks of {base['hidden_size']})",
        "weights": f"{size:,} bytes",
        "written by": f"shadowpeft {described['library_version']}",
        **settings,
    }
