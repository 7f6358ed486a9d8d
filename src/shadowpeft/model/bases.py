"""Loading bases and their tokenizers by path, hub name, or the name of the one that comes with the package."""

import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.file_download import repo_folder_name
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from shadowpeft.errors import ArchitectureError, first_line

EMBEDDED = "embedded"
_FOLDER = Path(__file__).parent.parent / "assets" / "base"


def location(name: str) -> str:
    """What ``from_pretrained`` takes for a base's name."""
    return str(_FOLDER) if name == EMBEDDED else name


def load_model(name: str, *, labels: list[str] | None = None, dtype: Any = "auto", **options: Any) -> PreTrainedModel:
    """A base by path, hub name or ``"embedded"``; with ``labels`` as a sequence classifier with a fresh head.

    Raises:
        ArchitectureError: nothing loadable is there.
    """
    auto = AutoModelForCausalLM if labels is None else AutoModelForSequenceClassification
    if labels is not None:
        ids = dict(enumerate(labels))
        options |= {"num_labels": len(labels), "id2label": ids, "label2id": {label: i for i, label in ids.items()}}
    if name == EMBEDDED and dtype == "auto":
        dtype = torch.float32  # stored in bf16 for its size; computed in fp32, which is faster on a CPU
    try:
        model = auto.from_pretrained(location(name), dtype=dtype, **options)
    except (OSError, ValueError) as error:
        raise ArchitectureError(
            f"cannot load the base {name!r}: {first_line(error)}. Pass a folder, a hub name, or {EMBEDDED!r}"
        ) from error
    model.name_or_path = name
    _keep_commit(model, options)
    return model


def _keep_commit(model: PreTrainedModel, options: dict[str, Any]) -> None:
    """Where transformers' releases up to 5.23 keep it: the commit of the hub that the config was fetched from, if it was."""
    config: Any = model.config
    name = model.name_or_path or ""
    if getattr(config, "_commit_hash", None) is None and is_hub_name(name):
        file = "/".join([options["subfolder"], "config.json"] if options.get("subfolder") else ["config.json"])
        places = {name: options[name] for name in ("revision", "cache_dir") if options.get(name) is not None}
        found = try_to_load_from_cache(name, file, **places)
        config._commit_hash = _commit_in(Path(found)) if isinstance(found, str) else None


def commit_of(model: PreTrainedModel) -> str | None:
    """The commit of the hub that a base was loaded from, as far as it can be known.

    A model that was loaded by transformers alone does not tell since 5.24; it is the one in the cache where that is the only
    one. None where there are several, for a folder, and for a model that was never stored.
    """
    known, name = getattr(model.config, "_commit_hash", None), model.name_or_path or ""
    if known is not None or not is_hub_name(name):
        return known
    cached = Path(HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model") / "snapshots"
    commits = {_commit_in(file) for file in cached.glob("*/config.json")}
    return commits.pop() if len(commits) == 1 else None


def is_hub_name(name: str) -> bool:
    return bool(name) and name != EMBEDDED and not Path(name).exists() and len(Path(name).parts) <= 2 and name[0] not in "./~"


def _commit_in(file: Path) -> str | None:
    """Of a file in the hub's cache, ``.../snapshots/COMMIT/...``."""
    commit = file.as_posix().partition("/snapshots/")[2].split("/")[0]
    return commit if re.fullmatch("[0-9a-f]{40}", commit) else None


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a base, with a pad token (its end token where it has none of its own)."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(location(name))
    except (OSError, ValueError) as error:
        raise ArchitectureError(f"cannot load a tokenizer from {name!r}: {first_line(error)}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
