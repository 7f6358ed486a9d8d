"""Adapters without what training left unchanged of a pretrained shadow: its name and a hash instead."""

import hashlib
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shadowpeft.core import ShadowConfig, ShadowNetwork
from shadowpeft.errors import CheckpointError, ConfigError, ShadowPeftError
from shadowpeft.model.architectures import architecture_of, decoder_of
from shadowpeft.model.build import initial_backbone
from shadowpeft.model.fingerprint import is_comparable

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


def fetch(
    base: PreTrainedModel, config: ShadowConfig, expected: dict[str, Any], where: str, *, known: dict[str, list[float]]
) -> dict[str, Tensor]:
    """The left-out tensors, from the shadow that ``config`` names.

    Args:
        known: fingerprint of the base that the adapter was trained on, which ``base`` has been compared with.

    Raises:
        CheckpointError: it is not there, or its weights are not those the adapter was trained with.
    """
    what = f"the adapter in {where} was saved without the weights it shares with {config.shadow_model!r}"
    is_of_base = config.truncation is not None
    away = "load the base unquantised and in memory, or save the adapter without share_backbone" if is_of_base else None
    try:
        state = initial_backbone(base, config).state_dict()
    except (ShadowPeftError, OSError) as error:
        advice = away or "pass its place as shadow_model="
        raise CheckpointError(f"{what}, which cannot be loaded ({error}); {advice}") from error
    names = {name: name.removeprefix(PREFIX) for name in expected["tensors"]}
    found = {name: state[own] for name, own in names.items() if own in state}
    # Blocks of the base are the right ones if the base is, whatever dtype it was loaded in; but not what rounding made of them.
    is_known = len(found) == len(names) and is_of_base and _are_full(base, known)
    if not is_known and (len(found) < len(names) or digest(found) != expected["sha256"]):
        raise CheckpointError(
            f"{what}, but what is there now has other weights (the SHA-256 of {len(names)} tensors differs); "
            f"{away or 'pass the right one as shadow_model='}"
        )
    return found


def _are_full(base: PreTrainedModel, known: dict[str, list[float]]) -> bool:
    """Whether the matrices of the base's blocks are not quantised, neither here nor where the fingerprint was taken."""
    decoder = decoder_of(base)
    prefix = architecture_of(decoder.config).blocks + "."
    matrices = {name: t for name, t in decoder.state_dict().items() if name.startswith(prefix) and t.dim() >= 2}
    return bool(matrices.keys() & known.keys()) and all(is_comparable(tensor) for tensor in matrices.values())
