"""`shadowpeft plan`: what a training would need, from a config alone."""

import json

from rich.console import Console
from rich.table import Table

from shadowpeft.errors import ConfigError
from shadowpeft.train.config import TrainConfig
from shadowpeft.train.plan import Ceilings, Devices, Plan, measured_ceilings, plan_training, read_dtype
from shadowpeft.train.plan.units import parse_bytes, parse_rate, readable

LAUNCH = {
    "single": "one process: shadowpeft train",
    "ddp": "DDP: recipes/accelerate/ddp.yaml",
    "sharded": "FSDP2: recipes/accelerate/fsdp2.yaml",
}


def plan(
    model: str,
    config: TrainConfig,
    console: Console,
    *,
    gpus: int,
    memory: str | None,
    margin: float,
    device: str,
    labels: int | None,
    labelled: float,
    flops: str | None,
    bandwidth: str | None,
    measure: bool,
    as_json: bool,
) -> None:
    """Prints tables, or one JSON object.

    Raises:
        ConfigError: a size, rate or setting that is not valid.
        ArchitectureError: no config there, or a base that cannot carry a shadow.
    """
    if measure and flops is not None:
        raise ConfigError("--measure and --flops both say how fast a device is; give one of them")
    if bandwidth is not None and flops is None:
        raise ConfigError("--bandwidth goes with --flops; give both, or --measure")
    if gpus > 1 and memory is None:
        raise ConfigError(f"gpus={gpus} needs --memory, the size of each, to say how to spread the training over them")
    size = None if memory is None else parse_bytes(memory, "memory")
    devices = Devices(count=gpus, memory=size, margin=margin, kind=device)
    ceilings = None
    if flops is not None:
        moved = None if bandwidth is None else parse_rate(bandwidth, "bandwidth")
        ceilings = Ceilings(flops=parse_rate(flops, "flops"), bandwidth=moved, source="given")
    elif measure:
        ceilings = measured_ceilings(read_dtype(model, config.dtype))
    found = plan_training(model, config, devices, labels=labels, labelled=labelled, ceilings=ceilings)
    if as_json:
        print(json.dumps(found.to_dict()))
        return
    for table in (_parameters(found), _bytes(found), _advice(found)):
        console.print(table)


def _parameters(found: Plan) -> Table:
    table = Table("parameters", "number", title=f"{found.model} in {found.dtype}")
    for name, count in found.parameters.items():
        table.add_row(name, f"{count:,}")
    return table


def _bytes(found: Plan) -> Table:
    shape = found.step.shape
    rows = "row" if shape.batch == 1 else "rows"
    table = Table("part", "bytes", "", title=f"one process, {shape.batch} {rows} of {shape.length} tokens")
    for name, size in found.parts().items():
        table.add_row(name, f"{size:,}", readable(size))
    return table


def _advice(found: Plan) -> Table:
    table = Table(show_header=False)
    for name, text in [*_fit_rows(found), *_speed_rows(found)]:
        table.add_row(name, text)
    if not table.row_count:
        table.add_row("batch and parallelism", "say --memory, and --gpus")
    return table


def _fit_rows(found: Plan) -> list[tuple[str, str]]:
    fit, memory = found.fit, found.devices.memory
    if fit is None or memory is None:
        return []
    usable = f"{readable(memory)} each, of which {found.devices.margin:.0%} are left free"
    rows = [("devices", f"{found.devices.count} with {usable}"), ("parallelism", LAUNCH[fit.layout.kind])]
    step = found.largest or found.smallest or found.step
    needed = readable(fit.layout.per_process(step))
    exactness = "traced" if fit.layout.kind == "single" else "trace of one process and arithmetic"
    if fit.batch:
        return [*rows, ("largest batch", f"{fit.batch} rows a process"), ("bytes a process", f"{needed} ({exactness})")]
    hints = "more devices, shorter rows, or --gradient-checkpointing"
    return [*rows, ("largest batch", f"none: a single row needs {needed} a process; try {hints}")]


def _speed_rows(found: Plan) -> list[tuple[str, str]]:
    speed, ceilings = found.speed(), found.ceilings
    if speed is None or ceilings is None:
        return []
    moved = "" if ceilings.bandwidth is None else f", {readable(ceilings.bandwidth)}/s of memory"
    rows = [
        ("ceilings", f"{ceilings.flops / 1e12:.3g} TFLOP/s{moved} ({ceilings.source})"),
        ("estimate: training", f"at most {speed['training_tokens_per_second_at_most']:,.0f} tokens/s, all devices"),
    ]
    generated = speed["generated_tokens_per_second_at_most"]
    if generated is not None:
        rows.append(("estimate: generation", f"at most {generated:,.0f} tokens/s, one row a device"))
    return rows
