"""An adapted model that has shapes and no weights: built on the meta device, traced with fake tensors."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedConfig

from shadowpeft.core import ShadowConfig, ShadowNetwork
from shadowpeft.errors import ArchitectureError
from shadowpeft.model import ShadowModel
from shadowpeft.model.architectures import blocks_of, decoder_of
from shadowpeft.model.backbones import empty_backbone
from shadowpeft.model.bases import EMBEDDED, location
from shadowpeft.model.build import assemble_network, build_network, refuse_idle
from shadowpeft.model.pretrained import shadow_config_of
from shadowpeft.model.tasks import task_model_class


@dataclass(frozen=True, kw_only=True)
class Skeleton:
    """Shapes of a base with a fresh shadow, in training mode.

    Attributes:
        model: its tensors are fake ones of ``mode``, on the fake device ``cpu``: they have no memory.
        dtype: of the base.
    """

    model: ShadowModel
    mode: FakeTensorMode
    dtype: torch.dtype

    @property
    def network(self) -> ShadowNetwork:
        return self.model.network()

    def parameters(self) -> dict[str, int]:
        """Numbers of parameters of the base, the shadow and the trained part, each shared tensor once."""
        return {
            "base": sum(p.numel() for p in self.model.base.parameters()),
            "shadow": self.network.num_parameters(),
            "trainable": self.network.num_parameters(only_trainable=True),
        }

    def block_bytes(self) -> list[int]:
        """Bytes of every block of base and shadow: the units that FSDP gathers one after the other."""
        blocks = [*blocks_of(decoder_of(self.model.base)), *blocks_of(self.network.backbone)]
        return [bytes_of(block.parameters()) for block in blocks]


def build_skeleton(
    model: str, shadow: ShadowConfig, *, dtype: str = "auto", labels: int | None = None, checkpointing: bool = False
) -> Skeleton:
    """The skeleton of ``model`` (folder, config.json, hub name or 'embedded') with the shadow that ``shadow`` describes.

    Args:
        dtype: of the base; ``auto``: what its config says.
        labels: classes of a sequence classifier; None for a language model.
        checkpointing: whether blocks are computed again in the backward pass.

    Raises:
        ArchitectureError: there is no config, or the base cannot carry a shadow.
        ConfigError: the shadow's settings do not fit the base.
    """
    config = read_config(model)
    chosen = _dtype(model, config, dtype)
    auto: Any = AutoModelForCausalLM
    if labels is not None:
        auto, config.num_labels = AutoModelForSequenceClassification, labels
    with torch.device("meta"):
        try:
            base = auto.from_config(config, dtype=chosen)
        except ValueError as error:
            raise ArchitectureError(f"{model!r} is no language model: {str(error).splitlines()[0]}") from error
        base.name_or_path = model
        shadow = shadow.replace(task_type="CAUSAL_LM" if labels is None else "SEQ_CLS")
        network = _network(base, shadow)
        adapted = task_model_class(base)(base, None)
        adapted._register(adapted.active_adapter, network)
    if checkpointing:
        enable_checkpointing(adapted)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        _give_fake_memory(adapted)
    return Skeleton(model=adapted.train(), mode=mode, dtype=chosen)


def enable_checkpointing(model: Any) -> None:
    """Recomputes blocks in the backward pass, under whichever of its two names this release of transformers has it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def read_config(model: str) -> PreTrainedConfig:
    """
    Raises:
        ArchitectureError: nothing there, or not the config of a model that transformers knows.
    """
    try:
        return AutoConfig.from_pretrained(location(model))
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ArchitectureError(
            f"cannot read the config of {model!r}: {reason}. Pass a folder, a config.json, a hub name, or {EMBEDDED!r}"
        ) from error


def read_dtype(model: str, dtype: str) -> torch.dtype:
    """The dtype a base is loaded in; ``auto``: what its config says."""
    return _dtype(model, read_config(model), dtype)


def _dtype(model: str, config: PreTrainedConfig, dtype: str) -> torch.dtype:
    if dtype != "auto":
        return getattr(torch, dtype)
    if model == EMBEDDED:
        return torch.float32  # as it is loaded, whatever it is stored in
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32


def _network(base: Any, shadow: ShadowConfig) -> ShadowNetwork:
    """As for training, but of a pretrained shadow the config alone is read."""
    refuse_idle(shadow)
    if shadow.is_implicit or shadow.truncation is not None:
        return build_network(base, shadow)
    backbone = empty_backbone(base, shadow_config_of(str(shadow.shadow_model)), keep_embeddings=not shadow.shares_embeddings)
    return assemble_network(base, shadow, backbone)


def _give_fake_memory(model: nn.Module) -> None:
    """Meta tensors become fake ones on a CPU; what is shared stays shared."""
    made: dict[int, Any] = {}

    def fake(tensor: Any) -> Any:
        if id(tensor) not in made:
            empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            is_weight = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_weight else empty
        return made[id(tensor)]

    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in list(table.items()):
                table[name] = None if tensor is None else fake(tensor)


def bytes_of(tensors: Any) -> int:
    """Bytes of tensors, each storage once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in list(tensors)}.values())
