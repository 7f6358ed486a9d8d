"""The stand-alone shadow as an ordinary model: ``head(proj(f_shadow(x)))`` with every projection folded away."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel

from shadowpeft.core import ShadowNetwork
from shadowpeft.errors import ArchitectureError
from shadowpeft.model.architectures import architecture_of
from shadowpeft.model.build import is_classifier


@torch.no_grad()
def detached_model(base: PreTrainedModel, network: ShadowNetwork) -> PreTrainedModel:
    """A plain model of the backbone's class; see :meth:`ShadowModel.detach`.

    Raises:
        ArchitectureError: the base's head does to its logits what the backbone's class cannot do.
    """
    _check_same_finish(base.config, network.backbone.config)
    config = copy.deepcopy(network.backbone.config)
    head = _head(base, network)
    shared: Any = base.get_input_embeddings()
    config.tie_word_embeddings = network.config.shares_embeddings and head.weight is shared.weight
    if is_classifier(base):
        config.id2label, config.label2id = base.config.id2label, base.config.label2id
    with torch.device("meta"):
        detached: Any = _task_class(base, config)(config)
    # Copied: the detached model must not change when the adapter is trained on.
    backbone = copy.deepcopy(network.backbone).requires_grad_(False)
    if network.config.shares_embeddings:
        backbone.set_input_embeddings(_embedding(shared, network, template=detached.get_input_embeddings()))
    backbone.config = config
    setattr(detached, detached.base_model_prefix, backbone)
    if is_classifier(base):
        detached.score = head
    else:
        detached.set_output_embeddings(head)
        detached.generation_config = copy.deepcopy(base.generation_config)
    return detached.eval()


def _task_class(base: PreTrainedModel, config: PreTrainedConfig) -> Any:
    if type(base.config) is type(config):
        return type(base)
    auto = AutoModelForSequenceClassification if is_classifier(base) else AutoModelForCausalLM
    return auto._model_mapping[type(config)]


def _check_same_finish(base: PreTrainedConfig, shadow: PreTrainedConfig) -> None:
    if architecture_of(base).finish is not architecture_of(shadow).finish:
        raise ArchitectureError(
            f"a {base.model_type} head scales or caps its logits in a way that a {shadow.model_type} model does not, "
            "so this shadow cannot become an ordinary model; use it attached"
        )


def _embedding(shared: nn.Embedding, network: ShadowNetwork, *, template: Any) -> nn.Embedding:
    """The base's token table, or that table seen through W_in, as a module of the detached model's own class."""
    if network.embedding_projection is None:
        return shared if shared.weight.dtype == network.dtype else copy.deepcopy(shared).to(network.dtype)
    tokens = torch.arange(shared.num_embeddings, device=shared.weight.device)
    table = network.embedding_projection(shared(tokens).to(network.dtype))
    # Gemma's table multiplies what it looks up; the class that loads this one will do so with its own width.
    scale = getattr(template, "scalar_embed_scale", None)
    options = {} if scale is None else {"embed_scale": scale}
    folded = type(template)(*table.shape, template.padding_idx, **options)
    folded.weight = nn.Parameter(table if scale is None else table / scale, requires_grad=False)
    return folded.to(table.device)


def _head(base: PreTrainedModel, network: ShadowNetwork) -> nn.Linear:
    """``W_head W_proj`` (Eq. 10 folded), with the head's bias where it has one."""
    head = network.shadow_head if is_classifier(base) else base.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    if network.projection is None and head.weight.dtype == network.dtype:
        return head if not is_classifier(base) else copy.deepcopy(head).requires_grad_(False)
    weight = head.weight.to(network.dtype)
    if network.projection is not None:
        weight = weight @ network.projection.weight
    return _linear(weight, head.bias)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.to(weight.dtype).clone(), requires_grad=False)
    return linear
