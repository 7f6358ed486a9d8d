"""Optimizers that train a shadow at one rate with the steps although its adapter asks for another."""

import warnings
from functools import cache
from typing import Any
from weakref import WeakSet

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from shadowpeft.core import ShadowNetwork

# Networks whose ``shadow_lr_multiplier`` no optimizer has been asked about yet.
_watched: WeakSet[ShadowNetwork] = WeakSet()


def watch(network: ShadowNetwork) -> None:
    """Lets the first optimizer that trains the network's shadow say so if it does not follow ``shadow_lr_multiplier``.

    transformers' own Trainer and a plain ``AdamW(model.parameters())`` do not, and nothing else would tell.
    """
    if network.config.shadow_lr_multiplier != 1.0:
        _look_at_optimizers()
        _watched.add(network)


def settle(network: ShadowNetwork) -> None:
    """The network's rates are seen to."""
    _watched.discard(network)


@cache
def _look_at_optimizers() -> None:
    """Once a process: from now on every step of an optimizer asks whether something is watched, which is all it costs."""
    register_optimizer_step_pre_hook(_look)


def _look(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling():
        return  # the step is traced, and this is no part of it
    for network in list(_watched):
        shadow = {weight for weight in network.backbone.parameters() if weight.requires_grad}
        others = {weight for weight in network.parameters() if weight.requires_grad} - shadow
        groups = [set(group["params"]) for group in optimizer.param_groups]
        trained = [group for group in groups if group & shadow]
        if not trained:
            continue
        settle(network)
        if any(group & others for group in trained):
            warnings.warn(
                f"this optimizer trains the shadow at the learning rate of the steps, and the adapter asks for "
                f"{network.config.shadow_lr_multiplier} times that (shadow_lr_multiplier); train with "
                "shadowpeft.train.ShadowTrainer or make the optimizer of shadowpeft.train.parameter_groups(model, "
                "learning_rate=...), or set shadow_lr_multiplier=1.0 if one rate is meant",
                stacklevel=2,
            )
