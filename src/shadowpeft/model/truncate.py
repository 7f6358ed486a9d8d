"""Blocks of the base itself as the shadow's first weights: ``base:first:2``, ``base:last:1``, ``base:spaced:3``."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shadowpeft.core import ShadowConfig
from shadowpeft.errors import ArchitectureError, ConfigError
from shadowpeft.model.architectures import architecture_of, blocks_of, decoder_of
from shadowpeft.model.backbones import build_backbone, unquantised
from shadowpeft.model.fingerprint import is_comparable


def chosen_blocks(where: str, count: int, num_blocks: int) -> list[int]:
    """Indices of ``count`` blocks out of ``num_blocks``: the first, the last, or evenly spaced with both ends.

    Raises:
        ConfigError: there are fewer blocks than asked for.
    """
    if count > num_blocks:
        raise ConfigError(f"shadow_model asks for {count} blocks of a base that has {num_blocks}; ask for fewer")
    if where == "first":
        return list(range(count))
    if where == "last":
        return list(range(num_blocks - count, num_blocks))
    return [0] if count == 1 else [round(i * (num_blocks - 1) / (count - 1)) for i in range(count)]


def truncated_backbone(base: PreTrainedModel, config: ShadowConfig) -> PreTrainedModel:
    """A decoder of the base's class with copies, in fp32, of some of its blocks, and of its final norm.

    Raises:
        ConfigError: more blocks than the base has.
        ArchitectureError: what a block does depends on its place, so it cannot be moved; or a block is offloaded.
    """
    assert config.truncation is not None
    decoder = decoder_of(base)
    indices = chosen_blocks(*config.truncation, len(blocks_of(decoder)))
    shadow = unquantised(decoder.config)
    row = architecture_of(shadow)
    _check_movable(base, indices)
    shadow.num_hidden_layers = len(indices)
    for name in row.per_layer:
        if getattr(shadow, name, None) is not None:
            entries = list(getattr(shadow, name))
            setattr(shadow, name, [entries[index] for index in indices])
    shadow.tie_word_embeddings = False
    backbone = build_backbone(type(decoder), shadow, keep_embeddings=not config.shares_embeddings, base=base)
    _copy_weights(decoder, backbone, indices)
    return backbone


def _check_movable(base: PreTrainedModel, indices: list[int]) -> None:
    config = decoder_of(base).config
    is_in_place = indices == list(range(len(indices)))
    depends = getattr(config, "scale_attn_by_inverse_layer_idx", False) or getattr(config, "mlp_only_layers", None)
    if not is_in_place and (depends or getattr(config, "decoder_sparse_step", 1) != 1):
        raise ArchitectureError(
            f"the blocks of this {config.model_type} base depend on their place, so they cannot be moved; use "
            f"shadow_model='base:first:{len(indices)}'"
        )


@torch.no_grad()
def _copy_weights(decoder: PreTrainedModel, backbone: PreTrainedModel, indices: list[int]) -> None:
    prefix = architecture_of(decoder.config).blocks + "."
    source = decoder.state_dict()
    taken: dict[str, Tensor] = {}
    for name in backbone.state_dict():
        theirs = name
        if name.startswith(prefix):
            index, rest = name.removeprefix(prefix).split(".", 1)
            theirs = f"{prefix}{indices[int(index)]}.{rest}"
        taken[name] = _full(source[theirs], theirs)
        if taken[name].is_meta and backbone.device.type != "meta":
            raise ArchitectureError(
                f"{theirs} of the base is offloaded, so a shadow cannot start from a copy of it; make and save the adapter on "
                "a base in memory and load it here, or use shadow_model='implicit'"
            )
    if backbone.device.type != "meta":
        backbone.load_state_dict(taken)


def _full(tensor: Tensor, name: str) -> Tensor:
    """The weight itself, of torchao's quantised tensors what they stand for.

    Raises:
        ArchitectureError: it is quantised in a way that does not say what it stands for.
    """
    if is_comparable(tensor) or tensor.is_meta or tensor.dim() < 2:
        return tensor
    if type(tensor) is Tensor or not tensor.is_floating_point():
        raise ArchitectureError(
            f"{name} of the base is quantised as {tensor.dtype}, so a shadow cannot start from it; take the block from the "
            "full base, or use shadow_model='implicit'"
        )
    return tensor.dequantize()
