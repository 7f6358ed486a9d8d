"""``shadowpeft convert``: any of the known formats into another, exactly or not at all."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

from transformers import PreTrainedModel

from shadowpeft.core import ShadowNetwork
from shadowpeft.errors import CheckpointError, ConfigError
from shadowpeft.files import new_folder, write_files
from shadowpeft.model import checkpoint as checkpoints
from shadowpeft.model import exchange_authors as authors
from shadowpeft.model import exchange_peft as peft
from shadowpeft.model.adapter_config import FORMAT, pinned_revision, read_config
from shadowpeft.model.bases import load_model
from shadowpeft.model.load import find_tokenizer
from shadowpeft.model.pretrained import PROJECTED_TYPE, PROJECTION_FILE
from shadowpeft.model.projected import plain_from_projected, write_plain, write_projected
from shadowpeft.model.tensors import CONFIG_FILE

Target = Literal["shadowpeft", "authors", "peft"]


def convert_checkpoint(
    source: Path | str,
    target: Path | str,
    *,
    to: Target,
    base: str | PreTrainedModel | None = None,
    shadow_model: str | None = None,
    labels: list[str] | None = None,
    share_backbone: bool = False,
    allow_other_weights: bool = False,
) -> list[str]:
    """Reads an adapter or a pretrained shadow in any known format and writes it in another.

    Args:
        source: folder of shadowpeft, of shadow-peft, of peft (SHADOW), or a pretrained shadow (ours, or
            ``causal_lm_with_hidden_projection``).
        target: empty or absent folder.
        to: format to write.
        base: the adapter's base, where the source does not name it or another copy is to be used.
        shadow_model: the explicit shadow, where the source does not name it, or where it is now.
        labels: class names of a classifier, where the source does not hold them.
        share_backbone: in our own format, leave out what is unchanged from the pretrained shadow.
        allow_other_weights: accept a base with other weights than the adapter was trained on.

    Returns:
        What the target format does not store although it changes nothing of what the adapter computes.

    Raises:
        ConfigError: a variant or size the target cannot express; the message names it.
        CheckpointError: files that are missing, damaged, or of another base.
    """
    if to not in get_args(Target):
        raise ConfigError(f"unknown format {to!r}; choose one of {', '.join(get_args(Target))}")
    folder, out = Path(source), new_folder(target)
    kind = detect(folder)
    if kind in ("pretrained", "projected"):
        return _convert_pretrained(folder, out, kind=kind, to=to, base=base)
    loaded, network = _read(
        folder, kind, base=base, shadow_model=shadow_model, labels=labels, allow_other_weights=allow_other_weights
    )
    if to == "shadowpeft":
        checkpoints.save_adapter(loaded, network, out, share_backbone=share_backbone)
        _copy_tokenizer(folder, out)
        return []
    write = authors.write_authors if to == "authors" else peft.write_peft
    return write(loaded, network, out).notes


def detect(folder: Path) -> str:
    """The format of a folder, by its files.

    Raises:
        CheckpointError: none that is known.
    """
    if (folder / peft.PEFT_CONFIG).is_file():
        return "peft"
    if (folder / CONFIG_FILE).is_file():
        values = _json(folder / CONFIG_FILE)
        return "shadowpeft" if values.get("format") == FORMAT else "authors"
    if (folder / "config.json").is_file():
        if _json(folder / "config.json").get("model_type") == PROJECTED_TYPE:
            return "projected"
        if (folder / PROJECTION_FILE).is_file() or (folder / "pretrain.json").is_file():
            return "pretrained"
    raise CheckpointError(
        f"{folder} is in no format that can be converted; expected {CONFIG_FILE} (shadowpeft or "
        f"shadow-peft), {peft.PEFT_CONFIG} (peft) or the config.json of a pretrained shadow"
    )


def _json(path: Path) -> dict:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); fetch it anew") from error
    return values if isinstance(values, dict) else {}


def _read(
    folder: Path,
    kind: str,
    *,
    base: str | PreTrainedModel | None,
    shadow_model: str | None,
    labels: list[str] | None,
    allow_other_weights: bool,
) -> tuple[PreTrainedModel, ShadowNetwork]:
    if kind == "shadowpeft":
        described = read_config(folder)["base"]
        count = described["num_labels"]
        names = [described["id2label"][str(index)] for index in range(count)] if count else None
        pinned = {} if base else pinned_revision(described)
        loaded = _base(base or described["name_or_path"], names, folder, **pinned)
        return loaded, checkpoints.load_adapter(
            loaded, folder, allow_other_weights=allow_other_weights, shadow_model=shadow_model
        )
    counts: dict[str, Callable[[Path], int | None]] = {
        "authors": authors.num_labels_of_authors,
        "peft": peft.num_labels_of_peft,
    }
    num_labels = counts[kind](folder)
    if num_labels is not None and labels is None:
        labels = [f"LABEL_{index}" for index in range(num_labels)]
    if (len(labels) if labels else None) != num_labels:
        raise ConfigError(f"{len(labels or [])} labels were given, but {folder} has {num_labels or 0} classes")
    described = {"name_or_path": None} if base or kind == "authors" else peft.base_of_peft(folder)
    pinned = pinned_revision(described)
    loaded = _base(base or described["name_or_path"], labels, folder, **pinned)
    read = authors.read_authors if kind == "authors" else peft.read_peft
    return loaded, read(folder, loaded, shadow_model=shadow_model)


def _base(
    base: str | PreTrainedModel | None, labels: list[str] | None, folder: Path, **options: Any
) -> PreTrainedModel:
    if not base:
        raise CheckpointError(f"{folder} does not name its base; pass it with --base")
    return load_model(base, labels=labels, **options) if isinstance(base, str) else base


def _convert_pretrained(folder: Path, out: Path, *, kind: str, to: str, base: str | PreTrainedModel | None) -> list[str]:
    if to == "peft":
        raise ConfigError("peft reads pretrained shadows in the authors' projected format: convert with --to authors")
    if to == "shadowpeft":
        if kind == "pretrained":
            raise ConfigError(f"{folder} is a pretrained shadow in our format already")
        model, projection = plain_from_projected(str(folder))
        write_plain(model, projection, out, tokenizer=find_tokenizer(str(folder)), record={"converted_from": kind})
        return []
    if kind == "projected":
        raise ConfigError(f"{folder} is in the authors' projected format already")
    write_projected(str(folder), _base(base, None, folder), out)
    _copy_tokenizer(folder, out)
    return []


def _copy_tokenizer(folder: Path, out: Path) -> None:
    tokenizer = find_tokenizer(str(folder))
    if tokenizer is not None:
        write_files(out, tokenizer.save_pretrained)
