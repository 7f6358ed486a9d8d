"""The whole measurement: start the processes, replay the rows, put the figures together."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from shadowpeft.deploy.detach import write_detached
from shadowpeft.deploy.route.artefact import load_router
from shadowpeft.deploy.route.calibrate import check_routable, headline, is_out_of_scope
from shadowpeft.deploy.route.operating import NO_TARGET, Target
from shadowpeft.deploy.serve.exported import is_exported
from shadowpeft.deploy.serve.loading import load_served
from shadowpeft.deploy.system_eval.figures import routers_on_test, scope_detection, system_figures
from shadowpeft.deploy.system_eval.link import Link, running_link
from shadowpeft.deploy.system_eval.processes import HOST, running_server
from shadowpeft.deploy.system_eval.replay import Prompt, Replay, replay
from shadowpeft.errors import ConfigError, DataError
from shadowpeft.evaluate.record import data_revision
from shadowpeft.files import new_folder
from shadowpeft.model import ShadowModel
from shadowpeft.model.adapter_config import read_config
from shadowpeft.model.hub import find_folder
from shadowpeft.model.placement import device_named
from shadowpeft.train.answers import Row
from shadowpeft.train.data import all_prompt_ids, uses_chat
from shadowpeft.train.tasks import Task

CLOUD_NAME = "cloud"
# The systems without a device, which all others are timed against.
CLOUD_ONLY = (ATTACHED, LORA) = ("attached", "LoRA, merged")
_WARM_UP = 3


@dataclass(frozen=True, kw_only=True)
class SystemConfig:
    """One measurement.

    Attributes:
        adapter: folder of the trained adapter; attached in the cloud, detached on the edge.
        router: file of ``shadowpeft calibrate``.
        output: folder for the report, and for the detached shadow.
        base: if not the one that the adapter names.
        edge: what the device runs, a folder of ``shadowpeft detach`` or ``export``; None: the adapter is detached here.
        lora: a peft adapter of the same base, for comparison.
        round_trip_ms, megabits: of the link in front of the cloud; megabits None: unlimited.
        concurrency: requests under way at a time.
        target: another operating point than the router's own.
        max_tokens: of an answer; None: the task's.
        device: where all models run; None: the accelerator of this machine, else its CPU.
    """

    adapter: str
    router: Path
    output: Path
    base: str | None = None
    edge: str | None = None
    lora: str | None = None
    round_trip_ms: float = 50.0
    megabits: float | None = None
    concurrency: int = 1
    target: Target = NO_TARGET
    max_tokens: int | None = None
    device: str | None = None


def run(config: SystemConfig, task: Task, rows: Sequence[Row], tell: Callable[[str], None] = print) -> dict[str, Any]:
    """All figures, as one record.

    Raises:
        ShadowPeftError: nothing to replay, or a server that does not start or answer.
    """
    check_routable(task)
    device_named(config.device)  # found out here, and not by a server that does not start
    if not rows:
        raise DataError(f"there are no rows of task {task.name!r} to replay")
    router = load_router(config.router)
    if router.task not in (None, task.name):
        raise ConfigError(f"the router was calibrated on task {router.task!r}, not {task.name!r}; calibrate again")
    if config.target.given():
        router = router.with_target(config.target)
    edge_folder, prompts = _prepare(config, task, rows, tell)
    replays, num_bytes, cloud_logprobs = _replay_all(config, task, prompts, edge_folder, tell)
    out = [is_out_of_scope(task, row) for row in rows]
    right = {name: _right(task, one, rows) for name, one in replays.items()}
    systems = {name: system_figures(one, right[name], out, num_bytes.get(name)) for name, one in replays.items()}
    for one in systems.values():
        one["time_against"] = {name: one["seconds"] / systems[name]["seconds"] for name in CLOUD_ONLY if name in systems}
    scores = [reply.info["scores"] for reply in replays["edge only"].replies]
    return {
        "task": task.name,
        "num_rows": len(rows),
        "num_out_of_scope": sum(out),
        "rows_revision": data_revision(rows),
        "link": {"round_trip_ms": config.round_trip_ms, "megabits": config.megabits},
        "concurrency": config.concurrency,
        "expected": router.point.to_dict(),
        "score": router.score,
        "edge_is_exported": is_exported(str(edge_folder)),
        "systems": systems,
        "routers": routers_on_test(scores, right["edge only"], right[ATTACHED]),
        "scope_detection": scope_detection(
            scores, [row[0] for row in cloud_logprobs], [sum(row) for row in cloud_logprobs], out
        ),
    }


def _right(task: Task, one: Replay, rows: Sequence[Row]) -> list[float]:
    return [headline(task, reply.text, row) for reply, row in zip(one.replies, rows, strict=True)]


def _prepare(
    config: SystemConfig, task: Task, rows: Sequence[Row], tell: Callable[[str], None]
) -> tuple[Path, list[Prompt]]:
    """(the device's model, prompts as texts, or as ids where a chat template made them).

    Raises:
        ConfigError: there is no folder ``config.edge``, or an earlier measurement's shadow is where this one's would be.
        DetachError: the detached shadow does not compute what the attached one does.
    """
    if config.edge is not None and not Path(config.edge).is_dir():
        raise ConfigError(f"there is no folder {config.edge}; write it with: shadowpeft detach, or shadowpeft export")
    folder = new_folder(config.output / "edge") if config.edge is None else Path(config.edge)
    loaded = load_served([f"{CLOUD_NAME}={config.adapter}"], base=config.base, device="cpu")
    assert isinstance(loaded.model, ShadowModel)
    if config.edge is None:
        tell("detaching the shadow")
        write_detached(loaded.model, folder, tokenizer=loaded.tokenizer)
    if uses_chat(loaded.tokenizer):
        return folder, list(all_prompt_ids(task, loaded.tokenizer, rows))
    return folder, [task.prompt(row) for row in rows]


def _replay_all(
    config: SystemConfig, task: Task, prompts: list[Prompt], edge_folder: Path, tell: Callable[[str], None]
) -> tuple[dict[str, Replay], dict[str, dict[str, int]], list[list[float]]]:
    """(replay of each system, bytes on its link, log-probabilities of the attached model's tokens)."""
    max_tokens = config.max_tokens or task.max_new_tokens
    ask = partial(replay, max_tokens=max_tokens, concurrency=config.concurrency)
    replays: dict[str, Replay] = {}
    num_bytes: dict[str, dict[str, int]] = {}

    def measure(name: str, url: str, model: str, link: Link | None) -> None:
        tell(f"replaying {len(prompts)} rows: {name}")
        ask(url, model, prompts[:_WARM_UP])
        before = dict(link.num_bytes) if link else {}
        replays[name] = ask(url, model, prompts)
        if link is not None:
            num_bytes[name] = {way: count - before[way] for way, count in link.num_bytes.items()}

    base = [] if config.base is None else ["--base", config.base]
    device = _device_arguments(config)
    with _behind_link(config, ["serve", f"{CLOUD_NAME}={config.adapter}", *base, *device]) as (direct, url, link):
        measure(ATTACHED, url, CLOUD_NAME, link)
        tell("asking the attached model for its probabilities")
        probed = ask(direct, CLOUD_NAME, prompts, concurrency=8, with_logprobs=True)
        logprobs = [reply.logprobs or [0.0] for reply in probed.replies]
        with running_server(_edge_arguments(config, edge_folder, url)) as edge:
            measure("edge only", edge.url, "edge:local", None)
            measure("edge and cloud", edge.url, "edge", link)
    if config.lora is not None:
        lora = ["serve", "--base", _base_name(config), "--lora", config.lora, *device]
        with _behind_link(config, lora) as (_, url, link):
            measure(LORA, url, "base", link)
    return replays, num_bytes, logprobs


@contextlib.contextmanager
def _behind_link(config: SystemConfig, arguments: list[str]) -> Iterator[tuple[str, str, Link]]:
    """(address without the link, address behind it, the link) of a server."""
    with running_server(arguments) as server:
        link = Link(server.port, round_trip_ms=config.round_trip_ms, megabits=config.megabits)
        with running_link(link) as port:
            yield server.url, f"http://{HOST}:{port}", link


def _edge_arguments(config: SystemConfig, folder: Path, cloud: str) -> list[str]:
    target = [part for name, value in config.target.given().items() for part in (f"--{name.replace('_', '-')}", str(value))]
    place = ["--router", str(config.router), "--cloud", cloud, "--cloud-model", CLOUD_NAME]
    return ["edge", str(folder), *place, "--cloud-seconds", "60", *target, *_device_arguments(config)]


def _device_arguments(config: SystemConfig) -> list[str]:
    return [] if config.device is None else ["--device", config.device]


def _base_name(config: SystemConfig) -> str:
    return config.base or read_config(find_folder(config.adapter))["base"]["name_or_path"]
