"""What the converters of complete checkpoints share.

Both peers store sizes and rebuild the shadow's config from the base's by their own rules; those rules are
:func:`mirrored`. A network is written only if the peer would rebuild exactly the backbone it has.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from shadowpeft import files
from shadowpeft.core import ShadowConfig, ShadowNetwork
from shadowpeft.errors import CheckpointError, ConfigError
from shadowpeft.model.architectures import architecture_of
from shadowpeft.model.backbones import empty_backbone
from shadowpeft.model.build import assemble_network

# A size -> the config fields that both peers look for, in this order; the first that is there is set.
_FIELDS = {
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "intermediate_size": ("intermediate_size", "ffn_dim", "n_inner"),
    "num_attention_heads": ("num_attention_heads", "n_head", "num_heads", "attention_heads"),
    "num_key_value_heads": ("num_key_value_heads", "num_kv_heads", "n_kv_head"),
    "head_dim": ("head_dim", "attention_head_dim"),
}
# Fields that change nothing of what a backbone computes from embeddings.
_IDLE = {"tie_word_embeddings", "use_cache", "dtype", "architectures", "transformers_version", "max_window_layers"} | {
    "_name_or_path", "pad_token_id", "bos_token_id", "eos_token_id", "id2label", "label2id", "num_labels", "vocab_size",
}  # fmt: skip


@dataclass(frozen=True)
class Written:
    """What a peer's format left out; nothing of it changes what the adapter computes."""

    notes: list[str]


def mirrored(base: PreTrainedConfig, sizes: dict[str, int | None]) -> PreTrainedConfig:
    """The base's decoder config with ``sizes`` set as the peers set them; lists of one entry a block are cut to fit."""
    shadow = copy.deepcopy(base)
    for size, value in sizes.items():
        if value is None:
            continue
        name = next((name for name in _FIELDS[size] if hasattr(shadow, name)), None)
        if name is None:
            raise ConfigError(f"{size}={value} cannot be set: a {base.model_type} config has no such field")
        setattr(shadow, name, value)
    count = shadow.num_hidden_layers
    for name in architecture_of(base).per_layer:
        entries = list(getattr(shadow, name, None) or [])
        if entries:
            setattr(shadow, name, (entries + entries[-1:] * count)[:count])
    shadow.tie_word_embeddings = False
    return shadow


def sizes_of(base: PreTrainedConfig, shadow: PreTrainedConfig, names: tuple[str, ...]) -> dict[str, int | None]:
    """Sizes in which ``shadow`` differs from the base; None elsewhere."""
    sizes: dict[str, int | None] = {}
    for size in names:
        field = next((name for name in _FIELDS[size] if hasattr(base, name)), None)
        value = None if field is None else getattr(shadow, field)
        sizes[size] = value if field is not None and value != getattr(base, field) else None
    sizes["num_hidden_layers"] = shadow.num_hidden_layers
    return sizes


def check_rebuilt(network: ShadowNetwork, base: PreTrainedConfig, sizes: dict[str, int | None], peer: str) -> None:
    """Refuses a network whose backbone the peer would build otherwise from the base's config and ``sizes``."""
    ours, theirs = network.backbone.config.to_dict(), mirrored(base, sizes).to_dict()
    for name in sorted((ours.keys() | theirs.keys()) - _IDLE):
        if ours.get(name) != theirs.get(name):
            raise ConfigError(
                f"the shadow's {name}={ours.get(name)!r} has no counterpart in {peer}'s format, which would rebuild it "
                f"with {theirs.get(name)!r}"
            )


def common_dtype(tensors: dict[str, Tensor]) -> str:
    """The widest dtype among an adapter's tensors, which holds all of them exactly."""
    widest = tensors[next(iter(tensors))].dtype
    for tensor in tensors.values():
        widest = torch.promote_types(widest, tensor.dtype)
    return str(widest).removeprefix("torch.")


def filled(
    base: PreTrainedModel,
    config: ShadowConfig,
    shadow: PreTrainedConfig,
    read: Callable[[ShadowNetwork], dict[str, Tensor]],
) -> ShadowNetwork:
    """A network for ``base`` with a backbone of the config ``shadow`` and the weights that ``read`` finds for it."""
    backbone = empty_backbone(base, shadow, keep_embeddings=not config.shares_embeddings)
    network = assemble_network(base, config, backbone)
    network.load_state_dict(read(network))
    return network


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file.

    Raises:
        CheckpointError: no such file, or something else in it.
    """
    if not path.is_file():
        raise CheckpointError(f"{path.parent} holds no {path.name}; it is incomplete: copy or save it again")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); fetch it anew") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold an object, not a {type(values).__name__}")
    return values


def write_checkpoint(
    folder: Path, config_name: str, values: dict[str, Any], tensors: dict[str, dict[str, Tensor]]
) -> None:
    """Writes one JSON file and the named safetensors files, all or none."""

    def write(staging: Path) -> None:
        for name, content in tensors.items():
            kept = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in content.items()}
            save_file(kept, staging / name, metadata={"format": "pt"})
        (staging / config_name).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    files.write_files(folder, write)


# Settings of training alone, which neither peer has.
NO_PEER_HAS = ("shadow_lr_multiplier", "distillation_weight")


def training_notes(config: ShadowConfig, lost: tuple[str, ...]) -> list[str]:
    """One line for each field of ``lost`` that is not at its default."""
    default = ShadowConfig()
    return [
        f"{name}={getattr(config, name)!r} is not stored: it matters to training alone"
        for name in lost
        if getattr(config, name) != getattr(default, name)
    ]
