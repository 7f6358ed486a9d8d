"""The command line: parse, call, print."""

import os
import sys
from collections.abc import Callable
from dataclasses import MISSING, fields
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer
from rich.console import Console
from rich.markup import escape
from transformers.utils.logging import disable_progress_bar

from shadowpeft import cli_deploy, commands
from shadowpeft.cli_options import Adapter, Base, Data, Device, OtherWeights, Out
from shadowpeft.core import ShadowConfig
from shadowpeft.core.config import PRESETS, preset_over_others
from shadowpeft.deploy import commands as deploying
from shadowpeft.errors import ShadowPeftError
from shadowpeft.train import pretrain as pretraining
from shadowpeft.train.checkpoints import RUN_FILE
from shadowpeft.train.config import TrainConfig, merge, read_yaml, split_settings
from shadowpeft.train.plan import MARGIN
from shadowpeft.train.pretrain_config import PretrainConfig

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Adapt a frozen language model with a small shadow.")
console = Console()

# A run's shadow has flags of its own, and its task type follows from the task.
_DERIVED = {(TrainConfig, "shadow"), (ShadowConfig, "task_type")}


def flags_of(config_class: type, panel: str, chosen: set[str] | None = None) -> list[Parameter]:
    """One optional flag for each field (of ``chosen``, if given); unset flags stay None, so that a file can speak."""
    hints = get_type_hints(config_class)
    parameters = []
    for item in fields(config_class):
        if (config_class, item.name) in _DERIVED or (chosen is not None and item.name not in chosen):
            continue
        default = None if item.default is MISSING else item.default
        names = [f"--{item.name.replace('_', '-')}"]
        if _flag_type(hints[item.name]) is bool:
            names = [f"{names[0]}/--no-{names[0][2:]}"]
        option = typer.Option(*names, help=f"{item.metadata['help']} [default: {default}]", rich_help_panel=panel)
        annotation = Annotated[_flag_type(hints[item.name]) | None, option]
        parameters.append(Parameter(item.name, Parameter.KEYWORD_ONLY, default=None, annotation=annotation))
    return parameters


def _flag_type(hint: Any) -> Any:
    if get_origin(hint) is Literal:
        return str
    return next((part for part in get_args(hint) if part is not type(None)), hint)


def with_flags(flags: list[Parameter]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command these flags in place of its ``**flags``."""

    def give(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in signature(command).parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
        command.__signature__ = signature(command).replace(parameters=[*own, *flags])  # type: ignore[attr-defined]
        return command

    return give


def training_flags(chosen: set[str] | None = None) -> list[Parameter]:
    """Those of ``TrainConfig`` (of ``chosen`` alone) and ``ShadowConfig``."""
    return flags_of(TrainConfig, "Run", chosen) + flags_of(ShadowConfig, "Shadow adapter")


def run_file(folder: str) -> Path | None:
    """The settings of the run in a folder: what is not said anew when it goes on is as it was."""
    found = Path(folder) / RUN_FILE
    return found if found.is_file() else None


def config_from(flags: dict[str, Any], file: Path | None = None, preset: str | None = None) -> TrainConfig:
    """The file's values, overridden by the flags that were given, and its formula by a preset that was."""
    given = {name: value for name, value in flags.items() if value is not None}
    values = read_yaml(file) if file else {}
    if preset is not None:
        written = values.get("shadow")
        # Field by field: a run's file has them all, and they would win over the preset's name.
        if preset in PRESETS and isinstance(written, dict):
            of = given.get("shadow_model", written.get("shadow_model", "implicit"))
            given = {**preset_over_others(preset, of), **given}
        given["preset"] = preset
    overrides, shadow = split_settings(given)
    return TrainConfig.from_dict(merge(values, {**overrides, "shadow": shadow}))


@app.command()
@with_flags(training_flags())
def train(
    config: Annotated[Path | None, typer.Option(help="YAML file with any of the settings below")] = None,
    preset: Annotated[str | None, typer.Option(help=f"formulas of: {', '.join(PRESETS)} [default: paper]")] = None,
    **flags: Any,
) -> None:
    """Train a shadow, score base / attached / detached, save the adapter."""
    if flags.get("resume"):
        config = config or run_file(flags.get("output") or TrainConfig.output)
    commands.train(config_from(flags, config, preset), console)


@app.command()
@with_flags(training_flags({"batch_size", "gradient_accumulation", "max_length", "dtype", "gradient_checkpointing"}))
def plan(
    model: Annotated[str, typer.Option(help="the base: folder, config.json, hub name or 'embedded'; no weights are read")],
    gpus: Annotated[int, typer.Option(help="devices, one process each")] = 1,
    memory: Annotated[str | None, typer.Option(help="of each device, such as 80GB or 23.5GiB: finds the largest batch")] = None,
    margin: Annotated[float, typer.Option(help="share of the memory left free, for what is no tensor")] = MARGIN,
    device: Annotated[str, typer.Option(help="cpu or gpu, which keep unequal numbers of logits")] = "gpu",
    labels: Annotated[int | None, typer.Option(help="classes of a classifier; default: a language model")] = None,
    labelled: Annotated[float, typer.Option(help="share of the tokens that carry a label")] = 1.0,
    flops: Annotated[str | None, typer.Option(help="floating point operations a second of a device, such as 400T")] = None,
    bandwidth: Annotated[str | None, typer.Option(help="bytes a second of its memory, such as 3T; goes with --flops")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="measure both here, in the base's dtype")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of tables")] = False,
    config: Annotated[Path | None, typer.Option(help="YAML file with settings of `train`")] = None,
    preset: Annotated[str | None, typer.Option(help=f"formulas of: {', '.join(PRESETS)} [default: paper]")] = None,
    **flags: Any,
) -> None:
    """Tell what a training would need: parameters, bytes, batch, parallelism, a ceiling of its speed."""
    commands.plan(
        model,
        config_from(flags, config, preset),
        console,
        gpus=gpus,
        memory=memory,
        margin=margin,
        device=device,
        labels=labels,
        labelled=labelled,
        flops=flops,
        bandwidth=bandwidth,
        measure=measure,
        as_json=as_json,
    )


@app.command("eval")
def evaluate(
    adapter: Adapter,
    task: Annotated[str, typer.Option(help="task to score on")] = "robot",
    data: Data = None,
    base: Base = None,
    modes: Annotated[str, typer.Option(help="any of base,attached,detached")] = "base,attached,detached",
    split: Annotated[str, typer.Option(help="train, validation or test")] = "test",
    limit: Annotated[int | None, typer.Option(help="score at most this many rows")] = None,
    batch_size: Annotated[int, typer.Option(help="rows a batch")] = 64,
    max_length: Annotated[int, typer.Option(help="tokens of a prompt")] = 512,
    output: Annotated[Path | None, typer.Option(help="write scores and generations to this JSON file")] = None,
    device: Device = None,
    allow_other_weights: OtherWeights = False,
) -> None:
    """Score a saved adapter under the prompts of a task."""
    commands.evaluate(
        adapter,
        console,
        task=task,
        data=data,
        base=base,
        modes=modes.split(","),
        split=split,
        limit=limit,
        batch_size=batch_size,
        max_length=max_length,
        output=output,
        device=device,
        allow_other_weights=allow_other_weights,
    )


@app.command()
def generate(
    adapter: Adapter,
    prompts: Annotated[list[str], typer.Argument(help="one or more prompts")],
    task: Annotated[str | None, typer.Option(help="phrase the prompts as this task does; default: as they are")] = None,
    mode: Annotated[str, typer.Option(help="base, attached or detached")] = "attached",
    base: Base = None,
    max_new_tokens: Annotated[int, typer.Option(help="tokens at most")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token")] = 0.0,
    top_p: Annotated[float, typer.Option(help="nucleus of sampling")] = 1.0,
    seed: Annotated[int, typer.Option(help="seed of sampling")] = 0,
    speculative: Annotated[
        str | None, typer.Option(help="let the shadow draft so many tokens a round, or 'auto'; the answers stay the same")
    ] = None,
    device: Device = None,
    allow_other_weights: OtherWeights = False,
) -> None:
    """Answer prompts with a saved adapter."""
    commands.generate(
        adapter,
        prompts,
        console,
        task=task,
        mode=mode,
        base=base,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        speculative=speculative,
        device=device,
        allow_other_weights=allow_other_weights,
    )


@app.command()
def info(
    adapter: Annotated[str | None, typer.Argument(help="adapter folder or hub name")] = None,
    health: Annotated[bool, typer.Option("--health", help="look for loss spikes, dead gates, weights never trained")] = False,
) -> None:
    """Describe this installation, or an adapter: its base, shape and size."""
    commands.info(adapter, console, with_health=health)


@app.command()
@with_flags(training_flags())
def demo(**flags: Any) -> None:
    """The main job on the base and data that come with the package: minutes on two CPU cores, no network."""
    commands.demo(flags, console)


@app.command()
@with_flags(flags_of(PretrainConfig, "Run"))
def pretrain(
    config: Annotated[Path | None, typer.Option(help="YAML file with any of the settings below")] = None, **flags: Any
) -> None:
    """Pretrain a small model as the shadow of a large one."""
    given = {name: value for name, value in flags.items() if value is not None}
    config = config or (run_file(given.get("output") or PretrainConfig.output) if given.get("resume") else None)
    pretraining.run(PretrainConfig.from_dict({**(read_yaml(config) if config else {}), **given}), console)


@app.command()
def detach(
    adapter: Adapter,
    out: Out,
    base: Base = None,
    dtype: Annotated[str | None, typer.Option(help="stored dtype; default: the adapter's")] = None,
    allow_other_weights: OtherWeights = False,
) -> None:
    """Write the stand-alone shadow as a folder that plain transformers loads."""
    deploying.detach(adapter, out, console, base=base, dtype=dtype, allow_other_weights=allow_other_weights)


@app.command()
def export(
    source: Annotated[str, typer.Argument(help="adapter (folder or hub name) or detached folder")],
    out: Out,
    format: Annotated[str, typer.Option(help="onnx, onnx-int8, gguf or gguf-f16")] = "onnx",
    base: Base = None,
    allow_other_weights: OtherWeights = False,
) -> None:
    """Write the stand-alone shadow as an ONNX or GGUF file."""
    deploying.export(source, out, console, format=format, base=base, allow_other_weights=allow_other_weights)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="folder of shadowpeft, shadow-peft, peft, or a pretrained shadow")],
    out: Out,
    to: Annotated[str, typer.Option(help="shadowpeft, authors or peft")],
    base: Annotated[str | None, typer.Option(help="base, if the source does not name it")] = None,
    shadow_model: Annotated[str | None, typer.Option(help="explicit shadow, if the source does not name it")] = None,
    labels: Annotated[str | None, typer.Option(help="class names, comma-separated, if the source has none")] = None,
    share_backbone: Annotated[bool, typer.Option(help="leave out what is unchanged from a pretrained shadow")] = False,
    allow_other_weights: OtherWeights = False,
) -> None:
    """Convert a checkpoint to or from the formats of other libraries."""
    deploying.convert(
        source,
        out,
        console,
        to=to,  # type: ignore[arg-type]
        base=base,
        shadow_model=shadow_model,
        labels=labels,
        share_backbone=share_backbone,
        allow_other_weights=allow_other_weights,
    )


@app.command()
def compare(
    recipe: Annotated[Path, typer.Argument(help="YAML file of bases, tasks and methods; see docs/compare.md")],
    output: Annotated[Path | None, typer.Option(help="folder of results and report; default: runs/NAME")] = None,
    data_root: Annotated[
        Path | None, typer.Option(help="where relative paths start; default: the working directory, then the hub")
    ] = None,
    workers: Annotated[int, typer.Option(help="processes side by side")] = 1,
    threads: Annotated[int, typer.Option(help="CPU threads a process")] = 1,
    timeout: Annotated[float, typer.Option(help="seconds a cell may take")] = 86400.0,
    section: Annotated[list[str] | None, typer.Option(help="only this section; may be given more than once")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="print cells, sizes, hours and what is left; run nothing")] = False,
    measure: Annotated[bool, typer.Option("--measure", help="--plan with step times measured here")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="run failed cells again")] = False,
    report_only: Annotated[bool, typer.Option("--report-only", help="write the report of what is there")] = False,
) -> None:
    """Compare methods at equal budget and equal search, and report with intervals and paired tests."""
    from shadowpeft.evaluate.compare import compare as run_comparison

    done = run_comparison(
        recipe,
        console,
        output=output,
        data_root=data_root,
        workers=workers,
        threads=threads,
        timeout=timeout,
        sections=section,
        plan=plan,
        measure=measure,
        retry_failed=retry_failed,
        report_only=report_only,
    )
    if any(line.problem for line in done) if isinstance(done, list) else done.failed:
        raise typer.Exit(1)  # what failed is on record; a script should see it too


cli_deploy.add_verbs(app, console)


def main() -> None:
    """Runs the command; bad input ends in one line on stderr and exit code 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    disable_progress_bar()  # transformers' own, one for each file it reads; ours are shown instead
    try:
        app()
    except ShadowPeftError as error:
        text = escape(" ".join(str(error).split()))
        Console(stderr=True).print(f"[bold red]error:[/] {text}", highlight=False, soft_wrap=True)
        sys.exit(2)
