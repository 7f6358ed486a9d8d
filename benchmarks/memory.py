"""How much a training step keeps for its backward pass, for this package, LoRA, DoRA and both other shadows.

``python benchmarks/memory.py`` (12 blocks x 1024; about 3 minutes a vocabulary); ``--tiny`` for a few seconds;
``--device cuda --shape 8B`` on a GPU.

Bytes kept are exact: the sizes of all distinct storages that autograd is asked to keep during the forward pass
(``torch.autograd.graph.saved_tensors_hooks``), each counted once and in full, without those of parameters and
buffers of the model and without the batch. Peak memory is that of a process of its own for each row: the resident
set on a CPU (with base, libraries and gradients), allocated bytes on a GPU.
"""

import argparse
import itertools
import json
import resource
import subprocess
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rows import PACKAGES, PRESET_ROWS, ROWS, SHAPES, build, check_start, main_loss, make_base, make_batch, num_trainable
from shadowpeft.evaluate.record import origin, write_record

MEGABYTE = 1e6


def kept_storages(model: nn.Module, batch: dict[str, Tensor]) -> tuple[dict[int, int], Tensor]:
    """({address: bytes} of everything kept for backward, the loss with its graph)."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).loss
    for tensor in (*model.parameters(), *model.buffers(), *batch.values()):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    return kept, loss


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One row, in this process."""
    shape, device, dtype = SHAPES[options.shape], options.device, getattr(torch, options.dtype)
    base = make_base(shape, vocabulary=options.vocabulary, dtype=dtype, device=device)
    model = build(name, base, shape, dropout=options.dropout, device=device)
    batch = make_batch(shape, vocabulary=options.vocabulary, labels=options.labels, device=device)
    start = main_loss(name, model, batch)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    model(**batch).loss.backward()
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else _peak_resident()
    kept, loss = kept_storages(model, batch)
    loss.backward()
    return {
        "row": name,
        "trainable": num_trainable(model),
        "kept_mb": sum(kept.values()) / MEGABYTE,
        "largest_kept_mb": [round(size / MEGABYTE, 2) for size in sorted(kept.values(), reverse=True)[:3]],
        "peak_mb": peak / MEGABYTE,
        "main_loss": start,
    }


def _peak_resident() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def in_own_process(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """One row, in a process of its own."""
    command = [sys.executable, __file__, "--row", name, "--settings", json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(names: Iterable[str], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Those of the rows that can run here, under one setting; their starting losses must agree."""
    rows = []
    for name in names:
        if name in PACKAGES and find_spec(PACKAGES[name]) is None:
            print(f"{name}: left out, {PACKAGES[name]} is not installed", file=sys.stderr)
            continue
        rows.append({**settings, **in_own_process(name, settings)})
    check_start({row["row"]: row["main_loss"] for row in rows}, dtype=getattr(torch, settings["dtype"]))
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| vocabulary | labels | dropout | row | trainable | kept MB | x HF | x LoRA | peak MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        setting = ("vocabulary", "labels", "dropout")
        same = {other["row"]: other["kept_mb"] for other in rows if all(other[k] == row[k] for k in setting)}
        ratios = [row["kept_mb"] / same[peer] if peer in same else None for peer in ("HF Shadow", "LoRA all linear")]
        shown = " | ".join("-" if ratio is None else f"{ratio:.2f}" for ratio in ratios)
        dropout = "default" if row["dropout"] is None else f"{row['dropout']:g}"
        lines.append(
            f"| {row['vocabulary']:,} | {row['labels']} | {dropout} | {row['row']} | {row['trainable']:,} | "
            f"{row['kept_mb']:.0f} | {shown} | {row['peak_mb']:.0f} |"
        )
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="seconds, for CI: figures mean nothing")
    parser.add_argument("--shape", choices=SHAPES, default="12x1024")
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[32_000, 151_936])
    parser.add_argument("--labels", nargs="+", choices=["answers", "all"], default=["answers", "all"])
    parser.add_argument("--dropout", nargs="+", default=["default", "0"], help="'default' (each method's) or a number")
    parser.add_argument("--rows", nargs="+", choices=[*ROWS, *PRESET_ROWS], help="only these")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--out", type=Path, help="also write the result, with its origin, to this JSON file")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--settings", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if options.row is not None:
        print(json.dumps(measure(options.row, argparse.Namespace(**options.settings))))
        return
    if options.tiny:
        options.shape, options.vocabulary, options.labels, options.dropout = "tiny", [512], ["answers"], ["default"]
    dtype = options.dtype or ("float32" if options.device == "cpu" else "bfloat16")
    payload: dict[str, Any] = {"benchmark": "memory", "rows": []}
    for vocabulary, labels, dropout in itertools.product(options.vocabulary, options.labels, options.dropout):
        settings = {
            "shape": options.shape,
            "vocabulary": vocabulary,
            "labels": labels,
            "dropout": None if dropout == "default" else float(dropout),
            "device": options.device,
            "dtype": dtype,
        }
        payload["rows"] += compare(options.rows or ROWS, settings)
        if options.out is not None:
            write_record(options.out, payload)  # after every setting: a later failure loses nothing
    print(table(payload["rows"]))
    print(json.dumps({**payload, "origin": origin()}))


if __name__ == "__main__":
    main()
