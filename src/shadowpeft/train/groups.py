"""Which weights are trained at which multiple of the learning rate, by ShadowTrainer and by an optimizer of one's own."""

from typing import Any

from torch import nn

from shadowpeft.core import ShadowNetwork
from shadowpeft.model import ShadowModel


def parameter_groups(
    model: ShadowModel,
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
    head_lr_multiplier: float = 1.0,
    adapter_name: str | None = None,
) -> list[dict[str, Any]]:
    """The adapter's trained weights as groups for ``torch.optim.AdamW``.

    The shadow backbone's get ``config.shadow_lr_multiplier`` of the learning rate; only matrices decay, as in
    :class:`~shadowpeft.train.ShadowTrainer`.

    Args:
        learning_rate: of the steps and the projection.
        head_lr_multiplier: that of a classifier's heads, as a multiple of it.
        adapter_name: whose weights; None: the active adapter's.
    """
    network = model.network(adapter_name)
    parts = multiplied_parts(network, heads=head_lr_multiplier)
    multipliers = {parameter: multiplier for part, multiplier in parts for parameter in part}
    groups: dict[tuple[float, float], list[Any]] = {}
    for parameter in network.parameters():
        if parameter.requires_grad:
            rate = learning_rate * multipliers.get(parameter, 1.0)
            groups.setdefault((rate, weight_decay if parameter.ndim > 1 else 0.0), []).append(parameter)
    return [{"params": found, "lr": rate, "weight_decay": decay} for (rate, decay), found in groups.items()]


def multiplied_parts(
    model: nn.Module, *, heads: float, backbone: float | None = None
) -> list[tuple[list[nn.Parameter], float]]:
    """(weights, multiple of the learning rate) of every part with one of its own; all other weights have the rate as it is.

    Args:
        model: a network, or any other model, which has heads alone.
        heads: the multiple of classification heads.
        backbone: that of the shadow backbone; None: what the network's config says.
    """
    parts = [(heads_of(model), heads)]
    if isinstance(model, ShadowNetwork):
        multiplier = model.config.shadow_lr_multiplier if backbone is None else backbone
        parts.insert(0, (list(model.backbone.parameters()), multiplier))
    return parts


def heads_of(model: nn.Module) -> list[nn.Parameter]:
    """The weights of classification heads: a network's two, or transformers' one; none in a language model."""
    if isinstance(model, ShadowNetwork):
        return [weight for head in (model.head, model.shadow_head) if head is not None for weight in head.parameters()]
    return [parameter for name, parameter in model.named_parameters() if "score" in name.split(".")]
