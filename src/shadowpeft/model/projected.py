"""Pretrained shadows written to disk: as an ordinary model with P beside it, or in the authors' projected format."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from shadowpeft import files
from shadowpeft.core import ShadowNetwork
from shadowpeft.errors import ArchitectureError, CheckpointError
from shadowpeft.model.architectures import finish_of, head_of
from shadowpeft.model.build import cast
from shadowpeft.model.detach import detached_model
from shadowpeft.model.pretrained import (
    PROJECTED_TYPE,
    PROJECTION_FILE,
    PROJECTION_KEY,
    load_source,
    projected_tensors,
    read_projection,
    shadow_config_of,
)

# A bf16 head folded in another order differs by far less; another base's head by about 1.
_SAME_HEAD = 0.02


def write_pretrained(
    base: PreTrainedModel,
    network: ShadowNetwork,
    folder: Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    record: dict[str, Any],
) -> None:
    """Writes a pretrained shadow: an ordinary model, P beside it where the widths differ, and ``pretrain.json``.

    Raises:
        ArchitectureError: the base's head cannot be folded into this model; nothing is written.
    """
    model = detached_model(base, network)
    projection = None if network.projection is None else network.projection.weight
    write_plain(model, projection, folder, tokenizer=tokenizer, record=record)


def write_plain(
    model: PreTrainedModel,
    projection: Tensor | None,
    folder: Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    record: dict[str, Any],
) -> None:
    def write(staging: Path) -> None:
        model.save_pretrained(staging)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        if projection is not None:
            content = {PROJECTION_KEY: projection.detach().cpu().contiguous().clone()}
            save_file(content, staging / PROJECTION_FILE, metadata={"format": "pt"})
        text = json.dumps(record, indent=2, sort_keys=True) + "\n"
        (staging / "pretrain.json").write_text(text, encoding="utf-8")

    files.write_files(folder, write)


@torch.no_grad()
def plain_from_projected(source: str) -> tuple[PreTrainedModel, Tensor]:
    """(ordinary model with the folded head, P) from a ``causal_lm_with_hidden_projection`` folder or hub name.

    Raises:
        ArchitectureError, CheckpointError: an unsupported backbone, or files that do not fit together.
    """
    config = shadow_config_of(source)
    backbone = load_source(source, config, {})
    projection, head = read_projection(source), projected_tensors(source).get("lm_head.weight")
    if projection is None or head is None:
        raise CheckpointError(f"{source} is no complete projected shadow: it lacks its projection or lm_head.weight")
    config.tie_word_embeddings = False
    with torch.device("meta"):
        model_class: Any = AutoModelForCausalLM._model_mapping[type(config)]
        model: PreTrainedModel = model_class(config)
    if head_of(model).bias is not None:
        raise ArchitectureError(f"a {config.model_type} head has a bias, which the projected format does not store")
    setattr(model, model.base_model_prefix, cast(backbone, projection.dtype))
    folded = nn.Linear(projection.shape[1], head.shape[0], bias=False, device="meta")
    folded.weight = nn.Parameter(head.to(projection.dtype) @ projection, requires_grad=False)
    model.set_output_embeddings(folded)
    backbone.config = config
    model.generation_config = GenerationConfig.from_model_config(config)
    return model.eval(), projection


@torch.no_grad()
def write_projected(source: str, base: PreTrainedModel, folder: Path) -> None:
    """A pretrained shadow of ours in the authors' projected format, with the base's head, which that format repeats.

    Raises:
        ArchitectureError: the base's head scales, caps or has a bias.
        CheckpointError: the shadow was not pretrained for this base.
    """
    plain = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    head = head_of(base)
    if finish_of(base.config) != (1.0, None) or head.bias is not None:
        raise ArchitectureError(
            f"the head of a {base.config.model_type} base scales or caps its logits, or has a bias; the projected "
            "format has a plain head"
        )
    projection = read_projection(source)
    if projection is None:
        projection = torch.eye(plain.config.hidden_size, dtype=plain.dtype)
    if head.weight.shape[1] != projection.shape[0]:
        raise CheckpointError(
            f"the projection in {source} leads to width {projection.shape[0]}, this base has {head.weight.shape[1]}; "
            "pass the base it was pretrained for"
        )
    folded, stored = head.weight.float() @ projection.float(), head_of(plain).weight.float()
    if (folded - stored).norm() > _SAME_HEAD * stored.norm():
        raise CheckpointError(f"the head of this base is not the one folded into {source}; pass the base it was pretrained for")
    backbone = plain.base_model
    tensors = {f"shadow_model.{name}": tensor for name, tensor in backbone.state_dict().items()}
    tensors |= {"shadow_hidden_projection.weight": projection, "lm_head.weight": head.weight}
    kept = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    values = _projected_config(plain, head)

    def write(staging: Path) -> None:
        save_file(kept, staging / "model.safetensors", metadata={"format": "pt"})
        (staging / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    files.write_files(folder, write)


def _projected_config(plain: PreTrainedModel, head: nn.Linear) -> dict[str, Any]:
    model_class, config_class = type(plain.base_model), type(plain.config)
    return {
        "architectures": ["AutoModelForCausalLMWithHiddenProjection"],
        "base_hidden_size": head.weight.shape[1],
        "hidden_size": head.weight.shape[1],
        "model_type": PROJECTED_TYPE,
        "shadow_model_class": f"{model_class.__module__}:{model_class.__name__}",
        "shadow_model_config": plain.config.to_dict(),
        "shadow_model_config_class": f"{config_class.__module__}:{config_class.__name__}",
        "tie_word_embeddings": False,
        "vocab_size": head.weight.shape[0],
    }
