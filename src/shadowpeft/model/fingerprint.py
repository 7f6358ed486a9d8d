"""Tells whether a base carries the weights an adapter was trained on."""

import torch
from transformers import PreTrainedModel

from shadowpeft.model.architectures import decoder_of
from shadowpeft.model.sharded import whole

NUM_TENSORS = 24
NUM_VALUES = 8
# bf16 keeps 8 bits, so a cast changes a value by up to 2^-9 = 0.2 %; other weights differ by far more.
RELATIVE_TOLERANCE = 0.01


def fingerprint(base: PreTrainedModel) -> dict[str, list[float]]:
    """A few values of evenly spaced weight matrices of the decoder, by tensor name.

    The head is left out: a classifier's is fresh whenever the base is loaded. Survives a change of dtype and
    device, unlike a hash. Tensors on the meta device and quantised ones are left out, so that an adapter can
    move between a quantised base and the full one. Of a sharded base, every process has to call this.
    """
    usable = {
        name: tensor
        for name, tensor in sorted(decoder_of(base).state_dict().items())
        if tensor.dim() >= 2 and tensor.is_floating_point() and not tensor.is_meta
    }
    names = list(usable)
    chosen = names if len(names) <= NUM_TENSORS else [names[i * len(names) // NUM_TENSORS] for i in range(NUM_TENSORS)]
    return {name: _samples(usable[name]) for name in chosen}


def _samples(tensor: torch.Tensor) -> list[float]:
    flat = whole(tensor.detach()).reshape(-1)
    positions = torch.linspace(0, flat.numel() - 1, NUM_VALUES).long().to(flat.device)
    return [float(f"{value:.6g}") for value in flat[positions].float().tolist()]


def differing_tensors(expected: dict[str, list[float]], base: PreTrainedModel) -> list[str]:
    """Names of fingerprinted tensors of ``base`` that hold other values than ``expected``."""
    state = decoder_of(base).state_dict()
    return [
        name
        for name, values in expected.items()
        if name in state and state[name].is_floating_point() and not state[name].is_meta
        if not _close(_samples(state[name]), values)
    ]


def _close(found: list[float], expected: list[float]) -> bool:
    scale = max(abs(value) for value in expected)
    allowed = [RELATIVE_TOLERANCE * max(abs(value), 0.01 * scale) for value in expected]
    return all(abs(a - b) <= limit for a, b, limit in zip(found, expected, allowed, strict=True))
