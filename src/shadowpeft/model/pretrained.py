"""Pretrained shadows on disk: ordinary models, with the projection that re-attaches them in a file beside.

``model.safetensors`` holds the backbone and the folded head ``W_lm P``, so any transformers program runs the folder;
``shadow_projection.safetensors`` holds P itself [d, d_s]. The authors' ``causal_lm_with_hidden_projection`` folders
(backbone, P and the large head apart) are read too, by model type: the class paths in their config are never imported.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils.hub import cached_file

from shadowpeft.core import ShadowNetwork
from shadowpeft.errors import ArchitectureError, CheckpointError, first_line
from shadowpeft.model.architectures import architecture_of
from shadowpeft.model.tensors import read_file

PROJECTION_FILE = "shadow_projection.safetensors"
PROJECTION_KEY = "projection.weight"
PROJECTED_TYPE = "causal_lm_with_hidden_projection"
_PROJECTED_PREFIX = "shadow_model."
_PROJECTED_KEY = "shadow_hidden_projection.weight"


def read_raw_config(source: str, **load_options: Any) -> dict[str, Any]:
    """``config.json`` of a folder or hub name, as it is.

    Raises:
        ArchitectureError: there is none.
    """
    try:
        values, _ = PreTrainedConfig.get_config_dict(source, **load_options)
    except (OSError, ValueError) as error:
        raise ArchitectureError(f"cannot load the shadow {source!r}: {first_line(error)}") from error
    if "model_type" not in values:
        raise ArchitectureError(f"cannot load the shadow {source!r}: it has no config.json with a model_type")
    return values


def is_projected(values: dict[str, Any]) -> bool:
    return values["model_type"] == PROJECTED_TYPE


def shadow_config_of(source: str, **load_options: Any) -> PreTrainedConfig:
    """The config of the backbone that ``source`` holds.

    Raises:
        ArchitectureError: nothing is there, or it is of an unsupported type.
    """
    values = read_raw_config(source, **load_options)
    if is_projected(values):
        return inner_config(values)
    if not _is_known(values["model_type"]):
        raise ArchitectureError(f"the shadow {source!r} is of type {values['model_type']!r}, unknown to transformers")
    config = AutoConfig.from_pretrained(source, **load_options)
    architecture_of(config)
    return config


def inner_config(values: dict[str, Any]) -> PreTrainedConfig:
    """The backbone's config inside a ``causal_lm_with_hidden_projection`` config, chosen by its model type alone."""
    inner = dict(values.get("shadow_model_config") or {})
    model_type = inner.pop("model_type", None)
    if not isinstance(model_type, str) or not _is_known(model_type):
        raise ArchitectureError(
            f"the projected shadow names the backbone type {model_type!r}, unknown to transformers; class paths in "
            "such a config are not imported"
        )
    config = AutoConfig.for_model(model_type, **inner)
    architecture_of(config)
    return config


def load_source(source: str, config: PreTrainedConfig, kernels: dict[str, str], **load_options: Any) -> PreTrainedModel:
    """The decoder in ``source``, in fp32, with its own token table and the asked-for ``kernels``."""
    if not is_projected(read_raw_config(source, **load_options)):
        return AutoModel.from_pretrained(source, dtype=torch.float32, **kernels, **load_options)
    backbone = AutoModel.from_config(config, dtype=torch.float32, **kernels)
    tensors = projected_tensors(source, **load_options)
    weights = {k.removeprefix(_PROJECTED_PREFIX): v for k, v in tensors.items() if k.startswith(_PROJECTED_PREFIX)}
    expected = backbone.state_dict()
    wrong = sorted(expected.keys() ^ weights.keys()) or [k for k in expected if expected[k].shape != weights[k].shape]
    if wrong:
        raise CheckpointError(f"the weights in {source} do not fit its config, first {_PROJECTED_PREFIX + wrong[0]!r}")
    backbone.load_state_dict(weights)
    return backbone


def read_projection(source: str, **load_options: Any) -> Tensor | None:
    """P [d, d_s] that was trained with the shadow in ``source``; None for a plain model."""
    if is_projected(read_raw_config(source, **load_options)):
        tensors = projected_tensors(source, **load_options)
        if _PROJECTED_KEY not in tensors:
            raise CheckpointError(f"{source} is a projected shadow without {_PROJECTED_KEY!r}")
        return tensors[_PROJECTED_KEY]
    path = _file(source, PROJECTION_FILE, **load_options)
    return None if path is None else read_file(path)[0][PROJECTION_KEY]


@torch.no_grad()
def load_projection(network: ShadowNetwork, source: str, **load_options: Any) -> None:
    """Starts the network's projection from the one trained with its shadow, where there is one.

    Raises:
        ArchitectureError: it was made for a base of another width, or turns the states of a shadow as wide as the base, which
            has no projection to keep that in.
    """
    trained = read_projection(source, **load_options)
    if trained is None:
        return
    own = network.projection
    width = network.width
    if trained.shape != (width, network.backbone.config.hidden_size):
        raise ArchitectureError(
            f"the projection of the shadow {source!r} is {list(trained.shape)}, but this base needs "
            f"{[width, network.backbone.config.hidden_size]} (its width x the shadow's): it was pretrained for another "
            "base"
        )
    if own is None and not torch.allclose(trained.float(), torch.eye(width)):
        raise ArchitectureError(
            f"the shadow {source!r} is as wide as this base ({width}) and was trained with a projection, which a shadow of the "
            "base's width does not have; take one of another width, or one that was pretrained without"
        )
    if own is not None and not own.weight.is_meta:
        own.weight.copy_(trained)


def projected_tensors(source: str, **load_options: Any) -> dict[str, Tensor]:
    """All tensors of a projected shadow, from one file or from shards."""
    index = _file(source, "model.safetensors.index.json", **load_options)
    names = ["model.safetensors"]
    if index is not None:
        names = _shard_names(index)
    tensors: dict[str, Tensor] = {}
    for name in names:
        path = _file(source, name, **load_options)
        if path is None:
            raise CheckpointError(f"{source} holds no {name}; the projected shadow is incomplete: fetch it again")
        tensors |= read_file(path)[0]
    return tensors


def _shard_names(index: Path) -> list[str]:
    """The files that an index of shards names.

    Raises:
        CheckpointError: it is damaged, or names a file outside its folder.
    """
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not a list of shards ({error}); fetch it again") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or "\\" in name:
            raise CheckpointError(f"{index} names {name!r}, which lies outside of its folder; do not use this model")
    return names


def check_same_tokenizer(shadow: str, base: str) -> None:
    """Compares the vocabularies of two folders, where both have a tokenizer on this machine.

    Raises:
        ArchitectureError: one token has two numbers; the shadow would read other words than the base.
    """
    if not shadow or not base:
        return
    try:
        ours, theirs = (AutoTokenizer.from_pretrained(name, local_files_only=True) for name in (shadow, base))
    except (OSError, ValueError, ImportError):
        return  # no tokenizer beside the weights: the equal vocabulary sizes have to do
    first, second = ours.get_vocab(), theirs.get_vocab()
    differing = sorted(token for token in first.keys() | second.keys() if first.get(token) != second.get(token))
    if differing:
        token = differing[0]
        raise ArchitectureError(
            f"the tokenizers of the shadow {shadow!r} and the base {base!r} differ in {len(differing)} tokens, first "
            f"{token!r} ({first.get(token)} and {second.get(token)}); a shadow must read the base's tokens"
        )


def _is_known(model_type: str) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING


def _file(source: str, name: str, **load_options: Any) -> Path | None:
    if Path(source).is_dir():
        return Path(source) / name if (Path(source) / name).is_file() else None
    found = cached_file(
        source,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **load_options,
    )
    return None if found is None else Path(found)
