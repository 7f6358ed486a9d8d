"""Tells whether a base carries the weights an adapter was trained on."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from shadowpeft.model.architectures import decoder_of
from shadowpeft.model.sharded import whole

NUM_MATRICES = 24
NUM_VECTORS = 8
NUM_VALUES = 8
# bf16 keeps 8 bits, so a cast changes a value by up to 2^-9 = 0.2 %; other weights differ by far more.
RELATIVE_TOLERANCE = 0.01
# Quantised tensors are of other dtypes (bitsandbytes, fp8 without its scale) or of other classes that claim to be floats
# (torchao), and hold other values than the weights they stand for.
_DTYPES = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
_CLASSES = {Tensor, nn.Parameter, DTensor}


def fingerprint(base: PreTrainedModel) -> dict[str, list[float]]:
    """A few values of evenly spaced weights of the decoder, by tensor name: matrices, vectors and the token table.

    The head is left out: a classifier's is fresh whenever the base is loaded. Survives a change of dtype and
    device, unlike a hash. Tensors on the meta device and quantised ones are left out, so that an adapter can
    move between a quantised base and the full one; norms, biases and the token table, which quantisation usually leaves
    alone, are what such a pair is compared by. Of a sharded base, every process has to call this.
    """
    decoder = decoder_of(base)
    usable = {name: tensor for name, tensor in sorted(decoder.state_dict().items()) if is_comparable(tensor)}
    matrices = [name for name, tensor in usable.items() if tensor.dim() >= 2]
    vectors = [name for name, tensor in usable.items() if tensor.dim() == 1]
    table = [name for name in matrices if usable[name].shape[0] == decoder.config.vocab_size]
    chosen = {*_spread(matrices, NUM_MATRICES), *_spread(vectors, NUM_VECTORS), *table[:1]}
    return {name: _samples(usable[name]) for name in sorted(chosen)}


def is_comparable(tensor: Tensor) -> bool:
    """Whether a tensor is in memory and holds the weight itself, not a quantised form of it."""
    return tensor.dtype in _DTYPES and type(tensor) in _CLASSES and not tensor.is_meta


def _spread(names: list[str], most: int) -> list[str]:
    return names if len(names) <= most else [names[i * len(names) // most] for i in range(most)]


def _samples(tensor: Tensor) -> list[float]:
    flat = whole(tensor.detach()).reshape(-1)
    # In fp32, as saved fingerprints were: past 2^24 elements the last position rounds, often up to one that is not there.
    last = flat.numel() - 1
    positions = torch.linspace(0, last, NUM_VALUES, dtype=torch.float32).long().clamp_(max=last).to(flat.device)
    return [float(f"{value:.6g}") for value in flat[positions].float().tolist()]


def comparable_tensors(expected: dict[str, list[float]], base: PreTrainedModel) -> list[str]:
    """Names of fingerprinted tensors that ``base`` holds unquantised."""
    state = decoder_of(base).state_dict()
    return [name for name in expected if name in state and is_comparable(state[name])]


def differing_tensors(expected: dict[str, list[float]], base: PreTrainedModel) -> list[str]:
    """Names of fingerprinted tensors of ``base`` that hold other values than ``expected``."""
    state = decoder_of(base).state_dict()
    return [name for name in comparable_tensors(expected, base) if not _close(_samples(state[name]), expected[name])]


def _close(found: list[float], expected: list[float]) -> bool:
    scale = max(abs(value) for value in expected)
    allowed = [RELATIVE_TOLERANCE * max(abs(value), 0.01 * scale) for value in expected]
    return all(abs(a - b) <= limit for a, b, limit in zip(found, expected, allowed, strict=True))
