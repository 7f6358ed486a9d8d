"""Shadow backbones: fresh ones shaped after the base, and pretrained ones from a path or the hub."""

import copy
from operator import attrgetter
from typing import Any

import torch
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from shadowpeft.core import ShadowConfig
from shadowpeft.errors import ArchitectureError, ConfigError
from shadowpeft.model.architectures import Architecture, architecture_of, decoder_of
from shadowpeft.model.bases import location
from shadowpeft.model.pretrained import check_same_tokenizer, load_source, shadow_config_of


def implicit_config(base: PreTrainedConfig, config: ShadowConfig) -> PreTrainedConfig:
    """The base's config with fewer layers and, where asked, other heads and widths.

    Raises:
        ConfigError: a size is asked for that this architecture does not have, or sizes that do not fit together.
    """
    row = architecture_of(base)
    shadow = unquantised(base)
    num_layers = config.shadow_num_hidden_layers
    shadow.num_hidden_layers = num_layers
    if config.shadow_layer_types == "full":
        _use_full_attention(shadow)
    for name in row.per_layer:
        if getattr(shadow, name, None) is not None:
            entries = list(getattr(shadow, name))
            setattr(shadow, name, (entries + entries[-1:] * num_layers)[:num_layers])
    for name, value in _sizes(row, config, base).items():
        setattr(shadow, name, value)
    shadow.tie_word_embeddings = False
    _check_sizes(shadow, row)
    return shadow


def unquantised(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of a base's config for a shadow, whose weights are full: without how the base's are quantised.

    transformers would otherwise read the detached folder as a quantised one.
    """
    shadow = copy.deepcopy(config)
    shadow.__dict__.pop("quantization_config", None)
    return shadow


def _use_full_attention(shadow: PreTrainedConfig) -> None:
    """Full attention in every shadow block, if the base has it anywhere.

    A window would shorten the shadow's context and make its cache uncroppable, for one cheap layer. A base
    with windows alone keeps them in its shadow, since the masks and cache lengths it prepares serve both paths.
    """
    if "full_attention" in (getattr(shadow, "layer_types", None) or ()):
        shadow.layer_types = ["full_attention"] * shadow.num_hidden_layers


def _sizes(row: Architecture, config: ShadowConfig, base: PreTrainedConfig) -> dict[str, Any]:
    """Config fields to set, by name. Only what the user asked for, and head widths that follow from it."""
    sizes: dict[str, Any] = {}
    if config.shadow_hidden_size is not None:
        sizes["hidden_size"] = config.shadow_hidden_size
        if base.model_type == "opt":
            sizes["word_embed_proj_dim"] = config.shadow_hidden_size
    if config.shadow_num_attention_heads is not None:
        sizes["num_attention_heads"] = config.shadow_num_attention_heads
        # Multi-head attention in the base stays multi-head in the shadow, and no shadow has more key/value heads than queries.
        if row.kv_heads:
            base_kv_heads = getattr(base, row.kv_heads)
            if base_kv_heads == base.num_attention_heads or base_kv_heads > config.shadow_num_attention_heads:
                sizes[row.kv_heads] = config.shadow_num_attention_heads
    for name, field, value in (
        ("shadow_num_key_value_heads", row.kv_heads, config.shadow_num_key_value_heads),
        ("shadow_head_dim", row.head_dim, config.shadow_head_dim),
    ):
        if value is not None and field is None:
            raise ConfigError(f"{name}={value} cannot be set: {base.model_type} has no such size; leave it None")
        if value is not None and field is not None:
            sizes[field] = value
    if config.shadow_intermediate_size is not None:
        sizes |= dict.fromkeys(row.mlp_width, config.shadow_intermediate_size)
    if row.head_dim and "hidden_size" in sizes and config.shadow_head_dim is None and _head_dim_follows(base):
        heads = sizes.get("num_attention_heads", base.num_attention_heads)
        sizes[row.head_dim] = sizes["hidden_size"] // heads
    return sizes


def _head_dim_follows(base: PreTrainedConfig) -> bool:
    return getattr(base, "head_dim", None) in (None, base.hidden_size // base.num_attention_heads)


def _check_sizes(shadow: PreTrainedConfig, row: Architecture) -> None:
    heads = shadow.num_attention_heads
    kv_heads = getattr(shadow, row.kv_heads) if row.kv_heads else heads
    if heads % kv_heads:
        raise ConfigError(
            f"the shadow has {heads} query heads but {kv_heads} key/value heads; the first must be a multiple of the "
            "second: set shadow_num_attention_heads and shadow_num_key_value_heads"
        )
    if row.head_dim is None and shadow.hidden_size % heads:
        raise ConfigError(f"shadow width {shadow.hidden_size} is not a multiple of its {heads} heads")
    _check_rotation(shadow, getattr(shadow, "head_dim", None) or shadow.hidden_size // heads)


def _check_rotation(shadow: PreTrainedConfig, head_dim: int) -> None:
    """Rotary position embeddings turn pairs of entries; some architectures rotate a part of each head."""
    rope = getattr(shadow, "rope_parameters", None)
    rotated = int(head_dim * rope.get("partial_rotary_factor", 1.0)) if rope else 0
    if rotated % 2:
        raise ConfigError(
            f"the shadow's heads are {head_dim} wide and {rotated} entries of them are rotated, which must be an even "
            "number: set another shadow_head_dim, or shadow_hidden_size and shadow_num_attention_heads"
        )


def build_backbone(
    decoder_class: type[PreTrainedModel], shadow: PreTrainedConfig, *, keep_embeddings: bool, base: PreTrainedModel
) -> PreTrainedModel:
    """A backbone with fresh fp32 weights and the base's kernels; without ``keep_embeddings`` it has no token table."""
    built = copy.deepcopy(shadow)
    if not keep_embeddings:
        built.vocab_size, built.pad_token_id = 1, None
    backbone = decoder_class._from_config(built, dtype=torch.float32, **_kernels(base, decoder_class))
    backbone.config.vocab_size, backbone.config.pad_token_id = shadow.vocab_size, shadow.pad_token_id
    if not keep_embeddings:
        remove_embeddings(backbone)
    return backbone


def remove_embeddings(backbone: PreTrainedModel) -> None:
    """Drops the token table of a backbone that is fed with the base's embeddings."""
    path = architecture_of(backbone.config).embedding
    *parents, name = path.split(".")
    owner = attrgetter(".".join(parents))(backbone) if parents else backbone
    setattr(owner, name, None)


def implicit_backbone(base: PreTrainedModel, config: ShadowConfig) -> PreTrainedModel:
    decoder = decoder_of(base)
    return build_backbone(
        type(decoder),
        implicit_config(decoder.config, config),
        keep_embeddings=not config.shares_embeddings,
        base=base,
    )


def _kernels(base: PreTrainedModel, decoder_class: type[PreTrainedModel]) -> dict[str, str]:
    """The base's kernels, as far as the backbone's class has them too."""
    attention = base.config._attn_implementation
    if attention is not None and not _has_attention(decoder_class, attention):
        attention = "eager"
    chosen = {"attn_implementation": attention, "experts_implementation": base.config._experts_implementation}
    return {name: value for name, value in chosen.items() if value is not None}


def _has_attention(decoder_class: type[PreTrainedModel], attention: str) -> bool:
    flags = {"sdpa": "_supports_sdpa", "flex_attention": "_supports_flex_attn"}
    flag = "_supports_flash_attn" if attention.startswith("flash") else flags.get(attention)
    return flag is None or bool(getattr(decoder_class, flag))


def explicit_backbone(base: PreTrainedModel, config: ShadowConfig, **load_options: Any) -> PreTrainedModel:
    """Loads a (usually pretrained) decoder from a path or hub name.

    Raises:
        ArchitectureError: its type is not supported, or it reads other tokens than the base.
    """
    source = str(config.shadow_model)
    shadow = shadow_config_of(source, **load_options)
    if shadow.vocab_size != base.config.vocab_size:
        raise ArchitectureError(
            f"the shadow {source!r} has a vocabulary of {shadow.vocab_size}, the base one of "
            f"{base.config.vocab_size}: both must use the same tokenizer"
        )
    check_same_tokenizer(source, location(base.name_or_path or ""))
    decoder_class: Any = AutoModel._model_mapping[type(shadow)]
    kernels = _kernels(base, decoder_class)
    backbone = load_source(source, shadow, kernels, **load_options)
    if config.shares_embeddings:
        remove_embeddings(backbone)
    return backbone


def empty_backbone(base: PreTrainedModel, shadow: PreTrainedConfig, *, keep_embeddings: bool) -> PreTrainedModel:
    """A backbone to load saved weights into."""
    decoder_class: Any = AutoModel._model_mapping[type(shadow)]
    return build_backbone(decoder_class, shadow, keep_embeddings=keep_embeddings, base=base)


def embedding_width(base: PreTrainedModel) -> int:
    table: Any = base.get_input_embeddings()
    return table.weight.shape[1]
