"""An adapter on disk: ``shadow_config.json`` + ``shadow_model.safetensors`` + a model card. Never pickle."""

import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, StrictDataclassError
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from shadowpeft import files
from shadowpeft._version import __version__
from shadowpeft.core import ShadowConfig, ShadowNetwork
from shadowpeft.core.config import check_keys
from shadowpeft.errors import ArchitectureError, CheckpointError, ConfigError, ShadowPeftError
from shadowpeft.model import shared
from shadowpeft.model.architectures import blocks_of, check_base, decoder_of
from shadowpeft.model.backbones import empty_backbone
from shadowpeft.model.bases import commit_of, is_hub_name, load_model
from shadowpeft.model.build import assemble_network, is_classifier
from shadowpeft.model.card import model_card
from shadowpeft.model.fingerprint import NUM_VALUES, comparable_tensors, differing_tensors, fingerprint
from shadowpeft.model.sharded import fill, is_sharded
from shadowpeft.model.tensors import CONFIG_FILE, DIGEST, WEIGHTS_FILE, check_sizes, check_tensors, read_tensors, weights_digest

CARD_FILE = "README.md"
FORMAT = "shadowpeft"
FORMAT_VERSION = 1
SHARED_KEY = "shared_backbone"
_KEYS = {"format", "format_version", "library_version", "shadow", "base", "backbone", DIGEST}
_BASE_KEYS = {
    "name_or_path", "revision", "architecture", "model_type", "num_blocks", "hidden_size", "vocab_size", "num_labels",
    "id2label", "fingerprint",
}  # fmt: skip
# Of classifiers, since their adapters say it; older ones do not.
_PROBLEM = "problem_type"
_PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")


def describe_base(base: PreTrainedModel) -> dict[str, Any]:
    """What the adapter's config records of its base."""
    config: Any = base.config
    return {
        "name_or_path": base.name_or_path,
        "revision": commit_of(base),
        **_shape_of(base),
        "id2label": {str(k): v for k, v in config.id2label.items()} if is_classifier(base) else None,
        "fingerprint": fingerprint(base),
        **({_PROBLEM: config.problem_type} if is_classifier(base) else {}),
    }


def _shape_of(base: PreTrainedModel) -> dict[str, Any]:
    """What has to be equal before weights are compared."""
    config: Any = base.config
    return {
        "architecture": type(base).__name__,
        "model_type": config.model_type,
        "num_blocks": len(blocks_of(decoder_of(base))),
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "num_labels": config.num_labels if is_classifier(base) else None,
    }


def _describe_backbone(base: PreTrainedModel, network: ShadowNetwork) -> dict[str, Any]:
    """Its config, whose vocabulary is the base's where it reads the base's table, which may have been resized."""
    described = network.backbone.config.to_dict()
    config: Any = base.config
    return described | ({"vocab_size": config.vocab_size} if network.config.shares_embeddings else {})


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
        "backbone": _describe_backbone(base, network),
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
    _check_belongs(described["base"], base, folder, allow_other_weights=allow_other_weights)
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
        base.config.problem_type = described["base"].get(_PROBLEM)
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


def find_folder(adapter: str | Path, **hub_options: Any) -> Path:
    """The folder of an adapter: a local path, or a hub name (downloaded, only the files of the format)."""
    path = Path(adapter).expanduser()
    if path.is_dir():
        return path
    if path.exists() or str(adapter).startswith((".", "/", "~")):
        raise CheckpointError(f"{adapter} is not an adapter folder; expected a folder with {CONFIG_FILE}")
    try:
        return Path(snapshot_download(str(adapter), allow_patterns=[CONFIG_FILE, WEIGHTS_FILE], **hub_options))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{str(adapter)!r} is neither a local folder nor an adapter that could be fetched from the hub "
            f"({type(error).__name__}); check the name, the network, or pass a local folder"
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.is_file():
        inside = folder / "adapter"  # where a run keeps it
        hint = f"the adapter of this run is {inside}" if (inside / CONFIG_FILE).is_file() else "is it an adapter's folder?"
        raise CheckpointError(f"{folder} holds no {CONFIG_FILE}; {hint}")
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); save the adapter again or fetch it anew") from error
    if not isinstance(described, dict) or described.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is not in the shadowpeft format (no \"format\": \"{FORMAT}\"); an adapter of another library has "
            "to be converted first"
        )
    if described.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {described.get('format_version')!r}; this release reads {FORMAT_VERSION}: "
            "upgrade shadowpeft"
        )
    _check_layout(described, path)
    return described


def _check_layout(described: dict[str, Any], path: Path) -> None:
    missing = sorted(_KEYS - described.keys())
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}")
    check_keys(described, _KEYS | {SHARED_KEY}, what=str(path))
    left_out = described.get(SHARED_KEY, {"tensors": [], "sha256": ""})
    if not isinstance(left_out, dict) or not {"tensors", "sha256"} <= left_out.keys():
        raise CheckpointError(f"{path}: {SHARED_KEY} lacks its tensors or their sha256")
    for part in ("shadow", "base", "backbone"):
        if not isinstance(described[part], dict):
            raise CheckpointError(f"{path}: {part!r} must be an object, not {type(described[part]).__name__}")
    check_keys(described["base"], _BASE_KEYS | {_PROBLEM}, what=f"{path}: base")
    missing = sorted(_BASE_KEYS - described["base"].keys())
    if missing:
        raise CheckpointError(f"{path}: base lacks {', '.join(missing)}; save the adapter again or fetch it anew")
    _check_values(described, path)
    if not isinstance(described["backbone"].get("model_type"), str):
        raise CheckpointError(f"{path}: backbone lacks its model_type")
    try:
        ShadowConfig.from_dict(described["shadow"])
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _check_values(described: dict[str, Any], path: Path) -> None:
    """What is read without going through a config class."""
    base, left_out = described["base"], described.get(SHARED_KEY, {"tensors": [], "sha256": ""})
    values = list((base["fingerprint"] or {}).values()) if _is_mapping(base["fingerprint"]) else [None]
    is_valid = {
        DIGEST: isinstance(described[DIGEST], str),
        **{f"base.{name}": isinstance(base[name], str | None) for name in ("name_or_path", "revision")},
        **{f"base.{name}": isinstance(base[name], str) for name in ("architecture", "model_type")},
        **{f"base.{name}": type(base[name]) is int for name in ("num_blocks", "hidden_size", "vocab_size")},
        "base.fingerprint": all(_is_numbers(value) for value in values),
        "base.num_labels": type(base["num_labels"]) in (int, type(None)),
        "base.id2label": _is_labels(base["id2label"], base["num_labels"]),
        f"base.{_PROBLEM}": base.get(_PROBLEM) in (None, *_PROBLEMS),
        SHARED_KEY: isinstance(left_out["tensors"], list) and all(isinstance(name, str) for name in left_out["tensors"]),
    }
    wrong = [name for name, ok in is_valid.items() if not ok]
    if wrong:
        raise CheckpointError(f"{path}: {', '.join(wrong)} is not of the kind that is written there; fetch the file anew")


def _is_mapping(value: Any) -> bool:
    return value is None or isinstance(value, dict)


def _is_labels(names: Any, count: Any) -> bool:
    """Whether there is a name for each of a classifier's labels; what a language model has beside its None is not read."""
    if count is None:
        return _is_mapping(names)
    are_all = isinstance(names, dict) and isinstance(count, int) and len(names) == count
    return are_all and all(isinstance(names.get(str(index)), str) for index in range(len(names)))


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list) and len(value) == NUM_VALUES and all(type(item) in (int, float) for item in value)


def _check_belongs(
    expected: dict[str, Any], base: PreTrainedModel, folder: Path, *, allow_other_weights: bool
) -> None:
    name = _name_of(expected)
    found = _shape_of(base)
    for key in ("model_type", "architecture", "num_blocks", "hidden_size", "vocab_size", "num_labels"):
        if expected.get(key) != found[key]:
            raise CheckpointError(
                f"the adapter in {folder} was trained on a base with {key}={expected.get(key)!r} "
                f"({name}), but this base has {key}={found[key]!r}; load the right base"
            )
    known = expected.get("fingerprint") or {}
    if known and base.device.type != "meta" and not comparable_tensors(known, base):
        warnings.warn(
            f"all weights by which the adapter in {folder} knows its base are quantised here, so it is not checked whether "
            f"this base is {name}",
            stacklevel=2,
        )
    differing = differing_tensors(known, base)
    if differing and not allow_other_weights:
        raise CheckpointError(
            f"the base has the right shapes but other weights than the one the adapter in {folder} was trained on "
            f"({name}): {len(differing)} fingerprinted tensors differ, first "
            f"{differing[0]!r}. Load that base, or pass allow_other_weights=True if the change is intended"
        )


def _name_of(described: dict[str, Any]) -> str:
    """Of a base, for a message: its name, and its commit on the hub where that is known."""
    revision = described.get("revision")
    return repr(described.get("name_or_path")) + (f" at commit {revision}" if revision else "")


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
    if described.get(_PROBLEM):
        base_options = {_PROBLEM: described[_PROBLEM]} | base_options
    try:
        return load_model(name, labels=label_names(described), **pinned, **base_options)
    except ArchitectureError as error:
        if not pinned:
            raise
        raise ArchitectureError(
            f"{error}. The adapter was trained on commit {pinned['revision']}; pass revision='main' for what is there now"
        ) from error


def pinned_revision(described: dict[str, Any]) -> dict[str, str]:
    """Options for loading a base as it was when :func:`describe_base` saw it; none where that was no commit of a hub."""
    revision = described.get("revision")
    return {"revision": revision} if revision and is_hub_name(described["name_or_path"] or "") else {}


def label_names(described: dict[str, Any]) -> list[str] | None:
    """Labels in the order of the logits, from :func:`describe_base`; None for a language model."""
    if described["num_labels"] is None:
        return None
    return [described["id2label"][str(index)] for index in range(described["num_labels"])]


def push_adapter(base: PreTrainedModel, network: ShadowNetwork, repo_id: str, **options: Any) -> str:
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(base, network, Path(folder))
        return upload(Path(folder), repo_id, **options)


def upload(
    folder: Path,
    repo_id: str,
    *,
    token: str | None = None,
    commit_message: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Uploads the three files of an adapter folder, to a branch that is made if need be; returns the commit's address."""
    api = HfApi(token=token)
    repo = api.create_repo(repo_id, private=private, exist_ok=True)
    if revision is not None and not revision.startswith("refs/pr"):  # a pull request has a branch already
        api.create_branch(repo.repo_id, branch=revision, exist_ok=True)
    return api.upload_folder(
        repo_id=repo.repo_id,
        folder_path=folder.expanduser(),
        allow_patterns=[CONFIG_FILE, WEIGHTS_FILE, CARD_FILE],
        commit_message=commit_message or "Upload ShadowPEFT adapter",
        revision=revision,
        create_pr=create_pr,
    ).commit_url
