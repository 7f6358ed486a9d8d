"""What a generated token costs: base, LoRA, the other Shadow implementations, and this one with and without drafts.

    python benchmarks/decode.py --shape 12x1024
    python benchmarks/decode.py --adapter runs/e2e/adapter --task e2e --data DIR
    python benchmarks/decode.py --tiny

All contenders generate in turn from the same prompts in one process; times are medians over trials and ratios are
medians of ratios within a trial. Prefill is a generation of one token; what further tokens take is the rest, and
both together are the whole. Equal tokens are asserted.
"""

import argparse
import json
import re
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig, GenerationConfig
from transformers.utils import logging

from decode_rows import Contender, lora_rows, our_rows, peer_rows, step_bytes
from shadowpeft import ShadowModel, SpeculativeConfig, collect_statistics, get_shadow_model
from shadowpeft.evaluate.record import origin, write_record
from shadowpeft.model.cache import CACHE
from shadowpeft.model.hub import find_folder
from shadowpeft.model.load import load_with_tokenizer
from shadowpeft.train.data import load_rows, prompt_ids
from shadowpeft.train.tasks import TASKS
from shapes import SHAPES, sharing_copy

Prompts = tuple[Tensor, Tensor]  # ids and attention mask [B, T]
BASE = "plain base"
# How close two logits may be where two runs part: kernels for 1 and for k + 1 tokens round differently.
TIE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.25}


def main() -> None:
    options = parse()
    logging.set_verbosity_error()
    bandwidth = copy_bandwidth(options.device)
    rows, trials, described = setting(options)
    results = []
    for batch in options.batches:
        results += measure_batch(rows, trials(batch), options, batch=batch, bandwidth=bandwidth)
    print_table(results)
    record = {
        "benchmark": "decode",
        **described,
        "new_tokens": options.new_tokens,
        "trials": options.trials,
        "threads": torch.get_num_threads(),
        "device": options.device,
        "compiled": options.compiled,
        "copy_bandwidth_gb_s": round(bandwidth / 1e9, 2),
        "rows": results,
    }
    if options.out:
        write_record(options.out, record)
    print(json.dumps({**record, "origin": origin()}))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, help="random weights of this shape")
    parser.add_argument("--tiny", action="store_true", help="the smallest shape, for a quick check")
    parser.add_argument("--adapter", help="folder of a trained adapter")
    parser.add_argument("--base", help="its base, if not the one it names")
    parser.add_argument("--task", choices=sorted(TASKS), default="robot", help="where its prompts come from")
    parser.add_argument("--data", type=Path, help="folder with the task's data")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--trials", type=int, help="prompts (or batches of them) in turn [default: 7; 2 with --tiny]")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="with --shape")
    parser.add_argument("--new-tokens", type=int, help="at most, after each prompt [default: 48; 8 with --tiny]")
    parser.add_argument("--drafts", nargs="+", default=["4", "auto"], help="numbers of drafts a round, or auto")
    parser.add_argument("--draft-vocabulary", type=int, help="also draft from so many of the commonest tokens")
    parser.add_argument("--acceptance", type=float, nargs="*", help="rigged rows [default with --shape: 0.5 0.7 0.9]")
    parser.add_argument("--rigged-drafts", type=int, default=4, help="number of drafts a round in rigged rows")
    parser.add_argument("--only", help="regular expression of rows to run beside base and attached")
    parser.add_argument("--compiled", action="store_true", help="static caches and compiled steps, CUDA graphs on a GPU")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="[default: float32; bfloat16 on cuda]")
    parser.add_argument("--out", type=Path, help="write the record to this JSON file")
    options = parser.parse_args()
    if sum(map(bool, (options.shape, options.tiny, options.adapter))) != 1:
        parser.error("give one of --shape, --adapter and --tiny")
    options.shape = "tiny" if options.tiny else options.shape
    options.trials = options.trials or (2 if options.tiny else 7)
    options.new_tokens = options.new_tokens or (8 if options.tiny else 48)
    options.acceptance = ([0.5, 0.7, 0.9] if options.shape else []) if options.acceptance is None else options.acceptance
    options.dtype = getattr(torch, options.dtype or ("float32" if options.device == "cpu" else "bfloat16"))
    return options


# ---------------------------------------------------------------- contenders and prompts


def setting(options: argparse.Namespace) -> tuple[list[Contender], Any, dict[str, Any]]:
    """(contenders, batch size -> prompts of each trial, what to note about them)."""
    make = shape_setting if options.shape else adapter_setting
    model, plain, trials, common, described = make(options)
    network = model.network()
    drafts = [as_settings(value, options) for value in options.drafts]
    if common:
        drafts.append(SpeculativeConfig(num_draft_tokens=4, draft_vocabulary=common, compile_options=compiling(options)))
    ours = our_rows(
        model, speculative=drafts, acceptances=options.acceptance, rigged_drafts=options.rigged_drafts,
        compile_options=compiling(options),
    )  # fmt: skip
    rows = [Contender(name=BASE, model=plain, bytes_per_step=step_bytes(plain)), ours[0]]
    rows += lora_rows(plain, num_trainable=network.num_parameters())
    if CACHE == "past_key_values":
        rows += peer_rows(plain, network.config)
    else:  # peft 0.21 then forgets the prompt, shadow-peft 0.1.1 reads it all again for every token
        print("the other Shadows look for a cache by a name that transformers 5.24 gave up: left out", flush=True)
    rows += [row for row in ours[1:] if not (options.compiled and "assistant_model" in row.name)]  # refuses static caches
    wanted = re.compile(options.only or "")
    return [row for row in rows if row in rows[:2] or wanted.search(row.name)], trials, described


def as_settings(value: str, options: argparse.Namespace) -> SpeculativeConfig:
    if value == "auto":
        return SpeculativeConfig(num_draft_tokens=8, adaptive=True)
    return SpeculativeConfig(num_draft_tokens=int(value), compile_options=compiling(options))


def compiling(options: argparse.Namespace) -> dict[str, Any] | None:
    """Keywords of ``torch.compile`` for the passes of speculation; those of plain decoding are transformers' own."""
    if not options.compiled:
        return None
    return {"mode": "reduce-overhead"} if options.device != "cpu" else {}


def shape_setting(options: argparse.Namespace) -> tuple:
    shape = SHAPES[options.shape]
    base = shape.base(dtype=options.dtype, device=options.device)
    plain = sharing_copy(base)
    torch.manual_seed(1)
    config = shape.shadow() if options.dtype == torch.float32 else shape.shadow().replace(adapter_dtype="base")
    model = get_shadow_model(base, config).eval()
    with torch.no_grad():
        for injection in (*model.network().injections, *model.network().midpoints):
            injection.W_up.normal_(std=0.02)

    def trials(batch: int) -> list[Prompts]:
        generator = torch.Generator().manual_seed(2)
        size = (options.trials, batch, options.prompt_tokens)
        ids = torch.randint(1, shape.vocabulary, size, generator=generator).to(options.device)
        return [(part, torch.ones_like(part)) for part in ids]

    common = list(range(options.draft_vocabulary)) if options.draft_vocabulary else None
    return model, plain, trials, common, {"shape": options.shape, "dtype": str(options.dtype).removeprefix("torch.")}


def adapter_setting(options: argparse.Namespace) -> tuple:
    loaded, tokenizer = load_with_tokenizer(options.adapter, base=options.base)
    base = loaded.unload().to(options.device)
    plain = sharing_copy(base)
    model = ShadowModel.from_pretrained(find_folder(options.adapter), base, allow_other_weights=True)
    task = TASKS[options.task]
    rows = load_rows(task, "test", source=options.data, limit=options.trials * max(options.batches))
    prompts = [prompt_ids(task, tokenizer, row, 512) for row in rows]
    options.end_tokens = [tokenizer.eos_token_id]

    def trials(batch: int) -> list[Prompts]:
        parts = [prompts[start : start + batch] for start in range(0, len(prompts), batch)]
        return [padded(part, options.device) for part in parts if len(part) == batch][: options.trials]

    described = {"adapter": Path(options.adapter).name, "task": options.task, "dtype": str(base.dtype)[6:]}
    return model, plain, trials, common_tokens(task, tokenizer, options), described


def common_tokens(task: Any, tokenizer: Any, options: argparse.Namespace) -> list[int] | None:
    """The commonest tokens of the training answers, ends included."""
    if not options.draft_vocabulary:
        return None
    rows = load_rows(task, "train", source=options.data, limit=5000)
    ids = torch.tensor([token for row in rows for token in tokenizer(task.target(row), add_special_tokens=False)["input_ids"]])
    common = ids.bincount().argsort(descending=True)[: options.draft_vocabulary].tolist()
    return [*common, *options.end_tokens]


def padded(prompts: list[list[int]], device: str) -> Prompts:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=device)
    return ids, mask


# ---------------------------------------------------------------- measuring


def measure_batch(
    rows: list[Contender], trials: list[Prompts], options: argparse.Namespace, *, batch: int, bandwidth: float
) -> list[dict[str, Any]]:
    rows = [row for row in rows if row.max_batch is None or batch <= row.max_batch]
    times: dict[str, list[tuple[float, float, float]]] = {row.name: [] for row in rows}
    lengths: dict[str, list[float]] = {row.name: [] for row in rows}
    drafts: dict[str, list[float]] = {row.name: [] for row in rows}
    memory = dict.fromkeys(times, 0.0)
    num_ties = dict.fromkeys(times, 0)
    for index, prompts in enumerate([trials[0], *trials]):  # the first round warms up
        tokens: dict[str, Tensor] = {}
        attached = next(row for row in rows if row.name == "ours, attached")
        known = run(attached, prompts, options, new_tokens=options.new_tokens)[0]
        shift = index % len(rows)
        for row in rows[shift:] + rows[:shift]:
            reset_peak(options.device)
            with collect_statistics() as collected:
                _, prefill = run(row, prompts, options, new_tokens=1, known=known)
                tokens[row.name], whole = run(row, prompts, options, new_tokens=options.new_tokens, known=known)
            memory[row.name] = max(memory[row.name], peak_mib(options.device))
            num_new = num_generated(tokens[row.name], prompts, options) - batch
            if index and num_new > 0:
                times[row.name].append((1000 * prefill, 1000 * (whole - prefill) * batch / num_new, 1000 * whole))
                lengths[row.name].append(accepted_length(row, collected, tokens[row.name], prompts, options, known))
                drafts[row.name] += [drafts_a_round(row, collected)]
        for row in rows:
            if row.equal_to:
                num_ties[row.name] += check_equal(tokens[row.equal_to], tokens[row.name], attached.model, prompts[0])
    return [
        summary(row, times[row.name], times[BASE], statistics.mean(lengths[row.name]), statistics.mean(drafts[row.name]),
                memory[row.name], num_ties[row.name], batch=batch, bandwidth=bandwidth)
        for row in rows
    ]  # fmt: skip


def run(
    row: Contender, prompts: Prompts, options: argparse.Namespace, *, new_tokens: int, known: Tensor | None = None
) -> tuple[Tensor, float]:
    """(sequences, seconds)."""
    ends = getattr(options, "end_tokens", None)
    config = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=ends, pad_token_id=0, use_cache=True)
    if options.compiled:
        config.cache_implementation = "static"
        config.compile_config = CompileConfig()
        config.compile_config._compile_all_devices = options.device == "cpu"
    more = row.options(known) if callable(row.options) else row.options
    if "assistant_model" in more and new_tokens == 1:
        more = {}  # transformers drafts nothing here
    synchronize(options.device)
    started = time.perf_counter()
    sequences = row.model.generate(input_ids=prompts[0], attention_mask=prompts[1], generation_config=config, **more)
    synchronize(options.device)
    return sequences, time.perf_counter() - started


def num_generated(sequences: Tensor, prompts: Prompts, options: argparse.Namespace) -> int:
    """Generated tokens, ends included and what is behind them left out."""
    new = sequences[:, prompts[0].shape[1] :]
    ends = getattr(options, "end_tokens", None)
    if not ends:
        return new.numel()
    ended = torch.isin(new, torch.tensor(ends, device=new.device)).long()
    return int((ended.cumsum(1) - ended == 0).sum())


def accepted_length(
    row: Contender, collected: list, sequences: Tensor, prompts: Prompts, options: argparse.Namespace, known: Tensor
) -> float:
    """Tokens a row of the batch gains in one pass of the base."""
    if collected:
        return collected[-1].mean_accepted_length
    if "assistant_model" not in (row.options if isinstance(row.options, dict) else {}):
        return 1.0
    passes = []
    handle = row.model.base.register_forward_pre_hook(lambda *_: passes.append(1))
    decoder = row.model.base.base_model.register_forward_pre_hook(lambda *_: passes.append(1))
    run(row, prompts, options, new_tokens=options.new_tokens, known=known)
    handle.remove(), decoder.remove()
    return num_generated(sequences, prompts, options) / len(passes)


def drafts_a_round(row: Contender, collected: list) -> float:
    if not collected or not collected[-1].num_row_rounds:
        return row.num_drafts
    return collected[-1].num_drafted / collected[-1].num_row_rounds


def check_equal(expected: Tensor, found: Tensor, model: ShadowModel, prompts: Tensor) -> int:
    """Number of rows that part at a tie; anything else that differs is an error."""
    width = max(expected.shape[1], found.shape[1])
    expected, found = (torch.nn.functional.pad(ids, (0, width - ids.shape[1])) for ids in (expected, found))
    num_ties = 0
    for row, (ours, theirs) in enumerate(zip(expected, found, strict=True)):
        if torch.equal(ours, theirs):
            continue
        place = int((ours != theirs).nonzero()[0, 0])
        start = int((prompts[row] != 0).nonzero()[0, 0])
        with torch.no_grad():
            logits = model(ours[None, start:place], use_cache=False, logits_to_keep=1).logits[0, -1].double()
        gap = float((logits[ours[place]] - logits[theirs[place]]).abs())
        if gap > TIE[model.base.dtype]:
            raise AssertionError(f"row {row} parts at token {place} although the two logits differ by {gap}")
        num_ties += 1
    return num_ties


def summary(
    row: Contender, times: list[tuple[float, float, float]], base: list[tuple[float, float, float]], length: float,
    num_drafts: float, memory: float, num_ties: int, *, batch: int, bandwidth: float,
) -> dict[str, Any]:  # fmt: skip
    first, cost, whole = (statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(each[1] / other[1] for each, other in zip(times, base, strict=False))
    least = 1000 * row.bytes_per_step / bandwidth
    return {
        "name": row.name,
        "batch": batch,
        "prefill_ms": round(first, 2),
        "ms_per_token": round(cost, 3),
        "tokens_per_s": round(1000 * batch / cost, 2),
        "ratio_to_base": round(ratio, 3),
        "whole_ms": round(whole, 2),
        "mean_accepted_length": round(length, 3),
        "mean_drafts_a_round": round(num_drafts, 3),
        "peak_mib": round(memory),
        # Of rows that draft no share: the pass over the prompt, which is not in the time of a token, holds drafts too.
        "bandwidth_share": None if row.num_drafts else round(least / cost, 3),
        "rows_that_part_at_a_tie": num_ties,
        "num_trials": len(times),
    }


# ---------------------------------------------------------------- the machine


def copy_bandwidth(device: str) -> float:
    """Bytes read and written a second by a plain copy, the best of five."""
    source = torch.ones(64 * 2**20, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(5):
        synchronize(device)
        started = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * source.nbytes / best


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def reset_peak(device: str) -> None:
    """Starts a new peak; on Linux the process's, where the system allows it."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_mib(device: str) -> float:
    """Peak memory in MiB: allocated on the device, or resident in the process, which holds all contenders."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"VmHWM:\s+(\d+)", status.read_text(encoding="ascii"))
        return int(found[1]) / 2**10 if found else 0.0
    scale = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


def print_table(results: list[dict[str, Any]]) -> None:
    names = ["name", "batch", "prefill_ms", "ms_per_token", "tokens_per_s", "ratio_to_base", "whole_ms",
             "mean_accepted_length", "peak_mib", "bandwidth_share"]  # fmt: skip
    heads = ["", "batch", "prefill ms", "ms/token", "tokens/s", "x base", "whole ms", "accepted", "peak MiB*",
             "of ceiling"]  # fmt: skip
    table = [heads, *([str(row[name]) for name in names] for row in results)]
    widths = [max(len(line[column]) for line in table) for column in range(len(heads))]
    for line in table:
        cells = [
            line[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
        ]
        print("  ".join(cells))
    print("ms/token: of one row, behind the first token. whole: prompt and answer, whose length is the model's. accepted:")
    print("tokens a row gains in one pass of the base. * of the process (CPU), which holds all contenders, or allocated on the")
    print("device. of ceiling: time to read the weights at copy bandwidth / time taken, without drafts.")


if __name__ == "__main__":
    main()
