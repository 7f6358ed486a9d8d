"""Where models compute: the device that commands choose, and steps that go with their blocks.

A base's parts may lie on several devices (``device_map``, a pipeline, offloading).
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from shadowpeft.core import ShadowNetwork
from shadowpeft.errors import ConfigError
from shadowpeft.model.architectures import blocks_of, decoder_of

META = torch.device("meta")


def device_named(name: str | None) -> torch.device:
    """The device called ``name``, such as ``"cuda:1"``; for None the accelerator of this machine, else its CPU.

    Raises:
        ConfigError: there is no such device here.
    """
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name is None:
        return found or torch.device("cpu")
    known = {"cpu"}
    if found is not None:
        known |= {found.type, *(f"{found.type}:{index}" for index in range(torch.accelerator.device_count()))}
    if name not in known:
        raise ConfigError(f"there is no device {name!r} here; choose one of {', '.join(sorted(known))}, or leave it out")
    return torch.device(name)


def moved(model: Any, device: torch.device) -> Any:
    """``model`` on ``device``; a base that was dispatched while it was loaded (a quantised one) stays where it is."""
    is_dispatched = hasattr(getattr(model, "base", model), "hf_device_map")
    return model if is_dispatched else model.to(device)


def place(network: ShadowNetwork, base: PreTrainedModel) -> ShadowNetwork:
    """Moves a network's parts to where :func:`places` wants them."""
    for part, device in places(network, base):
        part.to(device)
    return network


def places(network: ShadowNetwork, base: PreTrainedModel) -> list[tuple[nn.Module, torch.device]]:
    """The network to where the base's embeddings run, then every step's own weights to where its block does.

    One set of weights for all steps stays in one place; hidden states then go there and back.
    """
    decoder = decoder_of(base)
    start = device_of(base.get_input_embeddings(), decoder.device)
    found: list[tuple[nn.Module, torch.device]] = [(network, start)]
    for index, block in [] if network.config.share_steps else enumerate(blocks_of(decoder)):
        parts = network.parts(index) if index >= network.config.first_block else ()
        found += [(part, device_of(block, start)) for part in (*parts, network.midpoint(index)) if part is not None]
    return found


def device_of(module: nn.Module, otherwise: torch.device) -> torch.device:
    """Where a module computes: as accelerate's hook on it says, else where its weights are, if they are anywhere."""
    outer: Any = getattr(module, "_hf_hook", None)
    for hook in getattr(outer, "hooks", (outer,)):
        device = getattr(hook, "execution_device", None)
        if device is not None:
            return torch.device(device)
    found = next((p.device for p in module.parameters()), otherwise)
    return otherwise if found == META else found
