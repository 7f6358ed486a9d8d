"""Time of a training step (forward and backward) of this package, LoRA, DoRA and both other shadows.

``python benchmarks/train_step.py`` on a quiet machine (12 blocks x 1024, vocabulary 32,000: about 20 minutes on two
cores); ``--tiny`` for a few seconds; ``--device cuda --shape 8B`` on a GPU.

All rows live in this process around one set of base weights, and take their steps in turn, so that a slow moment of
the machine falls on all of them; times are medians over the rounds and ratios are medians of the ratios within each
round. The optimizer's step is left out: the budget, and so its cost, is the same for all rows.

The ceiling is the best rate of one large matrix product in this run. The share of it counts the operations that any
method needs to send gradients through a frozen base: 4 a weight and token of all blocks, 4 a weight of the head and
labelled position, and those of causal attention; what a method computes beyond that lowers its share. Peak memory, on
a GPU, is what a step allocates at once beyond the weights. glibc is told to keep freed memory, for all rows alike:
without it, faults of fresh pages are the larger part of the noise.
"""

import argparse
import itertools
import json
import statistics
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rows import (
    COMPILED,
    IGNORE,
    PACKAGES,
    PRESET_ROWS,
    ROWS,
    SHAPES,
    Shape,
    build,
    check_start,
    main_loss,
    make_base,
    make_batch,
    num_trainable,
)
from shadowpeft.evaluate.record import origin, write_record
from shadowpeft.train.allocator import keep_freed_memory


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(run: Any, device: str) -> float:
    synchronise(device)
    started = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - started


def peak_of(run: Any, device: str) -> float | None:
    """MB that are allocated at the same time while it runs, beyond what was before (all rows' weights); GPUs only.

    It is run once before: what a first step sets up stays.
    """
    run()
    if device == "cpu":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def ceiling(device: str, dtype: torch.dtype) -> float:
    """Operations a second of the best of eight products of two large matrices."""
    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    times = [seconds_of(lambda: a @ b, device) for _ in range(8)]
    return 2 * size**3 / min(times)


def needed_operations(shape: Shape, batch: dict[str, Tensor], vocabulary: int) -> float:
    """What the docstring says, for one step."""
    heads, kv_heads = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    block = shape.width * (2 * heads + 2 * kv_heads + 3 * shape.mlp_width)
    attention = 2 * heads * shape.length  # a token: q k^T and its product with v, over half of the positions
    labelled = int((batch["labels"][:, 1:] != IGNORE).sum())
    # Backward costs as much as forward for products with frozen weights, and twice as much for attention.
    return (
        4 * shape.num_blocks * shape.num_tokens * block
        + 3 * shape.num_blocks * shape.num_tokens * attention
        + 4 * labelled * vocabulary * shape.width
    )


def step(model: nn.Module, batch: dict[str, Tensor]) -> None:
    model(**batch).loss.backward()
    for parameter in model.parameters():
        parameter.grad = None


def compare(
    options: argparse.Namespace, *, vocabulary: int, labels: str, dropout: float | None
) -> list[dict[str, Any]]:
    """All rows that can run here, under one setting."""
    shape, device, dtype = SHAPES[options.shape], options.device, getattr(torch, options.dtype)
    base = make_base(shape, vocabulary=vocabulary, dtype=dtype, device=device)
    batch = make_batch(shape, vocabulary=vocabulary, labels=labels, device=device)
    chosen = options.rows or ROWS
    needed = {name: PACKAGES.get(name.removesuffix(COMPILED)) for name in chosen}
    names = [name for name, package in needed.items() if package is None or find_spec(package)]
    models = {name: build(name, base, shape, dropout=dropout, device=device) for name in names}
    check_start({name: main_loss(name, model, batch) for name, model in models.items()}, dtype=dtype)
    peaks = {name: peak_of(lambda model=model: step(model, batch), device) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name, model in models.items():
            times[name].append(seconds_of(lambda model=model: step(model, batch), device))
    rate, operations = ceiling(device, dtype), needed_operations(shape, batch, vocabulary)
    return [
        {
            "shape": shape.name,
            "vocabulary": vocabulary,
            "labels": labels,
            "dropout": dropout,
            "dtype": options.dtype,
            "row": name,
            "trainable": num_trainable(models[name]),
            "peak_mb": peaks[name],
            "seconds": statistics.median(times[name]),
            "rounds": times[name],
            "tokens_per_second": shape.num_tokens / statistics.median(times[name]),
            "share_of_ceiling": operations / rate / statistics.median(times[name]),
            "ratios": {
                other: statistics.median(a / b for a, b in zip(times[name], times[other], strict=True))
                for other in ("base with gradients", "LoRA all linear", "HF Shadow")
                if other in times
            },
        }
        for name in names
    ]


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| vocabulary | labels | dropout | row | trained | peak MB | s/step | tokens/s | of ceiling | x base | x LoRA | x HF |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        dropout = "default" if row["dropout"] is None else f"{row['dropout']:g}"
        peers = ("base with gradients", "LoRA all linear", "HF Shadow")
        peak = "-" if row["peak_mb"] is None else f"{row['peak_mb']:,.0f}"
        ratios = " | ".join(f"{row['ratios'][peer]:.2f}" if peer in row["ratios"] else "-" for peer in peers)
        lines.append(
            f"| {row['vocabulary']:,} | {row['labels']} | {dropout} | {row['row']} | {row['trainable']:,} | "
            f"{peak} | {row['seconds']:.3f} | {row['tokens_per_second']:.0f} | {row['share_of_ceiling']:.0%} | {ratios} |"
        )
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="seconds, for CI: figures mean nothing")
    parser.add_argument("--shape", choices=SHAPES, default="12x1024")
    parser.add_argument("--vocabulary", type=int, nargs="+", help="[default: 32000, or the shape's own]")
    parser.add_argument("--labels", nargs="+", choices=["answers", "all"], default=["answers", "all"])
    parser.add_argument("--dropout", nargs="+", default=["default", "0"], help="'default' (each method's) or a number")
    known = [*ROWS, *PRESET_ROWS]
    parser.add_argument("--rows", nargs="+", choices=[*known, *(name + COMPILED for name in known)], help="only these")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--out", type=Path, help="also write the result, with its origin, to this JSON file")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if options.tiny:
        options.shape, options.vocabulary, options.labels, options.dropout = "tiny", [512], ["answers"], ["default"]
        options.rounds = 2
    own = SHAPES[options.shape].vocabulary
    options.vocabulary = [own] if own else options.vocabulary or [32_000]
    options.dtype = options.dtype or ("float32" if options.device == "cpu" else "bfloat16")
    keep_freed_memory()  # for all rows alike, as `shadowpeft train` does
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    payload: dict[str, Any] = {"benchmark": "train_step", "num_threads": torch.get_num_threads(), "rows": []}
    for vocabulary, labels, dropout in itertools.product(options.vocabulary, options.labels, options.dropout):
        given = None if dropout == "default" else float(dropout)
        payload["rows"] += compare(options, vocabulary=vocabulary, labels=labels, dropout=given)
        if options.out is not None:
            write_record(options.out, payload)  # after every setting: a later failure loses nothing
    print(table(payload["rows"]))
    print(json.dumps({**payload, "origin": origin()}))


if __name__ == "__main__":
    main()
