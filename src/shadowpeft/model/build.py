"""From a base and a config to a network that is ready to train."""

import copy
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from shadowpeft.core import ShadowConfig, ShadowNetwork
from shadowpeft.errors import ConfigError
from shadowpeft.model.architectures import blocks_of, check_base, check_midpoints, decoder_of
from shadowpeft.model.backbones import embedding_width, explicit_backbone, implicit_backbone
from shadowpeft.model.placement import place
from shadowpeft.model.pretrained import load_projection
from shadowpeft.model.truncate import truncated_backbone

Cast = TypeVar("Cast", bound=nn.Module)


def is_classifier(base: PreTrainedModel) -> bool:
    return type(base).__name__.endswith("ForSequenceClassification")


def build_network(base: PreTrainedModel, config: ShadowConfig, **load_options: Any) -> ShadowNetwork:
    """A fresh network for ``base``; nothing of the base is changed.

    Raises:
        ArchitectureError: the base cannot carry a shadow.
        ConfigError: the config does not fit the base, or asks for what would do nothing.
    """
    check_base(base, first_block=config.first_block)
    if config.has_midpoints:
        check_midpoints(base.config)
    if not all(weight.is_meta for weight in base.parameters()):  # else it is counted only, sizes that do nothing among others
        refuse_idle(config)
    expected = "SEQ_CLS" if is_classifier(base) else "CAUSAL_LM"
    if config.task_type != expected:
        raise ConfigError(f"task_type={config.task_type!r} does not fit {type(base).__name__}; use {expected!r}")
    network = assemble_network(base, config, initial_backbone(base, config, **load_options))
    if config.is_explicit:
        load_projection(network, config.shadow_model, **load_options)
    return network


def refuse_idle(config: ShadowConfig) -> None:
    """Refuses settings of a new adapter that nothing would follow; those that are saved may have some and load.

    Raises:
        ConfigError: sizes for a shadow that brings its own, or distillation of next tokens into a classifier.
    """
    if config.task_type == "SEQ_CLS" and config.distillation_weight:
        raise ConfigError(
            f"distillation_weight={config.distillation_weight} would be ignored: it distils next tokens, and a classifier has "
            "none; leave it 0, and raise auxiliary_loss_weight for a better shadow"
        )
    if config.idle_sizes:
        asked = ", ".join(f"{name}={value}" for name, value in config.idle_sizes.items())
        raise ConfigError(
            f"{asked} would be ignored: the shadow_model={config.shadow_model!r} brings its own sizes; leave them out, or use "
            "shadow_model='implicit', whose sizes can be chosen"
        )


def initial_backbone(base: PreTrainedModel, config: ShadowConfig, **load_options: Any) -> PreTrainedModel:
    """The backbone that a fresh adapter starts from, in fp32."""
    if config.truncation is not None:
        return truncated_backbone(base, config)
    if config.is_implicit:
        return implicit_backbone(base, config)
    return explicit_backbone(base, config, **load_options)


def assemble_network(base: PreTrainedModel, config: ShadowConfig, backbone: PreTrainedModel) -> ShadowNetwork:
    """Wraps a backbone into a network of the base's shape, on its device (or devices) and in the adapter's dtype."""
    network = ShadowNetwork(
        config,
        backbone,
        width=decoder_of(base).config.hidden_size,
        num_blocks=len(blocks_of(decoder_of(base))),
        backbone_width=backbone.config.hidden_size,
        embedding_width=embedding_width(base) if config.shares_embeddings else None,
        num_labels=base.config.num_labels if is_classifier(base) else None,
    )
    if is_classifier(base):
        copy_head(base, network)
    dtype = base.dtype if config.adapter_dtype == "base" else getattr(torch, config.adapter_dtype)
    return place(cast(network, dtype), base)


def cast(module: Cast, dtype: torch.dtype) -> Cast:
    """The module, in place, with all that is saved of it in ``dtype``.

    What is not saved stays as it was made: rotary frequencies, which transformers makes and reads in fp32 whatever a
    model's dtype; rounded to bf16 they are off by up to 0.2 %, which is whole radians a thousand tokens on.
    """
    saved = module.state_dict().keys()
    unsaved = [(name, buffer) for name, buffer in module.named_buffers(remove_duplicate=False) if name not in saved]
    module.to(dtype=dtype)
    for name, buffer in unsaved:
        owner, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(owner), attribute, buffer)
    return module


def copy_head(base: PreTrainedModel, network: ShadowNetwork) -> None:
    """Both trained heads start as copies of the base's, so the adapted model starts equal to the base."""
    score: Any = base.score
    for head in (network.head, network.shadow_head):
        assert isinstance(head, nn.Linear)
        if not head.weight.is_meta:
            head.load_state_dict(copy.deepcopy(score.state_dict()))


def set_trainable(network: ShadowNetwork, trainable: bool) -> None:
    """Switches gradients of all weights, but for what the config keeps frozen."""
    network.requires_grad_(trainable)
    for part in frozen_parts(network):
        part.requires_grad_(False)


def frozen_parts(network: ShadowNetwork) -> list[nn.Module]:
    """What training leaves as it is: a pretrained shadow, or its own token table."""
    config = network.config
    if config.freeze_backbone:
        return [network.backbone]
    has_frozen_table = not config.is_implicit and not config.shares_embeddings and config.freeze_embeddings
    return [network.backbone.get_input_embeddings()] if has_frozen_table else []
