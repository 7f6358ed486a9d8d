"""TRL's trainers on a shadow model. Needs the package ``trl`` (1.16 or newer); nothing else here imports this module.

TRL scores tokens with a head of its own, behind ``model.base_model``. Of a shadow model that is the base without its
shadow, so TRL's trainers refuse it as it comes. The classes here are those trainers with what a shadow needs.
"""

from functools import partial
from typing import Any, cast

from torch import nn
from transformers import Trainer

from shadowpeft.errors import AdapterError, ConfigError
from shadowpeft.model.tasks import ShadowModelForCausalLM
from shadowpeft.train.sources import MissingPackageError
from shadowpeft.train.trainer import ShadowTrainer

try:
    from trl import DPOTrainer, SFTTrainer  # type: ignore[import-not-found]
except ImportError as error:
    raise MissingPackageError(
        "shadowpeft.train.trl_trainers needs the package `trl`, 1.16 or newer: pip install 'shadowpeft[trl]'"
    ) from error


class _ModelLoss(SFTTrainer):
    """SFTTrainer whose loss is the model's own, as in transformers' Trainer."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        return Trainer.compute_loss(self, *args, **kwargs)


class ShadowSFTTrainer(ShadowTrainer, _ModelLoss):
    """TRL's SFTTrainer with the model's own loss: both terms of Eq. 8, and no logits kept.

    Data sets, packing, completion-only and assistant-only loss are TRL's; so are all arguments but
    ``shadow_lr_multiplier`` (and ``head_lr_multiplier``, which finds no heads here). The parts of the loss are logged in
    place of TRL's entropy and token accuracy, which need logits. Packing needs ``sdpa`` or flash attention; with another
    kernel TRL's rows would see each other.

    Raises:
        ConfigError: a loss other than the model's is asked for, or packing with a kernel that does not keep rows apart.
        AdapterError: the model is no causal language model with a shadow.
    """

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        _check_model(model)
        super().__init__(model, *args, **kwargs)
        loss_type = cast(Any, self.args).loss_type
        if loss_type != "nll" or self.compute_loss_func is not None:
            raise ConfigError(
                f"ShadowSFTTrainer trains the model's own loss; loss_type={loss_type!r} or a compute_loss_func "
                "would replace it: use loss_type='nll' and no compute_loss_func"
            )
        kernel = model.config._attn_implementation
        if self.padding_free and kernel != "sdpa" and not str(kernel).startswith("flash"):
            raise ConfigError(
                f"packed rows are told apart by sdpa and flash attention, not by {kernel!r}; load the base with "
                "attn_implementation='sdpa' or leave packing off"
            )


class AttachedHead:
    """To be named in front of a trainer of TRL that scores tokens itself: its head then reads the attached model.

    ``class ShadowKTOTrainer(AttachedHead, KTOTrainer)`` would be one. The loss is TRL's alone: the shadow is trained
    through the base, and its own loss (Eq. 8) has no part in it.
    """

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        _check_model(model)
        super().__init__(model, *args, **kwargs)  # type: ignore[call-arg]
        for scored in (self.model, getattr(self, "ref_model", None)):  # type: ignore[attr-defined]
            if isinstance(scored, ShadowModelForCausalLM):
                # No bound method: accelerate binds those anew, to the model itself.
                scored.forward = partial(scored.forward.__func__, _Scored(scored))  # type: ignore[method-assign]


class ShadowDPOTrainer(AttachedHead, ShadowTrainer, DPOTrainer):  # type: ignore[misc]
    """TRL's DPOTrainer with the same model, its adapter disabled, as the reference: no second base in memory.

    Any other ``ref_model`` may be given. ``disable_dropout``, on by default in TRL, reaches the shadow's too. Tried in one
    process; sharding would prepare the base twice and is refused.

    Raises:
        ConfigError: the weights are to be sharded, or the reference is to follow the model.
        AdapterError: the model is no causal language model with a shadow.
    """

    def __init__(self, model: Any, ref_model: nn.Module | None = None, **kwargs: Any) -> None:
        _check_model(model)
        if getattr(kwargs.get("args"), "sync_ref_model", False):  # it would mix the base, weight by weight, with itself
            raise ConfigError("sync_ref_model=True moves the reference's weights, which are the model's own here; leave it out")
        super().__init__(model, ref_model=model.get_base_model() if ref_model is None else ref_model, **kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ConfigError("ShadowDPOTrainer shares the base with its reference, so it cannot shard it; use DDP")

    def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, **kwargs: Any) -> Any:  # type: ignore[override]
        arguments, adapted = cast(Any, self.args), cast(ShadowModelForCausalLM, self.accelerator.unwrap_model(self.model))
        if arguments.disable_dropout:
            for part in adapted.network().step_parts:
                part.eval()
        return DPOTrainer.compute_loss(self, model, inputs, return_outputs, **kwargs)

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        return DPOTrainer.prediction_step(self, *args, **kwargs)


class _Scored:
    """What TRL's head reads of a model."""

    def __init__(self, model: ShadowModelForCausalLM) -> None:
        self._model = model

    def base_model(self, *args: Any, **inputs: Any) -> Any:
        return self._model.last_hidden_states(*args, **inputs)

    def get_output_embeddings(self) -> nn.Module | None:
        return self._model.get_output_embeddings()


def _check_model(model: Any) -> None:
    if not isinstance(model, ShadowModelForCausalLM):
        raise AdapterError(
            f"expected a causal language model with a shadow, not {type(model).__name__}; make one with "
            "get_shadow_model(base, config)"
        )
