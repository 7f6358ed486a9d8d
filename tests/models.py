"""Tiny random bases for tests, one for every row of the architecture table."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from shadowpeft import ShadowConfig

VOCAB = 97
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
SPECIFIC: dict[str, dict] = {
    "llama": {"head_dim": 8},
    "mistral": {"head_dim": 8, "sliding_window": 6},
    "mixtral": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": {"head_dim": 8, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2},
    "gemma": {"head_dim": 8, "tie_word_embeddings": True},
    "gemma2": {"head_dim": 8, "tie_word_embeddings": True, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "gemma3_text": {
        "head_dim": 8,
        "tie_word_embeddings": True,
        "sliding_window": 6,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "phi": {},
    "phi3": {},
    "olmo2": {},
    "granite": {"logits_scaling": 2.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    "smollm3": {"no_rope_layers": [1, 1, 1, 0], "no_rope_layer_interval": 4},
    "gpt_neox": {},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "tie_word_embeddings": True},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0, "tie_word_embeddings": True},
    "stablelm": {},
    "starcoder2": {"residual_dropout": 0.0, "embedding_dropout": 0.0},
    "cohere": {"logit_scale": 0.25, "tie_word_embeddings": True},
    "gpt_oss": {
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
}


MIXTURES = {"mixtral", "qwen3_moe", "gpt_oss"}


def tiny_base(
    model_type: str = "llama", *, labels: int | None = None, dtype: torch.dtype = torch.float64, **overrides: object
) -> PreTrainedModel:
    """A seeded random base in evaluation mode. ``labels`` makes it a sequence classifier."""
    torch.manual_seed(0)
    values = {**COMMON, **SPECIFIC[model_type], **overrides}
    if labels is not None:
        values["num_labels"] = labels
    config = AutoConfig.for_model(model_type, **values)
    auto = AutoModelForCausalLM if labels is None else AutoModelForSequenceClassification
    # gpt_oss (attention sinks) and gemma2 (capped attention) have no sdpa path.
    attention = "eager" if model_type in {"gpt_oss", "gemma2"} else "sdpa"
    # The grouped kernels for experts have no float64.
    experts = {"experts_implementation": "eager"} if model_type in MIXTURES else {}
    model = auto.from_config(config, attn_implementation=attention, dtype=torch.float32, **experts)
    return model.to(dtype).eval()


def tiny_config(**overrides: object) -> ShadowConfig:
    size = {"shadow_intermediate_size": 24} if overrides.get("shadow_model", "implicit") == "implicit" else {}
    return ShadowConfig(**{"r": 4, "update_hidden_size": 3, "adapter_dtype": "float64", **size, **overrides})


def randomise(module: torch.nn.Module, *, seed: int = 1, std: float = 0.2) -> None:
    """Random weights everywhere, W_up included, so that the shadow acts on the base."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(noise.to(parameter), alpha=std)


def tokens(batch: int = 2, length: int = 9, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, length), generator=generator)


def enable_checkpointing(model: PreTrainedModel, **options: object) -> None:
    """Under whichever of its two names this transformers release has it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options or None)


def attributes(model: torch.nn.Module) -> dict[tuple, tuple[object, int | None]]:
    """Every attribute of every module and what those that are containers hold: the objects, and of tensors how often changed.

    To be compared by :func:`changed_attributes`, while what is in it stays alive and no address is used twice.
    """
    found: dict[tuple, tuple[object, int | None]] = {}
    for place, module in model.named_modules():
        for name, value in vars(module).items():
            held = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
            for key, item in ((None, value), *held):
                found[place, name, key] = (item, item._version if isinstance(item, torch.Tensor) else None)
    return found


def changed_attributes(before: dict[tuple, tuple[object, int | None]], after: dict) -> list[tuple]:
    """Places at which another object is, or a tensor was written to, or only one of the two has anything."""
    same = {place for place in before.keys() & after.keys() if before[place][0] is after[place][0]}
    same = {place for place in same if before[place][1] == after[place][1]}
    return sorted((before.keys() | after.keys()) - same, key=str)
