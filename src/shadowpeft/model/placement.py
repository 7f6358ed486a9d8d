"""A base whose parts lie on several devices (``device_map``, a pipeline, offloading): each step goes with its block."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from shadowpeft.core import ShadowNetwork
from shadowpeft.model.architectures import blocks_of, decoder_of

META = torch.device("meta")


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
    refined = list(enumerate(blocks_of(decoder)))[network.config.first_block :]
    for index, block in [] if network.config.share_steps else refined:
        found += [(part, device_of(block, start)) for part in network.parts(index) if part is not None]
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
