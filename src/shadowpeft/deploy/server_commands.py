"""What the verbs of this layer do: serve, edge, calibrate, system-eval."""

from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from shadowpeft.deploy.route import (
    EDGE_NAME,
    CircuitBreaker,
    Cloud,
    CloudSettings,
    EdgeService,
    Router,
    Target,
    check_choices,
    check_routable,
    fit_router,
    load_router,
    observe,
    save_router,
    skills_of,
)
from shadowpeft.deploy.serve import (
    Entry,
    Loaded,
    LocalService,
    Service,
    Settings,
    catalogue,
    check_free,
    create_app,
    load_edge,
    load_served,
    run_app,
    task_or_none,
    why_not_one_text,
)
from shadowpeft.deploy.serve import Path as ModelPath
from shadowpeft.deploy.system_eval import SystemConfig, run_system, write_report
from shadowpeft.errors import ConfigError
from shadowpeft.evaluate.batches import check_batch_size
from shadowpeft.train.answers import Row
from shadowpeft.train.data import load_rows
from shadowpeft.train.run import task_named
from shadowpeft.train.sources import read_file
from shadowpeft.train.tasks import Task

# A request under way may take as long as it is allowed to; connections that hang longer are cut.
_GRACE = 10
# Of an edge's answer where no task says how long answers are: a skill call and some more.
_NO_TASK_TOKENS = 40


def serve(
    adapters: list[str],
    console: Console,
    *,
    base: str | None,
    lora: str | None,
    host: str,
    port: int,
    api_key: str | None,
    task: str | None,
    settings: dict[str, Any],
    max_bytes: int,
    allow_other_weights: bool,
    device: str | None = None,
) -> None:
    """Serves one base with its adapters until told to stop.

    Raises:
        ShadowPeftError: settings, a task or models that cannot be served.
    """
    check_free(host, port)
    options = _settings(settings, task)
    # The task wraps chat messages and nothing else here. An edge's is its router's: that serves, for ready-made prompts.
    reason = None if options.task is None else why_not_one_text(options.task)
    if reason is not None:
        raise ConfigError(f"--task {task}: {reason}, and leave out --task")
    loaded = load_served(adapters, base=base, lora=lora, allow_other_weights=allow_other_weights, device=device)
    service = LocalService(loaded.model, loaded.tokenizer, catalogue(loaded.adapters), options)
    _run(service, console, host, port, api_key, max_bytes, options.request_seconds)


def edge(
    model: str,
    console: Console,
    *,
    router: Path,
    cloud: str | None,
    cloud_model: str | None,
    cloud_api_key: str | None,
    cloud_seconds: float,
    cloud_attempts: int,
    breaker_failures: int,
    breaker_seconds: float,
    target: Target,
    never_escalate: bool,
    host: str,
    port: int,
    api_key: str | None,
    settings: dict[str, Any],
    max_bytes: int,
    device: str | None = None,
) -> None:
    """Serves a detached shadow behind a router until told to stop."""
    check_free(host, port)
    chosen = load_router(router)
    if target.given():
        chosen = chosen.with_target(target)
    if breaker_failures < 1 or breaker_seconds <= 0:
        raise ConfigError(
            f"breaker_failures={breaker_failures}, breaker_seconds={breaker_seconds}: expected at least 1, and more than 0"
        )
    if cloud is None and not never_escalate:
        raise ConfigError("name the cloud's address with --cloud URL, or switch it off with --never-escalate")
    options = _settings(settings | {"max_new_tokens": _answer_length(settings, chosen, console)}, chosen.task)
    local = edge_service(load_edge(model, device=device), options)
    asked = None
    if cloud is not None and not never_escalate:
        if cloud_model is None:
            raise ConfigError("name the attached model with --cloud-model, as the cloud's /v1/models lists it")
        asked = Cloud(
            CloudSettings(
                url=cloud,
                model=cloud_model,
                api_key=cloud_api_key,
                total_seconds=cloud_seconds,
                max_attempts=cloud_attempts,
            ),
            local.metrics,
            breaker=CircuitBreaker(max_failures=breaker_failures, open_seconds=breaker_seconds),
        )
    console.print(_expectation(chosen))
    service = EdgeService(local, chosen, asked, never_escalate=never_escalate)
    # An answer may take its own time and then the cloud's.
    seconds = options.request_seconds + (cloud_seconds if asked is not None else 0.0)
    _run(service, console, host, port, api_key, max_bytes, seconds)


def edge_service(loaded: Loaded, settings: Settings) -> LocalService:
    """A device's own model, under one name."""
    entry = Entry(name=EDGE_NAME, mode="edge", path=ModelPath(adapter=None, uses_base=True))
    return LocalService(loaded.model, loaded.tokenizer, {EDGE_NAME: entry}, settings)


def calibrate(
    adapter: str,
    console: Console,
    *,
    output: Path,
    task: str,
    data: str | None,
    split: str,
    extra_rows: list[Path],
    limit: int | None,
    base: str | None,
    edge: str | None,
    score: str | None,
    kind: str,
    target: Target,
    batch_size: int,
    allow_other_weights: bool,
    device: str | None = None,
) -> Router:
    """Fits a router on validation rows, prints what to expect of it and writes it.

    Raises:
        ConfigError: a choice that is none, no row a batch, or a target out of reach, after the router was written without it.
    """
    chosen = task_named(task)
    check_routable(chosen)
    check_choices(score=score, kind=kind)
    check_batch_size(batch_size)
    source = Path(data) if data else None
    rows = rows_of(chosen, split, source=source, extra=extra_rows, limit=limit)
    skills = skills_of(chosen, load_rows(chosen, "train", source=source))
    loaded = load_served([f"edge={adapter}"], base=base, allow_other_weights=allow_other_weights, device=device)
    on_edge = None if edge is None else load_edge(edge, device=device).model
    ask = partial(observe, loaded.model, loaded.tokenizer, chosen, rows, adapter="edge", skills=skills, edge=on_edge)
    with console.status(f"asking both sides {len(rows)} rows"):
        observed = ask(batch_size=batch_size)
    router = fit_router(
        observed.examples,
        score=score,
        kind=kind,
        skills=skills,
        task=task,
    )
    router.report["attached_auroc_in_scope"] = observed.cloud_auroc_in_scope()
    # First without the target: both models answered for this, and the target may be out of reach.
    save_router(router, output)
    if target.given():
        try:
            router = router.with_target(target)
        except ConfigError as error:
            raise ConfigError(
                f"{error}; {output} holds the router without a target, and `shadowpeft edge` takes another target for it"
            ) from error
        save_router(router, output)
    console.print(_scores_table(router))
    console.print(_expectation(router))
    console.print(f"router: {output}")
    return router


def rows_of(task: Task, split: str, *, source: Path | None, extra: list[Path], limit: int | None, seed: int = 0) -> list[Row]:
    """The rows of a split, and those of further files, such as requests out of scope."""
    rows = load_rows(task, split, source=source, limit=limit, seed=seed)
    for path in extra:
        rows = rows + read_file(path)
    return rows


def _answer_length(settings: dict[str, Any], router: Router, console: Console) -> int:
    """Tokens of an answer whose request names no limit: those that the router saw, where it saw a task's answers."""
    given, task = settings["max_new_tokens"], task_or_none(router.task)
    calibrated = _NO_TASK_TOKENS if task is None else task.max_new_tokens
    if given is None:
        return calibrated
    if task is not None and given < calibrated:
        console.print(
            f"max_new_tokens={given} cuts answers of which {task.name!r} and this router's calibration have up to "
            f"{calibrated}; what it expects of share and accuracy may not hold"
        )
    return given


def _settings(values: dict[str, Any], task: str | None) -> Settings:
    for name in ("max_batch", "max_waiting", "max_context", "max_batch_tokens", "max_new_tokens", "num_drafts"):
        value = values.get(name)
        if value is not None and value < 1:
            raise ConfigError(f"{name}={values[name]} is not valid: expected at least 1")
    if not 0 <= values.get("temperature", 0.0) <= 2:
        raise ConfigError(f"temperature={values['temperature']} is not valid: expected 0 to 2")
    if values.get("request_seconds", 1.0) <= 0:
        raise ConfigError(f"request_seconds={values['request_seconds']} is not valid: expected more than 0")
    return Settings(**values, task=task_or_none(task))


def _run(
    service: Service, console: Console, host: str, port: int, api_key: str | None, max_bytes: int, seconds: float
) -> None:
    app = create_app(service, api_key=api_key, max_bytes=max_bytes)
    name = f"[{host}]" if ":" in host else host
    address = f"http://{name}:{port}"
    console.print(f"serving {', '.join(service.model_names())} at {address}", markup=False, soft_wrap=True)
    waited = run_app(app, host=host, port=port, grace_seconds=int(seconds) + _GRACE, send_seconds=seconds)
    console.print("stopped; every request was answered" if waited else "stopped; requests under way were cut off")


def _expectation(router: Router) -> str:
    point = router.point
    low, high = point.cloud_share_interval
    worst, best = point.accuracy_interval
    normal = "" if point.normal_cloud_share is None else f", {point.normal_cloud_share:.1%} of those in scope"
    return (
        f"threshold {point.threshold:.4f} on {router.score}: expect {point.cloud_share:.1%} of requests in the cloud "
        f"(95% interval {low:.1%} to {high:.1%}{normal}) and accuracy {point.accuracy:.2%} ({worst:.2%} to {best:.2%})"
    )


def _scores_table(router: Router) -> Table:
    table = Table(title=f"confidence scores on {len(router.examples)} validation rows")
    for heading in ("score", "AUROC right/wrong", "AUROC in/out of scope", "ECE raw", "ECE calibrated"):
        table.add_column(heading)
    for name, values in router.report.items():
        if name == "attached_auroc_in_scope":
            continue
        cells = [values[key] for key in ("auroc", "auroc_in_scope", "ece_raw", "ece")]
        mark = " *" if name == router.score else ""
        table.add_row(name + mark, *("-" if cell is None else f"{cell:.3f}" for cell in cells))
    return table


def system_eval(
    config: SystemConfig,
    console: Console,
    *,
    task: str,
    data: str | None,
    split: str,
    extra_rows: list[Path],
    limit: int | None,
) -> dict[str, Any]:
    """Replays rows through edge, router and cloud and through the cloud alone; writes a report."""
    chosen = task_named(task)
    check_routable(chosen)
    rows = rows_of(chosen, split, source=Path(data) if data else None, extra=extra_rows, limit=limit)
    figures = run_system(config, chosen, rows, tell=console.print)
    write_report(figures, config.output)
    console.print((config.output / "system.md").read_text(encoding="utf-8"), markup=False, soft_wrap=True)
    return figures
