"""Adapters without what training left unchanged of a pretrained shadow: its name and a hash instead."""

import hashlib
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shadowpeft.core import ShadowConfig, ShadowNetwork
from shadowpeft.errors import CheckpointError, ConfigError, ShadowPeftError
from shadowpeft.model.build import initial_backbone

PREFIX = "backbone."


def unchanged(base: PreTrainedModel, network: ShadowNetwork) -> dict[str, Tensor]:
    """The pretrained shadow's own tensors (fp32) that the network still holds unchanged, by their names in it.

    Raises:
        ConfigError: the shadow is implicit, or training changed all of it.
    """
    config = network.config
    if config.is_implicit:
        raise ConfigError("an implicit shadow has fresh weights that are stored nowhere else; save it in full")
    source = initial_backbone(base, config).state_dict()
    state = network.backbone.state_dict()
    same = {
        PREFIX + name: tensor
        for name, tensor in source.items()
        if name in state and torch.equal(tensor.to(state[name]), state[name])
    }
    if not same:
        raise ConfigError(
            f"training changed every tensor of the shadow {config.shadow_model!r}; train with freeze_backbone=True, or "
            "save the adapter in full"
        )
    return same


def reference(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What the adapter's config says of the tensors it leaves out."""
    return {"tensors": sorted(tensors), "sha256": digest(tensors)}


def digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of names, shapes and fp32 values."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().float().cpu().contiguous()
        total.update(f"{name}{list(value.shape)}".encode())
        total.update(value.numpy().tobytes())
    return total.hexdigest()


def fetch(base: PreTrainedModel, config: ShadowConfig, expected: dict[str, Any], where: str) -> dict[str, Tensor]:
    """The left-out tensors, from the shadow that ``config`` names.

    Raises:
        CheckpointError: it is not there, or its weights are not those the adapter was trained with.
    """
    what = f"the adapter in {where} was saved without the weights it shares with {config.shadow_model!r}"
    try:
        state = initial_backbone(base, config).state_dict()
    except (ShadowPeftError, OSError) as error:
        raise CheckpointError(f"{what}, which cannot be loaded ({error}); pass its place as shadow_model=") from error
    names = {name: name.removeprefix(PREFIX) for name in expected["tensors"]}
    found = {name: state[own] for name, own in names.items() if own in state}
    if len(found) < len(names) or digest(found) != expected["sha256"]:
        raise CheckpointError(
            f"{what}, but what is there now has other weights (the SHA-256 of {len(names)} tensors differs); pass the "
            "right one as shadow_model="
        )
    return found
