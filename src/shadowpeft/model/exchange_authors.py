"""Complete checkpoints of the authors' ``shadow-peft``; 0.1.0 and 0.1.1 write the same files."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from shadowpeft.core import ShadowConfig, ShadowNetwork
from shadowpeft.core.config import check_keys
from shadowpeft.errors import CheckpointError, ConfigError
from shadowpeft.model.architectures import architecture_of, decoder_of
from shadowpeft.model.build import is_classifier
from shadowpeft.model.convert import from_authors, to_authors
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

AUTHORS_CONFIG, AUTHORS_WEIGHTS, AUTHORS_HEADS = (
    "shadow_config.json",
    "shadow_adapter.safetensors",
    "shadow_modules.safetensors",
)
_AUTHORS_SIZES = ("num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")

_AUTHORS_DEFAULTS: dict[str, Any] = {
    "alpha": 0.1,
    "dropout": 0.2,
    "gate_hidden_size": 10,
    "injection_hidden_size": 16,
    "modules_to_save": [],
    "num_shadow_layers": 1,
    "shadow_head_dim": None,
    "shadow_intermediate_size": None,
    "shadow_num_attention_heads": None,
    "shadow_num_key_value_heads": None,
}


def num_labels_of_authors(folder: Path) -> int | None:
    """Classes of a classifier in the authors' format; None for a language model."""
    path = folder / AUTHORS_HEADS
    head = read_file(path)[0].get("classifier_head.weight") if path.is_file() else None
    return None if head is None else head.shape[0]


def read_authors(folder: Path, base: PreTrainedModel, *, shadow_model: str | None = None) -> ShadowNetwork:
    """An adapter of ``shadow-peft``. Its files do not say which explicit shadow it has: pass it as ``shadow_model``.

    Raises:
        ConfigError: an unknown key, or a variant that has no counterpart here.
        CheckpointError: missing or damaged files, or tensors of another network.
    """
    values = read_json(folder / AUTHORS_CONFIG)
    check_keys(values, set(_AUTHORS_DEFAULTS), what=f"{folder / AUTHORS_CONFIG}")
    values = _AUTHORS_DEFAULTS | values
    if not (folder / AUTHORS_WEIGHTS).is_file() and (folder / "shadow_adapter.pt").is_file():
        raise CheckpointError(
            f"{folder} holds pickled weights (shadow_adapter.pt), which can run code when read; save it again with "
            f"shadow-peft, which writes {AUTHORS_WEIGHTS}"
        )
    tensors = read_file(folder / AUTHORS_WEIGHTS)[0]
    if (folder / AUTHORS_HEADS).is_file():
        heads = read_file(folder / AUTHORS_HEADS)[0]
        foreign = [name for name in heads if "classifier_head" not in name]
        if foreign:
            raise ConfigError(
                f"{folder / AUTHORS_HEADS} holds a trained {foreign[0]!r}; a language-model head stays frozen here"
            )
        tensors |= heads
    decoder = decoder_of(base).config
    fields: dict[str, Any] = {
        "shadow_num_hidden_layers": values["num_shadow_layers"],
        "shadow_intermediate_size": values["shadow_intermediate_size"],
        "shadow_num_attention_heads": values["shadow_num_attention_heads"],
        "shadow_num_key_value_heads": values["shadow_num_key_value_heads"],
        "shadow_head_dim": values["shadow_head_dim"],
    }
    sizes = {name: values["num_shadow_layers"] if name == "num_hidden_layers" else values[f"shadow_{name}"]
             for name in _AUTHORS_SIZES}  # fmt: skip
    shadow = mirrored(decoder, sizes)
    if shadow_model is not None:
        shadow = shadow_config_of(shadow_model)
        table = architecture_of(shadow).embedding
        has_table = f"shadow_model.{table}.weight" in tensors
        fields = {"shadow_model": shadow_model, "share_embeddings": not has_table}
    config = ShadowConfig.preset(
        "authors",
        task_type="SEQ_CLS" if is_classifier(base) else "CAUSAL_LM",
        r=values["injection_hidden_size"],
        update_hidden_size=values["gate_hidden_size"],
        shadow_alpha=float(values["alpha"]),
        shadow_dropout=float(values["dropout"]),
        adapter_dtype=common_dtype(tensors),
        **fields,
    )
    return filled(base, config, shadow, lambda network: from_authors(tensors, network))


def write_authors(base: PreTrainedModel, network: ShadowNetwork, folder: Path) -> Written:
    """Writes an adapter for ``shadow-peft``.

    Raises:
        ConfigError: a variant or size that the format cannot express; the message names it. Nothing is written.
    """
    config, decoder, shadow = network.config, decoder_of(base).config, network.backbone.config
    tensors = to_authors(network)
    sizes = sizes_of(decoder, shadow, _AUTHORS_SIZES)
    notes = training_notes(config, ("auxiliary_loss_weight", "freeze_backbone", *NO_PEER_HAS))
    if config.is_explicit:
        sizes = dict.fromkeys(sizes, None) | {"num_hidden_layers": shadow.num_hidden_layers}
        notes.append(f"the format does not name the explicit shadow; load with shadow_model= {config.shadow_model!r}")
    else:
        if not config.shares_embeddings:
            raise ConfigError(
                "share_embeddings=False has no counterpart in shadow-peft's format, whose implicit shadows always share"
            )
        check_rebuilt(network, decoder, sizes, "shadow-peft")
    values = _AUTHORS_DEFAULTS | {
        "alpha": config.bottleneck_alpha,
        "dropout": config.shadow_dropout,
        "gate_hidden_size": config.update_hidden_size,
        "injection_hidden_size": config.r,
        "num_shadow_layers": sizes["num_hidden_layers"],
        **{f"shadow_{name}": value for name, value in sizes.items() if name != "num_hidden_layers"},
    }
    heads = {name: tensors.pop(name) for name in list(tensors) if "classifier_head" in name}
    content = {AUTHORS_WEIGHTS: tensors} | ({AUTHORS_HEADS: heads} if heads else {})
    write_checkpoint(folder, AUTHORS_CONFIG, values, content)
    return Written(notes)
