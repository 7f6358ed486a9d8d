"""An edge in front of a cloud that is killed and started again, over and over, while requests keep coming.

    python benchmarks/cloud_restart.py --out results/cloud_restart.json
    python benchmarks/cloud_restart.py runs/demo/adapter --router router.json
    python benchmarks/cloud_restart.py --tiny

Edge and cloud are processes of their own. Requests arrive at a fixed rate, whether or not earlier ones are answered; the
cloud is ended with SIGKILL, without a chance to finish anything. Afterwards every request must have one answer, the text
of the side that is said to have given it (ties by rounding apart), a flag on every answer that should have come from the
cloud and did not, and the edge's counters must agree with what its client saw. Without an adapter a random one is served
on the embedded base, with a threshold that sends about ``--share`` of the requests to the cloud.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from serving import TASK, TIE, Answer, Asked, Lost, ask, gap_where_they_part, milliseconds, prompts, random_adapters
from shadowpeft.deploy.route.artefact import Router, save_router
from shadowpeft.deploy.route.calibration import Temperature
from shadowpeft.deploy.route.operating import ALL_TO_CLOUD, Example, Target, operating_point
from shadowpeft.deploy.route.scores import all_scores
from shadowpeft.deploy.serve.loading import load_served, parse_adapter
from shadowpeft.deploy.serve.mixed import Path as ModelPath
from shadowpeft.deploy.serve.offline import answer_all
from shadowpeft.deploy.serve.prompts import text_ids
from shadowpeft.deploy.serve.service import end_ids
from shadowpeft.deploy.system_eval.processes import ServerProcess, running_server
from shadowpeft.evaluate.record import origin, write_record

CLOUD = "cloud"
KINDS = ("edge", "cloud", "degraded")


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as work:
        adapter = options.adapter or random_adapters(Path(work), [CLOUD])[0]
        folder = parse_adapter(adapter)[1]
        texts = prompts(min(options.distinct, options.requests))
        router = options.router or fresh_router(Path(work) / "router.json", folder, texts, options)
        record = run(folder, router, texts, options)
    print_table(record)
    if options.out:
        write_record(options.out, record)
    print(json.dumps({**record, "origin": origin()}))
    failed = [name for name, holds in record["checks"].items() if not holds]
    if failed:
        sys.exit(f"does not hold: {'; '.join(failed)}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", nargs="?", help="its folder [default: a random one]")
    parser.add_argument("--router", type=Path, help="file of `shadowpeft calibrate` [default: made here]")
    parser.add_argument("--share", type=float, default=0.5, help="of the requests that go to the cloud, without --router")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--distinct", type=int, default=250, help="different prompts among them")
    parser.add_argument("--rate", type=float, default=8.0, help="requests a second")
    parser.add_argument("--up-seconds", type=float, default=4.0, help="the cloud lives so long on average once it is up")
    parser.add_argument("--down-seconds", type=float, default=1.0, help="pause before it is started again")
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--tiny", action="store_true", help="one minute, for a quick check: figures mean nothing")
    parser.add_argument("--out", type=Path, help="also write the result, with its origin, to this JSON file")
    options = parser.parse_args()
    if options.tiny:
        options.requests, options.distinct, options.up_seconds = 120, 20, 2.0
    if min(options.requests, options.distinct, options.max_tokens) < 1 or not 0 <= options.share <= 1:
        parser.error("--requests, --distinct and --max-tokens must be at least 1, and --share from 0 to 1")
    if min(options.rate, options.up_seconds) <= 0 or options.down_seconds < 0:
        parser.error("--rate and --up-seconds must be more than 0, and --down-seconds no less")
    return options


def fresh_router(path: Path, folder: str, texts: Sequence[str], options: argparse.Namespace) -> Path:
    """A router without a grammar, whose rows are the edge's own answers to these prompts.

    Each row is right in the cloud and wrong on the edge, so that a limit on the cloud's share is used up.
    """
    loaded = load_served([f"{CLOUD}={folder}"])
    said = answer_all(
        loaded.model,
        loaded.tokenizer,
        [text_ids(loaded.tokenizer, text) for text in texts],
        ModelPath(adapter=CLOUD, uses_base=False),
        max_tokens=options.max_tokens,
        ends=end_ids(loaded.model, loaded.tokenizer),
    )
    rows = tuple(Example(scores=all_scores(one.facts), edge=0.0, cloud=1.0, reason=None, is_out_of_scope=False) for one in said)
    calibration = Temperature(temperature=1.0)
    confidence = [calibration.probability(row.scores["mean_logprob"]) for row in rows]
    router = Router(
        score="mean_logprob",
        calibration=calibration,
        skills=None,
        task=TASK,
        point=operating_point(rows, confidence, ALL_TO_CLOUD),
        examples=rows,
        report={},
    )
    save_router(router.with_target(Target(max_cloud_share=options.share)), path)
    return path


def run(folder: str, router: Path, texts: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    cloud = ServerProcess(["serve", f"{CLOUD}={folder}"])
    cloud.start()
    try:
        place = ["--router", str(router), "--cloud", cloud.url, "--cloud-model", CLOUD, "--max-waiting", "2048"]
        patience = ["--cloud-seconds", "5", "--breaker-failures", "5", "--breaker-seconds", "0.5"]
        with running_server(["edge", folder, *place, *patience]) as edge:
            asked = [
                Asked(model="edge", prompt=texts[i % len(texts)], max_tokens=options.max_tokens)
                for i in range(options.requests)
            ]
            started = time.monotonic()
            with outages(cloud, options) as killed:
                outcomes = asyncio.run(replay(edge.url, asked, options.rate))
            seconds = time.monotonic() - started
            # The cloud is up again, and says what either side should have said.
            return asyncio.run(figures(edge.url, cloud.url, asked, outcomes, killed, seconds, options))
    finally:
        cloud.stop()
        cloud.close()


@contextmanager
def outages(cloud: ServerProcess, options: argparse.Namespace) -> Iterator[list[float]]:
    """Within the block the cloud is killed and started again; yields the times of the kills. Leaves it running."""
    stop, killed, rng = threading.Event(), [], random.Random(0)

    def work() -> None:
        while not stop.wait(options.up_seconds * rng.uniform(0.5, 1.5)):
            cloud.kill()
            killed.append(time.monotonic())
            time.sleep(options.down_seconds)
            cloud.start()

    with ThreadPoolExecutor(1) as pool:
        outage = pool.submit(work)
        try:
            yield killed
        finally:
            stop.set()
            outage.result()


async def replay(url: str, asked: Sequence[Asked], rate: float) -> list[Answer | Lost]:
    """Sends one request every ``1 / rate`` seconds, however many are under way."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits, trust_env=False) as client:
        started, tasks = time.monotonic(), []
        for number, one in enumerate(asked):
            await asyncio.sleep(max(started + number / rate - time.monotonic(), 0))
            tasks.append(asyncio.create_task(ask(client, one)))
        return list(await asyncio.gather(*tasks))


async def figures(
    edge_url: str,
    cloud_url: str,
    asked: Sequence[Asked],
    outcomes: Sequence[Answer | Lost],
    killed: Sequence[float],
    seconds: float,
    options: argparse.Namespace,
) -> dict[str, Any]:
    answers = [one for one in outcomes if isinstance(one, Answer)]
    by_kind = {kind: [one for one in answers if kind_of(one) == kind] for kind in KINDS}
    verdicts = await judge(cloud_url, asked, outcomes)
    counted = await counters(edge_url)
    return {
        "benchmark": "cloud_restart",
        "adapter": "random" if options.adapter is None else parse_adapter(options.adapter)[0],
        "router": "made for this run" if options.router is None else options.router.name,
        "share": options.share if options.router is None else None,
        **{name: getattr(options, name) for name in ("requests", "distinct", "rate", "max_tokens")},
        **{name: getattr(options, name) for name in ("up_seconds", "down_seconds")},
        "seconds": round(seconds, 2),
        "kills": len(killed),
        "answered": len(answers),
        "lost": dict(Counter(one.why for one in outcomes if isinstance(one, Lost))),
        "answers": {
            kind: {"count": len(those), "latency_ms": milliseconds([a.seconds for a in those]) if those else None}
            for kind, those in by_kind.items()
        },
        "why_degraded": dict(Counter(one.info["cloud_error"] for one in by_kind["degraded"])),
        "texts": dict(Counter(verdicts)),
        "counters": counted,
        "checks": checks(asked, answers, by_kind, verdicts, counted),
    }


def kind_of(answer: Answer) -> str:
    return "degraded" if answer.info["degraded"] else answer.info["answered_by"]


def checks(
    asked: Sequence[Asked],
    answers: Sequence[Answer],
    by_kind: dict[str, list[Answer]],
    verdicts: Sequence[str],
    counted: dict[str, Any],
) -> dict[str, bool]:
    """What must hold, in words."""
    sizes = {kind: len(those) for kind, those in by_kind.items()}
    tallies = {
        "answers": len(answers),
        "edge": sizes["edge"] + sizes["degraded"],
        "cloud": sizes["cloud"],
        "degraded": sizes["degraded"],
        "escalated": sizes["cloud"] + sizes["degraded"],
    }
    metrics = {
        "answered": len(asked),
        "routed_edge": tallies["edge"],
        "routed_cloud": tallies["cloud"],
        "degraded": tallies["degraded"],
        "cloud_answered": tallies["cloud"],
        "new_tokens": sum(one.num_tokens for one in answers),
    }
    return {
        "every request has one answer": len(answers) == len(asked),
        "no answer was given twice": len({one.identity for one in answers}) == len(answers),
        "an answer that the cloud owed is flagged, and no other": all(
            (one.info["reason"] != "confident") == (kind_of(one) != "edge") for one in answers
        ),
        "every text is that of the side named": "wrong" not in verdicts,
        "the edge's tallies are its client's": {name: counted["seen"].get(name, 0) for name in tallies} == tallies,
        "the edge's metrics are its client's": {name: counted["metrics"][name] for name in metrics} == metrics,
        "the cloud was killed under load": counted["attempts"].get("down", 0) > 0,
    }


async def judge(cloud_url: str, asked: Sequence[Asked], outcomes: Sequence[Answer | Lost]) -> list[str]:
    """``equal``, ``tie``, ``wrong`` or ``lost`` for each request, against its side's answer when asked alone."""
    verdicts, alone = [], {}
    async with httpx.AsyncClient(base_url=cloud_url, timeout=120, trust_env=False) as client:
        for one, outcome in zip(asked, outcomes, strict=True):
            if isinstance(outcome, Lost):
                verdicts.append("lost")
                continue
            side = CLOUD if kind_of(outcome) == "cloud" else f"{CLOUD}:detached"
            direct = Asked(model=side, prompt=one.prompt, max_tokens=one.max_tokens)
            if direct not in alone:
                alone[direct] = await ask(client, direct)
            expected = alone[direct]
            if isinstance(expected, Answer) and expected.text == outcome.text:
                verdicts.append("equal")
                continue
            gap = await gap_where_they_part(client, direct, outcome.text)
            verdicts.append("equal" if gap is None else "tie" if gap < TIE else "wrong")
    return verdicts


async def counters(edge_url: str) -> dict[str, Any]:
    """What the edge counted: as its page shows it, and for Prometheus."""
    async with httpx.AsyncClient(base_url=edge_url, timeout=60, trust_env=False) as client:
        seen = (await client.get("/v1/shadow")).json()["seen"]
        text = (await client.get("/metrics")).text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]

    def total(name: str, **labels: str) -> int:
        found = [s for s in samples if s.name == f"shadowpeft_{name}_total" and labels.items() <= s.labels.items()]
        return int(sum(sample.value for sample in found))

    outcomes = sorted({s.labels["outcome"] for s in samples if s.name == "shadowpeft_cloud_attempts_total"})
    attempts = {name: total("cloud_attempts", outcome=name) for name in outcomes}
    metrics = {
        "answered": total("requests", route="/v1/completions", status="200"),
        "routed_edge": total("routed", answered_by="edge"),
        "routed_cloud": total("routed", answered_by="cloud"),
        "degraded": total("degraded"),
        "cloud_answered": attempts.get("answered", 0),
        "new_tokens": total("new_tokens"),
    }
    return {"seen": seen, "metrics": metrics, "attempts": attempts}


def print_table(record: dict[str, Any]) -> None:
    table = Table(
        title=f"{record['requests']} requests in {record['seconds']:.0f} s; the cloud was killed {record['kills']} times"
    )
    for head in ("answered by", "answers", "share", "p50 ms", "p95 ms", "p99 ms"):
        table.add_column(head, justify="left" if head == "answered by" else "right")
    names = {"edge": "edge, sure", "cloud": "cloud", "degraded": "edge, degraded"}
    for kind, name in names.items():
        one = record["answers"][kind]
        times = ["-"] * 3 if one["latency_ms"] is None else [f"{value:.0f}" for value in one["latency_ms"].values()]
        table.add_row(name, str(one["count"]), f"{one['count'] / record['requests']:.1%}", *times)
    table.add_row("nobody", str(record["requests"] - record["answered"]))
    Console(width=128).print(table)
    for name, holds in record["checks"].items():
        print(f"{'holds' if holds else 'DOES NOT HOLD'}: {name}")


if __name__ == "__main__":
    main()
