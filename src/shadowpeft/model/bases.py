"""Loading bases and their tokenizers by path, hub name, or the name of the one that comes with the package."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from shadowpeft.errors import ArchitectureError

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
            f"cannot load the base {name!r}: {_first_line(error)}. Pass a folder, a hub name, or {EMBEDDED!r}"
        ) from error
    model.name_or_path = name
    return model


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a base, with a pad token (its end token where it has none of its own)."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(location(name))
    except (OSError, ValueError) as error:
        raise ArchitectureError(f"cannot load a tokenizer from {name!r}: {_first_line(error)}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
