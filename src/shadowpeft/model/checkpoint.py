"""An adapter on disk: ``shadow_config.json`` + ``shadow_model.safetensors`` + a model card. Never pickle."""

import json
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from shadowpeft import files
from shadowpeft._version import __version__
from shadowpeft.core import ShadowConfig, ShadowNetwork
from shadowpeft.errors import ArchitectureError, CheckpointError, ShadowPeftError
from shadowpeft.model import shared
from shadowpeft.model.adapter_config import (
    FORMAT,
    FORMAT_VERSION,
    PROBLEM,
    SHARED_KEY,
    check_belongs,
    describe_backbone,
    describe_base,
    label_names,
    pinned_revision,
    read_config,
)
from shadowpeft.model.architectures import check_base
from shadowpeft.model.backbones import empty_backbone
from shadowpeft.model.bases import load_model
from shadowpeft.model.build import assemble_network
from shadowpeft.model.card import model_card
from shadowpeft.model.hub import CARD_FILE, find_folder, upload
from shadowpeft.model.sharded import fill, is_sharded
from shadowpeft.model.tensors import CONFIG_FILE, DIGEST, WEIGHTS_FILE, check_sizes, check_tensors, read_tensors, weights_digest

# What the constructors of models raise for values that fit no model.
_BUILD_ERRORS = (ValueError, TypeError, LookupError, AttributeError, RuntimeError, ArithmeticError, AssertionError, MemoryError)


def save_adapter(
    base: PreTrainedModel,
    network: ShadowNetwork,
    folder: Path,
    state: dict[str, Tensor] | None = None,
    *,
    share_backbone: bool = False,
    base_description: dict[str, Any] | None = None,
) -> None:
    """Writes the three files, each complete or not at all.

    Args:
        state: the network's gathered weights, if sharded.
        base_description: :func:`describe_base`, which all processes have to call together if the base is sharded.
        share_backbone: leave out what is unchanged from a pretrained shadow, and store its name and hash instead.

    Raises:
        ConfigError: there is nothing to share.
        CheckpointError: the weights are sharded, and what is needed of them was not gathered by all processes; or
            ``state`` is not the network's.
    """
    if (state is None and is_sharded(network)) or (base_description is None and is_sharded(base)):
        raise CheckpointError(
            "the weights are sharded over several processes, so one of them cannot save alone; let all of them call "
            "save_sharded(folder, is_main_process=...)"
        )
    own = network.state_dict()
    if state is not None and state.keys() != own.keys():
        missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        raise CheckpointError(
            f"the given state dict does not hold the adapter: {len(missing)} of its {len(own)} tensors are missing and "
            f"{len(unknown)} are unknown, first {(missing + unknown)[0]!r}; pass the state_dict() of the whole model, or none"
        )
    folder = folder.expanduser()
    left_out = shared.unchanged(base, network) if share_backbone else {}
    state = own if state is None else state
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items() if name not in left_out}
    digest = weights_digest(tensors)
    described = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "library_version": __version__,
        "shadow": network.config.to_dict(),
        "base": describe_base(base) if base_description is None else base_description,
        "backbone": describe_backbone(base, network),
        DIGEST: digest,
    }
    if left_out:
        described[SHARED_KEY] = shared.reference(left_out)

    def write(staging: Path) -> None:
        # Names sort so that the config, without which nothing loads, is moved into place before the weights.
        # One entry only: safetensors writes several in a random order, and equal adapters must be equal files.
        save_file(tensors, staging / WEIGHTS_FILE, metadata={DIGEST: digest})
        (staging / CONFIG_FILE).write_text(json.dumps(described, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if not (folder / CARD_FILE).exists():
            (staging / CARD_FILE).write_text(model_card(described, network), encoding="utf-8")

    files.write_files(folder, write)


def load_adapter(
    base: PreTrainedModel,
    adapter: str | Path,
    *,
    allow_other_weights: bool = False,
    shadow_model: str | None = None,
    **hub_options: Any,
) -> ShadowNetwork:
    """The saved network, checked against ``base`` before anything is built.

    Args:
        shadow_model: where the pretrained shadow is now, if the adapter was saved without its weights.

    Raises:
        CheckpointError: a file is missing or damaged, a tensor is missing, unknown or of another shape, or the
            adapter belongs to another base. The message says what was expected, what was found and what to do.
    """
    folder = find_folder(adapter, **hub_options)
    described = read_config(folder)
    config = ShadowConfig.from_dict(described["shadow"] | ({"shadow_model": shadow_model} if shadow_model else {}))
    check_base(base, first_block=config.first_block)
    check_belongs(described["base"], base, folder, allow_other_weights=allow_other_weights)
    tensors = read_tensors(folder / WEIGHTS_FILE, described[DIGEST])
    if SHARED_KEY in described:
        known = described["base"]["fingerprint"] or {}
        tensors |= shared.fetch(base, config, described[SHARED_KEY], str(folder), known=known)
    # The backbone is built from its own config: the sizes an implicit shadow was asked to have are not read again.
    steps = {"r": config.r, "update_hidden_size": config.update_hidden_size}
    check_sizes({"shadow": steps, "backbone": described["backbone"]}, base, tensors, folder / CONFIG_FILE)
    network = _built(base, config, described["backbone"], folder / CONFIG_FILE)
    _fill(network, tensors, folder / WEIGHTS_FILE)
    if base.config.problem_type is None:
        base.config.problem_type = described["base"].get(PROBLEM)
    return network


def _built(base: PreTrainedModel, config: ShadowConfig, backbone: dict[str, Any], path: Path) -> ShadowNetwork:
    """A network of the described shape. A backbone's config may hold anything, and transformers' classes check little."""
    try:
        return assemble_network(base, config, _saved_backbone(base, config, backbone))
    except ShadowPeftError:
        raise
    except (*_BUILD_ERRORS, StrictDataclassError) as error:
        raise CheckpointError(
            f"{path} describes a network that cannot be built ({type(error).__name__}: {str(error).strip()[:200]}); the "
            "file was edited or damaged: save the adapter again or fetch it anew"
        ) from error


def restore_weights(network: ShadowNetwork, folder: Path) -> None:
    """Puts the weights of a saved adapter into an existing network, as when training is resumed.

    Raises:
        CheckpointError: the folder holds another adapter's config, or a damaged file.
    """
    described = read_config(folder)
    saved = ShadowConfig.from_dict(described["shadow"])
    # A run's own setting once, which its adapters did not say.
    same = saved.replace(shadow_lr_multiplier=network.config.shadow_lr_multiplier)
    if same != network.config:
        changed = [key for key, value in same.to_dict().items() if value != network.config.to_dict()[key]]
        raise CheckpointError(
            f"{folder} was saved with another shadow config (differs in {', '.join(changed)}); resume with the same one"
        )
    _fill(network, read_tensors(folder / WEIGHTS_FILE, described[DIGEST]), folder / WEIGHTS_FILE)


def _fill(network: ShadowNetwork, tensors: dict[str, Tensor], path: Path) -> None:
    check_tensors(network.state_dict(), tensors, path)
    fill(network, tensors)


def _saved_backbone(base: PreTrainedModel, config: ShadowConfig, values: dict[str, Any]) -> PreTrainedModel:
    values = dict(values)
    shadow = AutoConfig.for_model(values.pop("model_type"), **values)
    return empty_backbone(base, shadow, keep_embeddings=not config.shares_embeddings)


def load_base(adapter: str | Path, hub_options: dict[str, Any], **base_options: Any) -> PreTrainedModel:
    """The base that an adapter names, with the task model it was trained on, and of the hub the commit it was trained on.

    Raises:
        CheckpointError: the adapter names none.
        ArchitectureError: it cannot be loaded.
    """
    described = read_config(find_folder(adapter, **hub_options))["base"]
    name = described["name_or_path"]
    if not name:
        raise CheckpointError(f"the adapter in {adapter} does not name its base; load the base and pass it as base=")
    pinned = pinned_revision(described) if "revision" not in base_options else {}
    if described.get(PROBLEM):
        base_options = {PROBLEM: described[PROBLEM]} | base_options
    try:
        return load_model(name, labels=label_names(described), **pinned, **base_options)
    except ArchitectureError as error:
        if not pinned:
            raise
        raise ArchitectureError(
            f"{error}. The adapter was trained on commit {pinned['revision']}; pass revision='main' for what is there now"
        ) from error


def push_adapter(base: PreTrainedModel, network: ShadowNetwork, repo_id: str, **options: Any) -> str:
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(base, network, Path(folder))
        return upload(Path(folder), repo_id, **options)
