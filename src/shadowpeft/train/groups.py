"""What an optimizer of one's own needs to train a shadow as ShadowTrainer does."""

from typing import Any

from shadowpeft.model import ShadowModel


def parameter_groups(
    model: ShadowModel, *, learning_rate: float, weight_decay: float = 0.0, adapter_name: str | None = None
) -> list[dict[str, Any]]:
    """The adapter's trained weights as groups for ``torch.optim.AdamW``.

    The shadow backbone's get ``config.shadow_lr_multiplier`` of the learning rate; only matrices decay, as in
    :class:`~shadowpeft.train.ShadowTrainer`.

    Args:
        learning_rate: of the steps, the projection and the heads.
        adapter_name: whose weights; None: the active adapter's.
    """
    network = model.network(adapter_name)
    backbone = {id(parameter) for parameter in network.backbone.parameters()}
    groups: dict[tuple[float, float], list[Any]] = {}
    for parameter in network.parameters():
        if parameter.requires_grad:
            rate = learning_rate * (network.config.shadow_lr_multiplier if id(parameter) in backbone else 1.0)
            groups.setdefault((rate, weight_decay if parameter.ndim > 1 else 0.0), []).append(parameter)
    return [{"params": found, "lr": rate, "weight_decay": decay} for (rate, decay), found in groups.items()]
