"""An adapter's ``shadow_config.json``: what it says of its base, and how it is read and checked."""

import json
import warnings
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from shadowpeft.core import ShadowConfig, ShadowNetwork
from shadowpeft.core.config import check_keys
from shadowpeft.errors import CheckpointError, ConfigError
from shadowpeft.model.architectures import blocks_of, decoder_of
from shadowpeft.model.bases import commit_of, is_hub_name
from shadowpeft.model.build import is_classifier
from shadowpeft.model.fingerprint import NUM_VALUES, comparable_tensors, differing_tensors, fingerprint
from shadowpeft.model.tensors import CONFIG_FILE, DIGEST

FORMAT = "shadowpeft"
FORMAT_VERSION = 1
SHARED_KEY = "shared_backbone"
_KEYS = {"format", "format_version", "library_version", "shadow", "base", "backbone", DIGEST}
_BASE_KEYS = {
    "name_or_path", "revision", "architecture", "model_type", "num_blocks", "hidden_size", "vocab_size", "num_labels",
    "id2label", "fingerprint",
}  # fmt: skip
# Of classifiers, since their adapters say it; older ones do not.
PROBLEM = "problem_type"
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


def describe_base(base: PreTrainedModel) -> dict[str, Any]:
    """What the adapter's config records of its base."""
    config: Any = base.config
    return {
        "name_or_path": base.name_or_path,
        "revision": commit_of(base),
        **_shape_of(base),
        "id2label": {str(k): v for k, v in config.id2label.items()} if is_classifier(base) else None,
        "fingerprint": fingerprint(base),
        **({PROBLEM: config.problem_type} if is_classifier(base) else {}),
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


def describe_backbone(base: PreTrainedModel, network: ShadowNetwork) -> dict[str, Any]:
    """Its config, whose vocabulary is the base's where it reads the base's table, which may have been resized."""
    described = network.backbone.config.to_dict()
    config: Any = base.config
    return described | ({"vocab_size": config.vocab_size} if network.config.shares_embeddings else {})


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
    check_keys(described["base"], _BASE_KEYS | {PROBLEM}, what=f"{path}: base")
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
        f"base.{PROBLEM}": base.get(PROBLEM) in (None, *PROBLEM_TYPES),
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


def check_belongs(
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


def pinned_revision(described: dict[str, Any]) -> dict[str, str]:
    """Options for loading a base as it was when :func:`describe_base` saw it; none where that was no commit of a hub."""
    revision = described.get("revision")
    return {"revision": revision} if revision and is_hub_name(described["name_or_path"] or "") else {}


def label_names(described: dict[str, Any]) -> list[str] | None:
    """Labels in the order of the logits, from :func:`describe_base`; None for a language model."""
    if described["num_labels"] is None:
        return None
    return [described["id2label"][str(index)] for index in range(described["num_labels"])]
