"""The step between two blocks on a GPU: kernels against plain torch operations and the floor that memory sets.

``python benchmarks/step_kernel.py --device cuda`` (a minute); ``--sweep`` times tile sizes; ``--tiny`` anywhere.

The floor is the time to read h and s and to write h' and s' at the bandwidth that a large copy reaches in this run.
Every timed call is recorded in a CUDA graph over several sets of states, together larger than the cache, so that
neither the cost of launching nor a warm cache is measured; ways take turns and times are medians over rounds. Results
of the kernels are compared with those of the equations in float64 first.
"""

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from decode import copy_bandwidth
from shadowpeft import ShadowConfig
from shadowpeft.core.kernels import StepSpec, reference
from shadowpeft.core.kernels.backend import has_triton
from shadowpeft.core.kernels.spec import StepWeights
from shadowpeft.core.network import ShadowNetwork
from shadowpeft.evaluate.record import origin, write_record

# Width and h_g of Qwen3-0.6B, 4B and 8B.
WIDTHS = {1024: 10, 2560: 8, 4096: 8}
# More than the cache of any GPU so far holds.
BYTES_IN_TURN = 512 * 2**20
# Of a 16-bit result: half a unit in the last place, and what rounding s' first adds.
TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 1e-5}


class Problem(NamedTuple):
    spec: StepSpec
    w: StepWeights
    states: list[tuple[Tensor, Tensor]]


def problem(
    preset: str, width: int, num_tokens: int, dtype: torch.dtype, device: str, *, sets: int | None = None
) -> Problem:
    config = ShadowConfig.preset(preset).replace(
        inject_activation="none", alpha_rank=None,  # which no kernel has
        r=16, update_hidden_size=WIDTHS.get(width, 8), shadow_dropout=0.0, adapter_dtype="float32"
    )
    torch.manual_seed(0)
    network = ShadowNetwork(config, nn.Identity(), width=width, num_blocks=3, backbone_width=width, embedding_width=width)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.1)
    network.to(device)
    update = network.updates[0] if len(network.updates) else None
    w = StepWeights(*(None if x is None else x.detach() for x in network._weights(network.injections[1], update)))
    if sets is None:
        sets = 1 if device == "cpu" else max(BYTES_IN_TURN // (4 * num_tokens * width * dtype.itemsize), 2)
    states = [tuple(torch.randn(num_tokens, width, device=device).to(dtype) for _ in range(2)) for _ in range(sets)]
    return Problem(StepSpec.of(config, training=True), w, states)  # type: ignore[arg-type]


def ways(device: str) -> dict[str, Any]:
    found: dict[str, Any] = {"torch operations": reference}
    if device == "cuda" and has_triton():
        from shadowpeft.core.kernels import triton_step

        found["kernels"] = triton_step
    return found


def forward(way: Any, given: Problem, index: int) -> Any:
    return way.forward(given.spec, *given.states[index], given.w)


def backward(way: Any, given: Problem, kept: Any, index: int) -> Any:
    """Upstream gradients are the states of the next set; their values do not matter for the time."""
    h, s = given.states[index]
    grad_h, grad_s = given.states[(index + 1) % len(given.states)]
    has_update = given.w.W_T1 is not None
    return way.backward(given.spec, grad_h=grad_h, grad_s=grad_s if has_update else None, h=h, s=s,
                        bottleneck=kept.bottleneck, rng_state=None, w=given.w, needs_grad_h=True)  # fmt: skip


def check(way: Any, given: Problem) -> float:
    """Largest relative error of h' and s', as a norm, against the equations in float64.

    Raises:
        AssertionError: it is larger than rounding explains.
    """
    h, s = given.states[0]
    out = forward(way, given, 0)
    wide = StepWeights(*(None if x is None else x.double() for x in given.w))
    expected = reference.forward(given.spec, h.double(), s.double(), wide)
    pairs = [(out.h, expected.h)] + ([] if out.s is None else [(out.s, expected.s)])
    error = max(((a.double() - b).norm() / b.norm()).item() for a, b in pairs)
    assert error < TOLERANCE[h.dtype], f"relative error {error}"
    return error


def milliseconds(run: Callable[[int], Any], num_sets: int, device: str) -> Callable[[], float]:
    """A function that times one pass over all sets and gives the time of one call."""
    for index in range(num_sets):
        run(index)
    if device == "cpu":
        return partial(_by_clock, run, num_sets)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(num_sets):
            run(index)
    return partial(_by_events, graph, num_sets)


def _by_clock(run: Callable[[int], Any], num_sets: int) -> float:
    started = time.perf_counter()
    for index in range(num_sets):
        run(index)
    return 1000 * (time.perf_counter() - started) / num_sets


def _by_events(graph: Any, num_sets: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / num_sets


def compare(options: argparse.Namespace, preset: str, width: int, bandwidth: float) -> list[dict[str, Any]]:
    given = problem(preset, width, options.tokens, options.dtype, options.device)
    h, s = given.states[0]
    has_update = given.w.W_T1 is not None
    least = 1000 * (2 * h.nbytes + (2 if has_update else 1) * s.nbytes) / bandwidth
    contenders, errors = {}, {}
    for name, way in ways(options.device).items():
        errors[name] = check(way, given)
        kept = forward(way, given, 0)
        contenders[name, "forward"] = milliseconds(partial(forward, way, given), len(given.states), options.device)
        contenders[name, "backward"] = milliseconds(partial(backward, way, given, kept), len(given.states), options.device)
    target = [torch.empty_like(h) for _ in range(2)]

    def copies(index: int) -> None:
        for source, place in zip(given.states[index], target, strict=True):
            place.copy_(source)

    contenders["copy of h and s", "forward"] = milliseconds(copies, len(given.states), options.device)
    times: dict[Any, list[float]] = {key: [] for key in contenders}
    for _ in range(options.rounds):
        for key, timed in contenders.items():
            times[key].append(timed())
    return [
        {
            "preset": preset, "width": width, "tokens": options.tokens, "dtype": str(options.dtype)[6:], "way": name,
            "pass": part, "ms": statistics.median(values), "floor_ms": least,
            "x_floor": statistics.median(values) / least, "relative_error": errors.get(name),
        }
        for (name, part), values in times.items()
    ]  # fmt: skip


KERNELS = ("FORWARD", "BACKWARD_TOKENS", "BACKWARD_WEIGHTS")


def sweep(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Times of the three kernels for many tile sizes at the last width; those of a backward kernel include the other's."""
    choices = itertools.product(options.sweep_tokens, options.sweep_columns, (4, 8))
    asked = list(itertools.product(options.presets, KERNELS, choices))
    # Compiling takes long and is kept on disk; processes share the work.
    with ProcessPoolExecutor(max_workers=os.cpu_count(), mp_context=get_context("spawn")) as pool:
        obstacles = list(pool.map(partial(compiled_once, options), asked))
    found = []
    for each, obstacle in zip(asked, obstacles, strict=True):
        line = dict(zip(("preset", "kernel", "tiles"), each, strict=True)) | {"obstacle": obstacle}
        if obstacle is None:
            line["ms"] = sweep_time(options, *each)
        found.append(line)
        print(line, flush=True)
    return found


@contextmanager
def tiles_of(preset: str, kernel: str, tiles: tuple[int, int, int]) -> Iterator[Any]:
    """The kernels' module with other tiles for one kernel, within the block."""
    from shadowpeft.core.kernels import triton_step

    choices = getattr(triton_step, kernel)
    variant = "update" if ShadowConfig.preset(preset).use_update else "no update"
    before, choices[variant] = choices[variant], triton_step.Tiles(*tiles)
    try:
        yield triton_step
    finally:
        choices[variant] = before


def compiled_once(options: argparse.Namespace, asked: tuple[str, str, tuple[int, int, int]]) -> str | None:
    """Why these tiles cannot be used, or None."""
    from triton.errors import TritonError

    preset, kernel, tiles = asked
    given = problem(preset, options.widths[-1], options.tokens, options.dtype, options.device, sets=2)
    try:
        with torch.no_grad(), tiles_of(preset, kernel, tiles) as way:
            check(way, given)
            if kernel != "FORWARD":
                backward(way, given, forward(way, given, 0), 0)
            torch.cuda.synchronize()
    except (RuntimeError, AssertionError, TritonError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0][:120]
    return None


def sweep_time(options: argparse.Namespace, preset: str, kernel: str, tiles: tuple[int, int, int]) -> float:
    given = problem(preset, options.widths[-1], options.tokens, options.dtype, options.device)
    with tiles_of(preset, kernel, tiles) as way:
        run = partial(forward, way, given)
        if kernel != "FORWARD":
            run = partial(backward, way, given, forward(way, given, 0))
        timed = milliseconds(run, len(given.states), options.device)
    return statistics.median(timed() for _ in range(options.rounds))


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| preset | width | way | pass | us | floor us | x floor | error |", "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        error = "-" if row["relative_error"] is None else f"{row['relative_error']:.1e}"
        lines.append(
            f"| {row['preset']} | {row['width']} | {row['way']} | {row['pass']} | {1000 * row['ms']:.1f} | "
            f"{1000 * row['floor_ms']:.1f} | {row['x_floor']:.2f} | {error} |"
        )
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="seconds, anywhere: figures mean nothing")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS))
    parser.add_argument("--presets", nargs="+", default=["paper", "recommended"])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--sweep", action="store_true", help="tile sizes instead, at the last width")
    parser.add_argument("--sweep-tokens", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--sweep-columns", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--out", type=Path, help="also write the result, with its origin, to this JSON file")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if options.tiny:
        options.tokens, options.widths, options.rounds = 32, [64], 2
    options.dtype = getattr(torch, options.dtype)
    with torch.no_grad():
        bandwidth = copy_bandwidth(options.device)
        if options.sweep:
            print(json.dumps(sweep(options)))
            return
        rows = [each for preset in options.presets for width in options.widths
                for each in compare(options, preset, width, bandwidth)]  # fmt: skip
    print(table(rows))
    payload = {"benchmark": "step_kernel", "copy_bandwidth_gb_s": round(bandwidth / 1e9, 1), "rows": rows}
    if options.out is not None:
        write_record(options.out, payload)
    print(json.dumps({**payload, "origin": origin()}))


if __name__ == "__main__":
    main()
