"""A server under load: N streams at a time, every answer compared with the one its request gets alone.

    python benchmarks/serve_load.py --out results/serve_load.json
    python benchmarks/serve_load.py runs/demo/adapter --modes attached
    python benchmarks/serve_load.py --tiny

Without an adapter two random ones are served on the embedded base. Requests go to all adapters and modes in turn, and
in blocks: each block is asked one request at a time, then all streams at once, so that both throughputs see the same
machine. An answer that leaves its single-request answer where two tokens are equally likely (rounding) counts as a tie;
any other difference, a lost answer or a repeated id fails the run.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from serving import TIE, Answer, Asked, Lost, ask_streaming, gap_where_they_part, milliseconds, prompts, random_adapters
from shadowpeft.deploy.serve.catalogue import BASE_NAME, MODES
from shadowpeft.deploy.serve.loading import parse_adapter
from shadowpeft.deploy.system_eval.processes import running_server
from shadowpeft.evaluate.record import origin, write_record

Outcomes = list[Answer | Lost]


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as work:
        adapters = options.adapters or random_adapters(Path(work), ["first", "second"])
        names = model_names([parse_adapter(text)[0] for text in adapters], options.modes)
        asked = requests(names, options)
        limits = ["--max-batch", str(options.streams), "--max-waiting", str(2 * options.streams)]
        with running_server(["serve", *adapters, *limits]) as server:
            measured = asyncio.run(measure(server.url, asked, options))
    record = {
        "benchmark": "serve_load",
        "adapters": "random" if not options.adapters else [parse_adapter(text)[0] for text in adapters],
        **{name: getattr(options, name) for name in ("streams", "requests", "blocks", "max_tokens", "modes")},
        **measured,
    }
    print_table(record)
    if options.out:
        write_record(options.out, record)
    print(json.dumps({**record, "origin": origin()}))
    if record["lost"] or record["wrong"] or record["repeated_ids"]:
        sys.exit("answers were lost or mixed")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", nargs="*", help="FOLDER or NAME=FOLDER [default: two random ones]")
    parser.add_argument("--streams", type=int, default=32, help="requests under way at a time")
    parser.add_argument("--requests", type=int, default=640)
    parser.add_argument("--blocks", type=int, default=4, help="alternations of one at a time and all at once")
    parser.add_argument("--max-tokens", type=int, default=48, help="of the longest answers; the shortest have half")
    parser.add_argument("--modes", nargs="+", choices=[*MODES, "base"], default=[*MODES, "base"])
    parser.add_argument("--tiny", action="store_true", help="seconds, for a quick check: figures mean nothing")
    parser.add_argument("--out", type=Path, help="also write the result, with its origin, to this JSON file")
    options = parser.parse_args()
    if options.tiny:
        options.streams, options.requests, options.blocks, options.max_tokens = 8, 32, 2, 8
    if min(options.streams, options.blocks, options.max_tokens) < 1 or options.requests < options.blocks:
        parser.error("--streams, --blocks and --max-tokens must be at least 1, and --requests no fewer than --blocks")
    return options


def model_names(adapters: Sequence[str], modes: Sequence[str]) -> list[str]:
    return [BASE_NAME if mode == "base" else f"{name}:{mode}" for name in adapters for mode in modes]


def requests(names: Sequence[str], options: argparse.Namespace) -> list[Asked]:
    """Different prompts for the models in turn, with answers of different lengths."""
    rng, texts = random.Random(0), prompts(options.requests)
    lengths = range((options.max_tokens + 1) // 2, options.max_tokens + 1)
    return [
        Asked(model=names[i % len(names)], prompt=texts[i % len(texts)], max_tokens=rng.choice(lengths))
        for i in range(options.requests)
    ]


async def measure(url: str, asked: list[Asked], options: argparse.Namespace) -> dict[str, Any]:
    limits = httpx.Limits(max_connections=options.streams)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits, trust_env=False) as client:
        await send(client, asked[: options.streams], options.streams)  # warm-up
        alone: Outcomes = []
        together: Outcomes = []
        blocks, num_rows, num_steps = [], 0.0, 0.0
        size = -(-len(asked) // options.blocks)
        for start in range(0, len(asked), size):
            block = asked[start : start + size]
            single, single_seconds = await send(client, block, 1)
            before = await batch_rows(client)
            joint, joint_seconds = await send(client, block, options.streams)
            after = await batch_rows(client)
            alone, together = alone + single, together + joint
            num_rows, num_steps = num_rows + after[0] - before[0], num_steps + after[1] - before[1]
            blocks.append({"single": rates(single, single_seconds), "together": rates(joint, joint_seconds)})
        verdicts = [await judge(client, *three) for three in zip(asked, alone, together, strict=True)]
    return summary(asked, alone, together, verdicts, blocks) | {
        "mean_rows_a_step": round(num_rows / num_steps, 2) if num_steps else None
    }


async def send(client: httpx.AsyncClient, asked: Sequence[Asked], streams: int) -> tuple[Outcomes, float]:
    """Outcomes in the order of the requests, and the time for all, ``streams`` at a time."""
    outcomes: dict[int, Answer | Lost] = {}
    waiting = iter(range(len(asked)))

    async def work() -> None:
        for index in waiting:
            outcomes[index] = await ask_streaming(client, asked[index])

    started = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(streams)))
    return [outcomes[index] for index in range(len(asked))], time.perf_counter() - started


async def batch_rows(client: httpx.AsyncClient) -> tuple[float, float]:
    """(rows, steps) that the server has decoded so far; a row counts once for each step it takes part in."""
    lines = (await client.get("/metrics")).text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return tuple(float(values[f"shadowpeft_batch_rows_{name}"]) for name in ("sum", "count"))


def rates(outcomes: Outcomes, seconds: float) -> dict[str, float]:
    answers = [one for one in outcomes if isinstance(one, Answer)]
    tokens = sum(one.num_tokens for one in answers)
    return {
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / seconds, 2),
        "requests_per_second": round(len(answers) / seconds, 3),
    }


async def judge(client: httpx.AsyncClient, asked: Asked, alone: Answer | Lost, together: Answer | Lost) -> str:
    """``equal``, ``tie``, ``wrong`` or ``lost``."""
    if isinstance(alone, Lost) or isinstance(together, Lost):
        return "lost"
    if alone.text == together.text:
        return "equal"
    gap = await gap_where_they_part(client, asked, together.text)
    return "equal" if gap is None else "tie" if gap < TIE else "wrong"


def summary(
    asked: list[Asked], alone: Outcomes, together: Outcomes, verdicts: list[str], blocks: list[dict[str, Any]]
) -> dict[str, Any]:
    answers = [one for one in (*alone, *together) if isinstance(one, Answer)]
    names = dict.fromkeys(one.model for one in asked)
    ratios = [b["together"]["tokens_per_second"] / b["single"]["tokens_per_second"] for b in blocks]
    return {
        "models": {name: figures(name, asked, alone, together, verdicts) for name in names},
        "all": figures(None, asked, alone, together, verdicts),
        **{verdict: verdicts.count(verdict) for verdict in ("equal", "tie", "wrong", "lost")},
        "why_lost": sorted({one.why for one in (*alone, *together) if isinstance(one, Lost)}),
        "repeated_ids": len(answers) - len({one.identity for one in answers}),
        "measured_blocks": blocks,
        "throughput_ratio": {"median": round(statistics.median(ratios), 3), "least": round(min(ratios), 3)},
    }


def figures(name: str | None, asked: list[Asked], alone: Outcomes, together: Outcomes, verdicts: list[str]) -> dict[str, Any]:
    """Latency and verdicts of one model's answers; of all without a name."""
    mine = [i for i, one in enumerate(asked) if name in (None, one.model)]
    single = [one for i in mine if isinstance(one := alone[i], Answer)]
    joint = [one for i in mine if isinstance(one := together[i], Answer)]
    drafted = sum(one.info.get("drafted", 0) for one in joint)
    return {
        "num_requests": len(mine),
        "num_tokens": sum(one.num_tokens for one in joint),
        "latency_ms_alone": milliseconds([one.seconds for one in single]) if single else None,
        "latency_ms": milliseconds([one.seconds for one in joint]) if joint else None,
        "first_text_ms": milliseconds([one.first_seconds for one in joint]) if joint else None,
        "accepted_share": sum(one.info["accepted"] for one in joint if "drafted" in one.info) / drafted if drafted else None,
        **{verdict: sum(verdicts[i] == verdict for i in mine) for verdict in ("equal", "tie", "wrong", "lost")},
    }


def print_table(record: dict[str, Any]) -> None:
    ratio = record["throughput_ratio"]
    heads = ("model", "requests", "tokens", "alone p50", "p50", "p95", "p99", "first p50", "drafts", "equal", "tie", "wrong",
             "lost")  # fmt: skip
    table = Table(
        title=f"{record['streams']} streams (milliseconds); {record['mean_rows_a_step']} rows a step; throughput "
        f"{ratio['median']:.2f}x one at a time (least block {ratio['least']:.2f}x)"
    )
    for head in heads:
        table.add_column(head, justify="left" if head == "model" else "right")
    for name, one in [*record["models"].items(), ("all", record["all"])]:
        if one["latency_ms"] is None or one["latency_ms_alone"] is None:
            times = ["-"] * 5
        else:
            places = [one["latency_ms_alone"]["p50"], *one["latency_ms"].values(), one["first_text_ms"]["p50"]]
            times = [f"{value:.0f}" for value in places]
        share = "-" if one["accepted_share"] is None else f"{one['accepted_share']:.0%}"
        counts = [str(one[verdict]) for verdict in ("equal", "tie", "wrong", "lost")]
        table.add_row(name, str(one["num_requests"]), str(one["num_tokens"]), *times, share, *counts)
    Console(width=128).print(table)


if __name__ == "__main__":
    main()
