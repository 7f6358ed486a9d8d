"""What `shadowpeft detach`, `export` and `convert` do, for the command line and for scripts."""

from pathlib import Path
from typing import get_args

import torch
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from shadowpeft.deploy.convert import Target, convert_checkpoint
from shadowpeft.deploy.detach import write_detached
from shadowpeft.deploy.gguf import write_gguf
from shadowpeft.deploy.onnx import write_onnx
from shadowpeft.errors import ConfigError
from shadowpeft.model.load import find_tokenizer, load_attached
from shadowpeft.model.pretrained import read_raw_config
from shadowpeft.model.tensors import CONFIG_FILE

FORMATS = ("onnx", "onnx-int8", "gguf", "gguf-f16")
DTYPES = ("float32", "bfloat16", "float16", "float64")


def detach(
    adapter: str,
    out: str,
    console: Console,
    *,
    base: str | None = None,
    dtype: str | None = None,
    allow_other_weights: bool = False,
) -> None:
    """Writes the stand-alone shadow of an adapter as an ordinary model's folder."""
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    model, tokenizer = load_attached(adapter, base=base, allow_other_weights=allow_other_weights, device="cpu")
    stored = None if dtype is None else getattr(torch, dtype)
    detached = write_detached(model, out, tokenizer=tokenizer, dtype=stored)
    _tell_tokenizer(tokenizer, console)
    console.print(
        f"{type(detached).__name__}, {detached.num_parameters():,} parameters, {_size(Path(out)):,} bytes in {out}",
        markup=False,
    )


def export(
    source: str,
    out: str,
    console: Console,
    *,
    format: str = "onnx",
    base: str | None = None,
    allow_other_weights: bool = False,
) -> None:
    """Writes an adapter's stand-alone shadow, or a detached folder, as an ONNX or GGUF file."""
    if format not in FORMATS:
        raise ConfigError(f"unknown format {format!r}; choose one of {', '.join(FORMATS)}")
    model, tokenizer = _ordinary(source, base=base, allow_other_weights=allow_other_weights)
    notes: list[str] = []
    if format.startswith("onnx"):
        write_onnx(model, out, tokenizer=tokenizer, int8=format == "onnx-int8")
    else:
        precision = "float16" if format == "gguf-f16" else "float32"
        name = Path(source).name or "shadow"
        notes = write_gguf(model, out, tokenizer=tokenizer, precision=precision, name=name).notes
    _tell_tokenizer(tokenizer, console)
    for note in notes:
        console.print(f"note: {note}", markup=False)
    console.print(f"{format}: {_size(Path(out)):,} bytes in {out}", markup=False)


def convert(
    source: str,
    out: str,
    console: Console,
    *,
    to: Target,
    base: str | None = None,
    shadow_model: str | None = None,
    labels: str | None = None,
    share_backbone: bool = False,
    allow_other_weights: bool = False,
) -> None:
    """Writes an adapter or a pretrained shadow in another library's format, or in ours."""
    if to not in get_args(Target):
        raise ConfigError(f"unknown format {to!r}; choose one of {', '.join(get_args(Target))}")
    notes = convert_checkpoint(
        source,
        out,
        to=to,
        base=base,
        shadow_model=shadow_model,
        labels=labels.split(",") if labels else None,
        share_backbone=share_backbone,
        allow_other_weights=allow_other_weights,
    )
    for note in notes:
        console.print(f"note: {note}", markup=False)
    console.print(f"{to}: {_size(Path(out)):,} bytes in {out}", markup=False)


def _ordinary(
    source: str, *, base: str | None, allow_other_weights: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The detached model of an adapter, or the model of a folder that was detached before."""
    folder = Path(source)
    if folder.is_dir() and (folder / "config.json").is_file() and not (folder / CONFIG_FILE).is_file():
        names = read_raw_config(source).get("architectures") or ()
        classifies = any("SequenceClassification" in name for name in names)
        auto = AutoModelForSequenceClassification if classifies else AutoModelForCausalLM
        return auto.from_pretrained(source, dtype=torch.float32).eval(), find_tokenizer(source)
    model, tokenizer = load_attached(source, base=base, allow_other_weights=allow_other_weights, device="cpu")
    return model.detach(), tokenizer


def _tell_tokenizer(tokenizer: PreTrainedTokenizerBase | None, console: Console) -> None:
    if tokenizer is None:
        console.print("note: neither the adapter nor its base has a tokenizer, so none was written")


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
