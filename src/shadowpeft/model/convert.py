"""The same weights under other names: the layouts of the authors' ``shadow-peft`` and of Hugging Face ``peft``.

Tensors only; the peers' config files are another matter. Both peers store some that they never use: the update
behind the last block, which feeds nothing, and, for a shadow that shares embeddings, a token table of its own unless
it is called ``embed_tokens`` (so with GPT-2). Those are dropped on reading and written as zeros.

Tensors keep their dtype and device; one that needs no rearranging shares its memory with what it was made from.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shadowpeft.core import ShadowConfig, ShadowNetwork
from shadowpeft.core.step import Update
from shadowpeft.errors import CheckpointError, ConfigError
from shadowpeft.model.architectures import architecture_of, blocks_of, decoder_of

_FORMULA = (
    *("inject_from", "use_update", "share_steps", "update_norm", "update_activation", "update_bias"),
    *("scale_state", "inject_diagonal", "inject_between"),  # inject_activation and inject_branch need scale_state
)
_DROPOUT = ("dropout_at", "transform_dropout")
_STACKS = ("shadow_injection_model.injection_downs", "shadow_injection_model.injection_ups")


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """How a peer stores a network.

    Attributes:
        peer: its name in messages.
        rename: from our name of a tensor to the peer's.
        transposed: matches our names of those that we store [in, out] and the peer [out, in].
        unused: shapes, under names in our style, of what only the peer has.
    """

    peer: str
    rename: Callable[[str], str]
    transposed: re.Pattern[str]
    unused: dict[str, tuple[int, ...]]

    def read(self, tensors: Mapping[str, Tensor], network: ShadowNetwork) -> dict[str, Tensor]:
        state = network.state_dict()
        names = {name: self.rename(name) for name in state}
        self._check_names(tensors, set(names.values()))
        found = {name: self._turn(name, tensors[theirs]) for name, theirs in names.items()}
        for name, tensor in found.items():
            if tensor.shape != state[name].shape:
                raise CheckpointError(
                    f"{self.peer}'s {names[name]!r} would make {name!r} {list(tensor.shape)}, but this network has it "
                    f"{list(state[name].shape)}; check the base and the sizes it was made with"
                )
        return found

    def _check_names(self, tensors: Mapping[str, Tensor], expected: set[str]) -> None:
        missing = sorted(expected - tensors.keys())
        unknown = sorted(tensors.keys() - expected - {self.rename(name) for name in self.unused})
        if missing or unknown:
            raise CheckpointError(
                f"these are not {self.peer}'s tensors of this network: {len(missing)} missing {missing[:1]}, "
                f"{len(unknown)} unknown {unknown[:1]}; check the base and the sizes it was made with"
            )

    def write(self, network: ShadowNetwork) -> dict[str, Tensor]:
        state = network.state_dict()
        device = next(iter(state.values())).device
        zeros = {name: torch.zeros(shape, dtype=network.dtype, device=device) for name, shape in self.unused.items()}
        return {self.rename(name): self._turn(name, tensor) for name, tensor in (state | zeros).items()}

    def _turn(self, name: str, tensor: Tensor) -> Tensor:
        return tensor.t().contiguous() if self.transposed.match(name) else tensor


# ---------------------------------------------------------------- shadow-peft


def from_authors(tensors: Mapping[str, Tensor], network: ShadowNetwork) -> dict[str, Tensor]:
    """A ``state_dict`` for ``network`` from the tensors of ``shadow_adapter.safetensors``.

    For a classifier those of ``shadow_modules.safetensors``, its two heads, must be among them.

    Raises:
        ConfigError: the network computes what ``shadow-peft`` cannot; the message names the field.
        CheckpointError: a tensor is missing, unknown or of another shape.
    """
    flat = dict(tensors)
    for stack in _STACKS:
        flat.update({f"{stack}.{index}": tensor for index, tensor in enumerate(flat.pop(stack, ()))})
    return _authors_layout(network).read(flat, network)


def to_authors(network: ShadowNetwork) -> dict[str, Tensor]:
    """The tensors of ``shadow_adapter.safetensors``: the reverse of :func:`from_authors`.

    A classifier's ``classifier_head.*`` and ``shadow_classifier_head.*`` belong into ``shadow_modules.safetensors``.

    Raises:
        ConfigError: the network computes what ``shadow-peft`` cannot; the message names the field.
    """
    tensors = _authors_layout(network).write(network)
    for stack in _STACKS:
        tensors[stack] = torch.stack([tensors.pop(f"{stack}.{index}") for index in range(len(network.injections))])
    return tensors


def _authors_layout(network: ShadowNetwork) -> _Layout:
    _check_variant(network, "authors", (*_FORMULA, "first_block"))
    prefixes = {
        "backbone": "shadow_model",
        "projection": "shadow_hidden_projection",
        "update_norm": "shadow_update_model.hidden_norm",
        "head": "classifier_head",
        "shadow_head": "shadow_classifier_head",
    }
    steps = {
        "W_down": "shadow_injection_model.injection_downs.{index}",
        "W_up": "shadow_injection_model.injection_ups.{index}",
        "W_T1": "shadow_update_model.update_transforms.{index}.0.weight",
        "W_T2": "shadow_update_model.update_transforms.{index}.3.weight",
        "W_G1": "shadow_update_model.update_gates.{index}.0.weight",
        "W_G2": "shadow_update_model.update_gates.{index}.2.weight",
    }
    unused = _last_update(network) | _token_table(network)
    if network.update_norm is None:  # two blocks: the only update is the unused one, and the norm with it
        unused |= {f"update_norm.{part}": (_width(network),) for part in ("weight", "bias")}
    return _Layout(
        peer="shadow-peft",
        rename=lambda name: _renamed(name, prefixes, steps),
        transposed=re.compile(r"updates\.\d+\.W_"),
        unused=unused,
    )


# ---------------------------------------------------------------- Hugging Face peft


def blocks_path(base: PreTrainedModel) -> str:
    """Where ``base`` keeps its blocks, such as ``"model.layers"``; peft's names contain it."""
    blocks = blocks_of(decoder_of(base))
    return next(name for name, module in base.named_modules() if module is blocks)


def from_peft(tensors: Mapping[str, Tensor], network: ShadowNetwork, *, blocks: str) -> dict[str, Tensor]:
    """A ``state_dict`` for ``network`` from the tensors of peft's ``adapter_model.safetensors``.

    Args:
        tensors: the file's content, or what ``peft.get_peft_model_state_dict`` returns.
        network: made for the same base, with the same sizes.
        blocks: :func:`blocks_path` of the base.

    Raises:
        ConfigError: the network computes what peft cannot; the message names the field.
        CheckpointError: a tensor is missing, unknown or of another shape.
    """
    return _peft_layout(network, blocks).read(tensors, network)


def to_peft(network: ShadowNetwork, *, blocks: str) -> dict[str, Tensor]:
    """The tensors of peft's ``adapter_model.safetensors``: the reverse of :func:`from_peft`.

    Raises:
        ConfigError: the network computes what peft cannot; the message names the field.
    """
    return _peft_layout(network, blocks).write(network)


def _peft_layout(network: ShadowNetwork, blocks: str) -> _Layout:
    config = network.config
    _check_variant(network, "peft", _FORMULA)
    if config.shares_embeddings and config.is_explicit:
        raise _refusal("peft", "share_embeddings", True, "False for an explicit shadow")
    # peft mirrors OPT by the decoder inside OPTModel, whose names lack the prefix.
    wrapper = architecture_of(_backbone(network).config).embedding.rpartition(".")[0] if not config.is_explicit else ""
    prefixes = {
        f"backbone.{wrapper}" if wrapper else "backbone": "base_model.shadow_backbone.default",
        "projection": "base_model.shadow_projection.default",
        "head": "base_model.model.score",
        "shadow_head": "base_model.shadow_head.default",
    }
    steps = {"W_down": "shadow_down.default.weight", "W_up": "shadow_up.default.weight"}
    for ours, theirs in (("T", "transform"), ("G", "gate")):
        for layer, position in ((1, 0), (2, 2)):
            steps[f"W_{ours}{layer}"] = f"shadow_update_{theirs}.default.{position}.weight"
            steps[f"b_{ours}{layer}"] = f"shadow_update_{theirs}.default.{position}.bias"
    steps = {ours: f"base_model.model.{blocks}.{{index}}.{theirs}" for ours, theirs in steps.items()}
    return _Layout(
        peer="peft",
        rename=lambda name: _renamed(name, prefixes, steps, first=config.first_block),
        transposed=re.compile(r"(injections|updates)\.\d+\.W_"),
        unused=_last_update(network) | _token_table(network, wrapper=wrapper),
    )


# ---------------------------------------------------------------- both


def _renamed(name: str, prefixes: dict[str, str], steps: dict[str, str], *, first: int = 0) -> str:
    if match := re.fullmatch(r"(?:injections|updates)\.(\d+)\.(\w+)", name):
        return steps[match[2]].format(index=int(match[1]) + first)
    prefix = next(prefix for prefix in prefixes if name.startswith(f"{prefix}."))
    return prefixes[prefix] + name.removeprefix(prefix)


def _last_update(network: ShadowNetwork) -> dict[str, tuple[int, ...]]:
    """The peers have one update for each injection, so one more than we do."""
    with torch.device("meta"):
        last = Update(_width(network), network.config)
    return {f"updates.{len(network.updates)}.{name}": tuple(p.shape) for name, p in last.named_parameters()}


def _token_table(network: ShadowNetwork, *, wrapper: str = "") -> dict[str, tuple[int, ...]]:
    """Both take ``embed_tokens`` out of a backbone that shares embeddings, but overlook a table of another name."""
    config = _backbone(network).config
    table = architecture_of(config).embedding
    if table.removeprefix(f"{wrapper}.") == "embed_tokens" or not network.config.shares_embeddings:
        return {}
    return {f"backbone.{table}.weight": (config.vocab_size, config.hidden_size)}


def _check_variant(network: ShadowNetwork, preset: str, names: tuple[str, ...]) -> None:
    """Refuses a network that the peer would run otherwise, whatever its sizes."""
    config, expected = network.config, ShadowConfig.preset(preset)
    for name in (*names, *(_DROPOUT if config.shadow_dropout else ())):
        if getattr(config, name) != getattr(expected, name):
            raise _refusal(preset, name, getattr(config, name), repr(getattr(expected, name)))
    if network.embedding_projection is not None:
        raise _refusal(preset, "share_embeddings", config.share_embeddings, "False where the shadow has another width")
    shadow = _backbone(network).config
    has_windows = getattr(shadow, "layer_types", None) and getattr(shadow, "sliding_window", None)
    if config.is_implicit and config.shadow_layer_types == "full" and has_windows:
        raise _refusal(preset, "shadow_layer_types", "full", "'base' for a base with sliding windows")


def _refusal(preset: str, name: str, value: object, expected: str) -> ConfigError:
    peer = "shadow-peft" if preset == "authors" else preset
    return ConfigError(f"{name}={value!r} has no counterpart in {peer}'s format, which needs {expected}")


def _width(network: ShadowNetwork) -> int:
    return network.state_dict()["injections.0.W_down"].shape[0]


def _backbone(network: ShadowNetwork) -> PreTrainedModel:
    assert isinstance(network.backbone, PreTrainedModel)
    return network.backbone
