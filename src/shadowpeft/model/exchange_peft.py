"""Complete SHADOW checkpoints of Hugging Face ``peft``."""

import re
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from shadowpeft.core import ShadowConfig, ShadowNetwork
from shadowpeft.core.config import check_keys
from shadowpeft.errors import CheckpointError, ConfigError
from shadowpeft.model.architectures import blocks_of, decoder_of
from shadowpeft.model.bases import commit_of
from shadowpeft.model.build import is_classifier
from shadowpeft.model.convert import blocks_path, from_peft, to_peft
from shadowpeft.model.exchange import (
    NO_PEER_HAS,
    Written,
    check_rebuilt,
    common_dtype,
    filled,
    mirrored,
    read_json,
    sizes_of,
    training_notes,
    write_checkpoint,
)
from shadowpeft.model.pretrained import shadow_config_of
from shadowpeft.model.tensors import read_file

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PEFT_VERSION = "0.21.2"
_PEFT_SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")

_PEFT_DEFAULTS: dict[str, Any] = {
    "auto_mapping": None,
    "auxiliary_loss_weight": 0.05,
    "base_model_name_or_path": None,
    "exclude_modules": None,
    "inference_mode": True,
    "init_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "modules_to_save": None,
    "peft_type": "SHADOW",
    "peft_version": PEFT_VERSION,
    "r": 8,
    "revision": None,
    "shadow_alpha": 0.1,
    "shadow_dropout": 0.2,
    "shadow_hidden_size": None,
    "shadow_intermediate_size": None,
    "shadow_model": "mirror",
    "shadow_num_attention_heads": None,
    "shadow_num_hidden_layers": None,
    "share_embeddings": True,
    "target_modules": None,
    "task_type": "CAUSAL_LM",
    "update_hidden_size": None,
}


def num_labels_of_peft(folder: Path) -> int | None:
    """Classes of a classifier in peft's format; None for a language model."""
    if read_json(folder / PEFT_CONFIG).get("task_type") != "SEQ_CLS":
        return None
    head = read_file(folder / PEFT_WEIGHTS)[0].get("base_model.model.score.weight")
    if head is None:
        raise CheckpointError(f"{folder / PEFT_WEIGHTS} is a classifier's but has no base_model.model.score.weight")
    return head.shape[0]


def base_of_peft(folder: Path) -> dict[str, Any]:
    """Name and revision (branch, tag or commit) of the base, under the keys of :func:`checkpoint.describe_base`."""
    values = read_json(folder / PEFT_CONFIG)
    return {"name_or_path": values.get("base_model_name_or_path"), "revision": values.get("revision")}


def read_peft(folder: Path, base: PreTrainedModel, *, shadow_model: str | None = None) -> ShadowNetwork:
    """A SHADOW adapter of peft; ``shadow_model`` overrides where its explicit shadow is looked for.

    Raises:
        ConfigError: an unknown key, or a variant that has no counterpart here.
        CheckpointError: missing or damaged files, or tensors of another network.
    """
    path = folder / PEFT_CONFIG
    values = read_json(path)
    if values.get("peft_type") != "SHADOW":
        raise CheckpointError(f"{path} is a {values.get('peft_type')!r} adapter; only SHADOW adapters can be converted")
    check_keys(values, set(_PEFT_DEFAULTS), what=f"{path}")
    values = _PEFT_DEFAULTS | values
    if values["task_type"] not in ("CAUSAL_LM", "SEQ_CLS"):
        raise ConfigError(f"{path}: task_type={values['task_type']!r} has no counterpart here")
    extra = sorted(set(values["modules_to_save"] or []) - {"classifier", "score"})
    if extra:
        raise ConfigError(f"{path}: modules_to_save={extra} has no counterpart here, where the base stays frozen")
    tensors = read_file(folder / PEFT_WEIGHTS)[0]
    decoder = decoder_of(base).config
    is_mirror = values["shadow_model"] == "mirror"
    if is_mirror:
        sizes = {name: values[f"shadow_{name}"] for name in _PEFT_SIZES}
        sizes["num_hidden_layers"] = sizes["num_hidden_layers"] or 1
        shadow = mirrored(decoder, sizes)
        fields = {f"shadow_{name}": value for name, value in sizes.items()}
        fields["share_embeddings"] = values["share_embeddings"] and shadow.hidden_size == decoder.hidden_size
    else:
        source = shadow_model or values["shadow_model"]
        shadow = shadow_config_of(source)
        fields = {"shadow_model": source, "share_embeddings": False}
    config = ShadowConfig.preset(
        "peft",
        task_type=values["task_type"],
        r=values["r"],
        update_hidden_size=values["update_hidden_size"] or values["r"],
        shadow_alpha=float(values["shadow_alpha"]),
        shadow_dropout=float(values["shadow_dropout"]),
        auxiliary_loss_weight=float(values["auxiliary_loss_weight"]),
        first_block=_first_block(values, base, path),
        adapter_dtype=common_dtype(tensors),
        **fields,
    )
    blocks = blocks_path(base)
    return filled(base, config, shadow, lambda network: from_peft(tensors, network, blocks=blocks))


def _first_block(values: dict[str, Any], base: PreTrainedModel, path: Path) -> int:
    """The first wrapped block, where all behind it are wrapped too."""
    targets, layers = values["target_modules"], values["layers_to_transform"]
    count = len(blocks_of(decoder_of(base)))
    names = [f"{blocks_path(base)}.{index}" for index in range(count)]
    chosen = [index for index, name in enumerate(names) if targets is None or _matches(name, targets)]
    if layers is not None:
        layers = [layers] if isinstance(layers, int) else layers
        chosen = [index for index in chosen if index in layers]
    if values["exclude_modules"] or not chosen or chosen != list(range(chosen[0], count)):
        raise ConfigError(
            f"{path}: the wrapped blocks {chosen} of {count} have no counterpart here, where every block from the "
            "first corrected one on is corrected"
        )
    return chosen[0]


def _matches(name: str, targets: str | list[str]) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def write_peft(base: PreTrainedModel, network: ShadowNetwork, folder: Path) -> Written:
    """Writes a SHADOW adapter for peft.

    Raises:
        ConfigError: a variant or size that the format cannot express; the message names it. Nothing is written.
    """
    config, decoder, shadow = network.config, decoder_of(base).config, network.backbone.config
    blocks = blocks_path(base)
    tensors = to_peft(network, blocks=blocks)
    notes = training_notes(config, ("freeze_embeddings", "freeze_backbone", *NO_PEER_HAS))
    sizes: dict[str, int | None] = dict.fromkeys(_PEFT_SIZES)
    if not config.is_explicit:
        sizes = sizes_of(decoder, shadow, _PEFT_SIZES)
        check_rebuilt(network, decoder, sizes, "peft")
    classifies = is_classifier(base)
    values = _PEFT_DEFAULTS | {
        "auxiliary_loss_weight": config.auxiliary_loss_weight,
        "base_model_name_or_path": base.name_or_path or None,
        "revision": commit_of(base),
        "modules_to_save": ["classifier", "score"] if classifies else None,
        "r": config.r,
        "shadow_alpha": config.bottleneck_alpha,
        "shadow_dropout": config.shadow_dropout,
        "shadow_model": config.shadow_model if config.is_explicit else "mirror",
        "share_embeddings": config.shares_embeddings,
        "target_modules": [f"{blocks}.{index}" for index in range(config.first_block, network.num_blocks)],
        "task_type": config.task_type,
        "update_hidden_size": config.update_hidden_size,
        **{f"shadow_{name}": value for name, value in sizes.items()},
    }
    write_checkpoint(folder, PEFT_CONFIG, values, {PEFT_WEIGHTS: tensors})
    return Written(notes)
