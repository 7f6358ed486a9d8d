"""Supported decoder architectures, one row each."""

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import cast

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from shadowpeft.core.head_loss import LogitFinish
from shadowpeft.errors import ArchitectureError, ConfigError

# What a causal language model does to head(hidden), by the config field that says how strongly.
_FINISHES: dict[str, Callable[[float | None], LogitFinish]] = {
    "logit_scale": lambda value: LogitFinish(multiply=value or 1.0),
    "logits_scaling": lambda value: LogitFinish(divide=value or 1.0),
    "final_logit_softcapping": lambda value: LogitFinish(cap=value),
}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What differs between decoder families, as far as a shadow is concerned.

    Attributes:
        blocks: path from the decoder to its list of blocks.
        mlp_width: config fields that hold the MLP width (of every expert in a mixture).
        kv_heads: config field of the key/value heads, None where every query head has its own.
        head_dim: config field of the head width, None where it is always d / heads.
        finish_field: config field that says what the causal language model does to ``head(hidden)``, None if nothing.
        per_layer: config fields with one entry a block.
        embedding: the decoder's attribute that holds the token embedding.
        attention: a block's attribute whose output is added to the residual stream as it is, in front of the MLP, and
            which gets the block's keywords; None where there is none.
    """

    blocks: str = "layers"
    mlp_width: tuple[str, ...] = ("intermediate_size",)
    kv_heads: str | None = "num_key_value_heads"
    head_dim: str | None = "head_dim"
    finish_field: str | None = None
    per_layer: tuple[str, ...] = ("layer_types",)
    embedding: str = "embed_tokens"
    attention: str | None = None

    def finish(self, config: PreTrainedConfig) -> LogitFinish:
        return LogitFinish() if self.finish_field is None else _FINISHES[self.finish_field](getattr(config, self.finish_field))

    def finish_logits(self, config: PreTrainedConfig, logits: Tensor) -> Tensor:
        return self.finish(config)(logits)


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(attention="self_attn"),
    "mistral": Architecture(attention="self_attn"),
    "mixtral": Architecture(attention="self_attn"),
    "qwen2": Architecture(head_dim=None, attention="self_attn"),
    "qwen3": Architecture(attention="self_attn"),
    "qwen3_moe": Architecture(mlp_width=("intermediate_size", "moe_intermediate_size"), attention="self_attn"),
    "gemma": Architecture(attention="self_attn"),
    "gemma2": Architecture(finish_field="final_logit_softcapping"),
    "gemma3_text": Architecture(finish_field="final_logit_softcapping"),
    "phi": Architecture(head_dim=None),
    "phi3": Architecture(head_dim=None),
    "olmo2": Architecture(head_dim=None),
    "granite": Architecture(head_dim=None, finish_field="logits_scaling"),
    "smollm3": Architecture(head_dim=None, per_layer=("layer_types", "no_rope_layers"), attention="self_attn"),
    "gpt_neox": Architecture(kv_heads=None, head_dim=None, embedding="embed_in"),
    "gpt2": Architecture(
        blocks="h", mlp_width=("n_inner",), kv_heads=None, head_dim=None, embedding="wte", attention="attn"
    ),
    "opt": Architecture(
        blocks="decoder.layers",
        mlp_width=("ffn_dim",),
        kv_heads=None,
        head_dim=None,
        embedding="decoder.embed_tokens",
    ),
    "stablelm": Architecture(head_dim=None),
    "starcoder2": Architecture(head_dim=None, attention="self_attn"),
    "cohere": Architecture(head_dim=None, finish_field="logit_scale"),
    "gpt_oss": Architecture(attention="self_attn"),
}


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """The table row of a model config.

    Raises:
        ArchitectureError: the type is not in the table; the message lists what is.
    """
    model_type = config.model_type
    if model_type not in ARCHITECTURES:
        kind = " (an encoder or encoder-decoder)" if _is_encoder(config) else ""
        raise ArchitectureError(
            f"model type {model_type!r}{kind} is not supported; supported decoder-only types: "
            f"{', '.join(sorted(ARCHITECTURES))}"
        )
    return ARCHITECTURES[model_type]


def finish_of(config: PreTrainedConfig) -> tuple[float, float | None]:
    """(factor on the logits, their cap or None)."""
    finish = architecture_of(config).finish(config)
    return finish.multiply / finish.divide, finish.cap


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The decoder stack (with final norm) inside a task model."""
    return model.base_model  # type: ignore[return-value]


def head_of(model: PreTrainedModel) -> nn.Linear:
    """The language-model head: [B, T, d] -> [B, T, V], before its architecture finishes the logits."""
    head = model.get_output_embeddings()
    assert head is not None, f"{type(model).__name__} has no language-model head"
    return cast(nn.Linear, head)  # quantised kinds, too, have a weight and a bias


def blocks_of(decoder: PreTrainedModel) -> nn.ModuleList:
    return attrgetter(architecture_of(decoder.config).blocks)(decoder)


def attentions_of(decoder: PreTrainedModel) -> list[nn.Module]:
    """The attention of every block, behind which the residual stream can be corrected; empty where it cannot be."""
    name = architecture_of(decoder.config).attention
    return [] if name is None else [getattr(block, name) for block in blocks_of(decoder)]


def check_midpoints(config: PreTrainedConfig) -> None:
    """Refuses corrections between sublayers on a base whose sublayers are not added to the stream one by one, as they are.

    Raises:
        ConfigError: this is such a base; the message lists what is not.
    """
    if architecture_of(config).attention is None:
        able = sorted(name for name, row in ARCHITECTURES.items() if row.attention is not None)
        raise ConfigError(
            f"inject_between='sublayers' does not go with a base of type {config.model_type!r}: its blocks norm, scale or drop "
            "what attention adds, run both sublayers side by side, or do not hand their keywords on; use 'blocks', or a base "
            f"of type {', '.join(able)}"
        )


def check_base(model: PreTrainedModel, *, first_block: int) -> None:
    """Refuses what cannot carry a shadow, before anything is changed.

    Raises:
        ArchitectureError: unknown type, bare decoder, too few blocks, projected OPT embeddings.
        ConfigError: weights cut into shards by DeepSpeed ZeRO-3.
    """
    refuse_zero3(any(hasattr(parameter, "ds_id") for parameter in model.parameters()))
    architecture_of(model.config)
    task = type(model).__name__
    if not task.endswith(("ForCausalLM", "LMHeadModel", "ForSequenceClassification")):
        raise ArchitectureError(
            f"{task} has neither a language-model nor a classification head; load the base with "
            "AutoModelForCausalLM or AutoModelForSequenceClassification"
        )
    num_blocks = len(blocks_of(decoder_of(model)))
    if num_blocks < 2:
        raise ArchitectureError(f"the base has {num_blocks} block; a shadow steps between two blocks, so at least 2 are needed")
    if first_block >= num_blocks:
        raise ArchitectureError(f"first_block={first_block} is past the last of the base's {num_blocks} blocks")
    _check_opt(model.config)


def refuse_zero3(is_zero3: bool) -> None:
    """DeepSpeed gathers weights when the module that owns them is called; losses and steps read them outside of that.

    Raises:
        ConfigError: ``is_zero3``.
    """
    if is_zero3:
        raise ConfigError(
            "DeepSpeed ZeRO-3 cuts the base into shards that a shadow cannot read; use FSDP2, which shards it too "
            "(recipes/accelerate/fsdp2.yaml), or ZeRO-2 (zero2.yaml)"
        )


def _check_opt(config: PreTrainedConfig) -> None:
    if config.model_type == "opt" and config.word_embed_proj_dim != config.hidden_size:
        raise ArchitectureError(
            f"OPT with word_embed_proj_dim={config.word_embed_proj_dim} != hidden_size={config.hidden_size} "
            "(opt-350m) is not supported: its head reads a width that no block has"
        )


def _is_encoder(config: PreTrainedConfig) -> bool:
    return config.is_encoder_decoder or config.model_type in {"bert", "roberta", "distilbert", "electra", "deberta-v2"}
