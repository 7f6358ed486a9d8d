"""Settings of every test: no network, one thread, one seed."""

import inspect
import os
import sys
from importlib.util import find_spec
from pathlib import Path

# Before torch is imported. Tiny tensors gain nothing from threads, which spin while they wait: on two cores
# the suite took nine times the CPU time with the default.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch

torch.set_num_threads(1)

# Before shadowpeft is imported: every call of the equations then checks the shapes in its signature.
SHAPED = ["shadowpeft.core.step", "shadowpeft.core.network"]
if all(find_spec(name) for name in ("jaxtyping", "beartype")):
    from jaxtyping import install_import_hook

    install_import_hook(SHAPED, "beartype.beartype")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def without_shape_checks(monkeypatch):
    """Takes the checks off for one test: torch.compile does not trace through them."""
    from shadowpeft.core import network, step

    owners = [step, network, step.Injection, step.Update, network.ShadowNetwork]
    for owner in owners:
        for name, value in list(vars(owner).items()):
            if inspect.isfunction(value):
                monkeypatch.setattr(owner, name, inspect.unwrap(value))
            elif isinstance(value, property):
                monkeypatch.setattr(owner, name, property(inspect.unwrap(value.fget)))
