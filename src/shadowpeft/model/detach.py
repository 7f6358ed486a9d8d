"""The stand-alone shadow as an ordinary model: ``head(proj(f_shadow(x)))`` with every projection folded away."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel

from shadowpeft.core import ShadowNetwork
from shadowpeft.errors import ArchitectureError
from shadowpeft.model.architectures import architecture_of, finish_of, head_of
from shadowpeft.model.build import is_classifier


@torch.no_grad()
def detached_model(base: PreTrainedModel, network: ShadowNetwork) -> PreTrainedModel:
    """A plain model of the backbone's class; see :meth:`ShadowModel.detach`.

    Raises:
        ArchitectureError: the base's head does to its logits what the backbone's class cannot do, or writes other tokens than
            the shadow's own table has.
    """
    config = copy.deepcopy(network.backbone.config)
    config.vocab_size = _num_tokens(base, network)
    config.tie_word_embeddings = False
    scale = 1.0 if is_classifier(base) else _settle_finish(base.config, config)
    if config.pad_token_id is None:
        config.pad_token_id = base.config.pad_token_id  # a classifier pools in front of it
    if is_classifier(base):
        config.id2label, config.label2id = base.config.id2label, base.config.label2id
        config.problem_type = base.config.problem_type
    shared: Any = base.get_input_embeddings()
    detached = _empty(base, config)
    if scale == 1.0 and _is_tied(base, network, template=detached.get_input_embeddings()):
        config.tie_word_embeddings = True
        detached = _empty(base, config)  # which of its weights are one is settled when a model is made
    # Copied: the detached model must not change when the adapter is trained on.
    backbone = copy.deepcopy(network.backbone).requires_grad_(False)
    weights: dict[int, Any] = {}
    table = None
    if network.config.shares_embeddings:
        table = _embedding(shared, network, template=detached.get_input_embeddings())
        backbone.set_input_embeddings(_own_module(table, weights))
    # A tied table is cast once, and the head is made of the result.
    cast_table = table.weight if config.tie_word_embeddings and table is not None and table is not shared else None
    head = _head(base, network, scale, cast_table)
    _share_config(backbone, config)
    setattr(detached, detached.base_model_prefix, backbone)
    if is_classifier(base):
        detached.score = head
    else:
        head = _with_bias_of(detached.get_output_embeddings(), head, base, config)
        detached.set_output_embeddings(_own_module(head, weights))
        detached.generation_config = copy.deepcopy(base.generation_config)
    return detached.eval()


def _num_tokens(base: PreTrainedModel, network: ShadowNetwork) -> int:
    """Of the table that the detached model reads; the base may have been resized since its adapter was made."""
    owner: Any = base if network.config.shares_embeddings else network.backbone
    num_read = owner.get_input_embeddings().weight.shape[0]
    num_written = num_read if is_classifier(base) else head_of(base).weight.shape[0]
    if num_read != num_written:
        raise ArchitectureError(
            f"the shadow's table has {num_read} tokens and the base's head {num_written}, as after resizing the base, so this "
            "shadow cannot become an ordinary model; resize both before get_shadow_model"
        )
    return num_read


def _empty(base: PreTrainedModel, config: PreTrainedConfig) -> Any:
    with torch.device("meta"):
        return _task_class(base, config)(config)


def _is_tied(base: PreTrainedModel, network: ShadowNetwork, *, template: Any) -> bool:
    """Whether one table can be the detached model's embeddings and head, as it is the base's; its dtype does not matter."""
    shared: Any = base.get_input_embeddings()
    if is_classifier(base) or not network.config.shares_embeddings or network.projection is not None:
        return False
    return head_of(base).weight is shared.weight and _is_same_lookup(shared, network, template)


def _own_module(module: nn.Module, weights: dict[int, Any]) -> nn.Module:
    """``module`` again over the same memory, so that a cast, a move or a thaw of the detached model ends there.

    Args:
        weights: what stands for a parameter, by its id: one of the base's that two modules share stays one.
    """
    parameters = list(module.parameters())
    if any(parameter.is_meta for parameter in parameters):
        return module  # offloaded: only the base's own hook knows where the numbers are
    for parameter in parameters:
        weights.setdefault(id(parameter), nn.Parameter(parameter.detach(), requires_grad=False))
    return copy.deepcopy(module, weights)


def _share_config(backbone: PreTrainedModel, config: PreTrainedConfig) -> None:
    """One config for all parts, so that a change of kernels on the detached model reaches its blocks."""
    for module in backbone.modules():
        part: Any = module
        if isinstance(getattr(part, "config", None), PreTrainedConfig):
            part.config = config


def _task_class(base: PreTrainedModel, config: PreTrainedConfig) -> Any:
    if type(base.config) is type(config):
        return type(base)
    auto = AutoModelForSequenceClassification if is_classifier(base) else AutoModelForCausalLM
    if type(config) not in auto._model_mapping:
        raise ArchitectureError(f"there is no {auto.__name__} for {config.model_type}; use this shadow attached")
    return auto._model_mapping[type(config)]


_NEUTRAL = {"logit_scale": 1.0, "logits_scaling": 1.0, "final_logit_softcapping": None}


def _settle_finish(base: PreTrainedConfig, shadow: PreTrainedConfig) -> float:
    """Gives the detached ``shadow`` config the base's scale or cap; returns the factor its head has to take over.

    Raises:
        ArchitectureError: the base caps its logits and the shadow's class cannot.
    """
    theirs, ours = architecture_of(base).finish_field, architecture_of(shadow).finish_field
    if theirs == ours:
        if theirs is not None:
            setattr(shadow, theirs, getattr(base, theirs))
        return 1.0
    factor, cap = finish_of(base)
    if cap is not None:
        raise ArchitectureError(
            f"a {base.model_type} head caps its logits ({theirs}={cap}) in a way that a {shadow.model_type} model does "
            "not, so this shadow cannot become an ordinary model; use it attached"
        )
    if ours is not None:
        setattr(shadow, ours, _NEUTRAL[ours])
    return factor


def _embedding(shared: nn.Embedding, network: ShadowNetwork, *, template: Any) -> nn.Embedding:
    """The base's token table, or that table seen through W_in, as a module of the detached model's own class."""
    if _is_same_lookup(shared, network, template):
        return shared if shared.weight.dtype == network.dtype else _cast_table(shared, network.dtype)
    tokens = torch.arange(shared.num_embeddings, device=shared.weight.device)
    table = shared(tokens).to(network.dtype)
    if network.embedding_projection is not None:
        table = network.embedding_projection(table)
    scale = getattr(template, "scalar_embed_scale", None)
    options = {} if scale is None else {"embed_scale": scale}
    folded = type(template)(*table.shape, template.padding_idx, **options)
    folded.weight = nn.Parameter(table if scale is None else table / scale, requires_grad=False)
    return folded.to(table.device)


def _cast_table(shared: nn.Embedding, dtype: torch.dtype) -> nn.Embedding:
    table: Any = copy.deepcopy(shared).to(dtype)
    factor = getattr(shared, "scalar_embed_scale", None)
    if factor is not None:  # in no file: transformers makes it anew, without the rounding of a 16-bit base
        table.embed_scale = torch.tensor(factor, device=table.embed_scale.device)
    return table


def _is_same_lookup(shared: nn.Embedding, network: ShadowNetwork, template: Any) -> bool:
    """Whether the detached model's class makes of the base's table what the shadow is fed with."""
    # Gemma's table multiplies what it looks up; the class that loads this one will do so with its own factor.
    factors = [getattr(table, "scalar_embed_scale", None) for table in (shared, template)]
    return network.embedding_projection is None and type(shared) is type(template) and factors[0] == factors[1]


def _head(base: PreTrainedModel, network: ShadowNetwork, scale: float, table: Tensor | None) -> nn.Linear:
    """``scale * W_head W_proj`` (Eq. 10 folded), with the head's bias where it has one; over ``table`` if that is given."""
    head = network.shadow_head if is_classifier(base) else base.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    if table is not None:
        return _over(table, None if head.bias is None else head.bias.to(table.dtype))
    if network.projection is None and head.weight.dtype == network.dtype and scale == 1.0:
        return head if not is_classifier(base) else copy.deepcopy(head).requires_grad_(False)
    weight = head.weight.to(network.dtype)
    if network.projection is not None:
        weight = weight @ network.projection.weight
    return _linear(weight * scale, None if head.bias is None else head.bias * scale)


def _with_bias_of(template: nn.Linear, head: nn.Linear, base: PreTrainedModel, config: PreTrainedConfig) -> nn.Linear:
    """``head`` with a bias if, and only if, the detached model's class has one.

    Raises:
        ArchitectureError: the head's bias has no place in that class; a reload would lose it without a word.
    """
    if head.bias is not None and template.bias is None:
        raise ArchitectureError(
            f"the head of {type(base).__name__} has a bias, that of a {config.model_type} model has none, so this "
            "shadow cannot become an ordinary model; use it attached"
        )
    if head.bias is None and template.bias is not None:
        return _over(head.weight, head.weight.new_zeros(head.out_features))
    return head


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    bias = None if bias is None else bias.to(weight.dtype).clone()
    return _over(nn.Parameter(weight.clone(), requires_grad=False), bias)


def _over(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A head whose weight is that very parameter, so that one which is the token table too stays it."""
    assert isinstance(weight, nn.Parameter)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = weight
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear
