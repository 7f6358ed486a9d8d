"""The verbs that need the extra ``serve``: parse, call, print."""

from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer
from rich.console import Console

from shadowpeft.cli_options import Adapter, Base, Data, Device, OtherWeights, RouterFile
from shadowpeft.errors import ConfigError

Adapters = Annotated[list[str] | None, typer.Argument(help="adapter folders or hub names, as FOLDER or NAME=FOLDER")]
Port = Annotated[int, typer.Option(help="port to listen on")]
Host = Annotated[str, typer.Option(help="address to listen on")]
ApiKey = Annotated[str | None, typer.Option(help="key that clients must send", envvar="SHADOWPEFT_API_KEY")]
MaxBatch = Annotated[int, typer.Option(help="answers decoded together at most")]
MaxWaiting = Annotated[int, typer.Option(help="answers that may wait; one more is refused with status 429")]
MaxContext = Annotated[int | None, typer.Option(help="tokens of prompt and answer at most [default: the model's positions]")]
MaxBatchTokens = Annotated[
    int, typer.Option(help="rows decoded together times the longest of them, in tokens, at most; what does not fit waits")
]
MaxNewTokens = Annotated[int, typer.Option(help="tokens of an answer whose request names no limit")]
Temperature = Annotated[float, typer.Option(help="of a request that names none; 0 takes the most likely token")]
Seconds = Annotated[float, typer.Option(help="an answer is given up after so long")]
MaxBytes = Annotated[int, typer.Option(help="size of a request's body at most")]
MaxNormalShare = Annotated[float | None, typer.Option(help="send at most this share of the rows in scope to the cloud")]
MaxShare = Annotated[float | None, typer.Option(help="send at most this share of the validation rows to the cloud")]
MinAccuracy = Annotated[float | None, typer.Option(help="reach this accuracy on the validation rows, as cheaply as possible")]
TaskName = Annotated[str, typer.Option(help="task name; see `shadowpeft info`")]
Extra = Annotated[list[Path] | None, typer.Option(help="file of further rows, such as requests out of scope")]
EdgeModel = Annotated[
    str | None, typer.Option(help="what the device runs: a detached or exported folder [default: the adapter, detached]")
]
Limit = Annotated[int | None, typer.Option(help="use at most this many rows")]


def _commands() -> ModuleType:
    try:
        from shadowpeft.deploy import server_commands as commands
    except ImportError as error:
        raise ConfigError(f"this command needs more packages ({error.name}): pip install 'shadowpeft[serve]'") from error
    return commands


def _target(**shares: float | None) -> Any:
    return _commands().Target(**shares)


def add_verbs(app: typer.Typer, console: Console) -> None:
    """Adds ``serve``, ``edge``, ``calibrate`` and ``system-eval`` to the command line."""

    @app.command()
    def serve(
        adapters: Adapters = None,
        base: Base = None,
        lora: Annotated[str | None, typer.Option(help="peft adapter to merge into --base, for comparisons")] = None,
        host: Host = "127.0.0.1",
        port: Port = 8000,
        api_key: ApiKey = None,
        task: Annotated[str | None, typer.Option(help="wrap chat messages in this task's prompt")] = None,
        max_batch: MaxBatch = 32,
        max_waiting: MaxWaiting = 256,
        max_context: MaxContext = None,
        max_batch_tokens: MaxBatchTokens = 2**17,
        max_new_tokens: MaxNewTokens = 256,
        temperature: Temperature = 1.0,
        request_seconds: Seconds = 300.0,
        num_drafts: Annotated[int, typer.Option(help="tokens drafted at a time in speculative mode")] = 4,
        max_bytes: MaxBytes = 2**20,
        device: Device = None,
        allow_other_weights: OtherWeights = False,
    ) -> None:
        """Serve a base with any number of adapters behind OpenAI's API."""
        _commands().serve(
            adapters or [],
            console,
            base=base,
            lora=lora,
            host=host,
            port=port,
            api_key=api_key,
            task=task,
            settings={
                "max_batch": max_batch,
                "max_waiting": max_waiting,
                "max_context": max_context,
                "max_batch_tokens": max_batch_tokens,
                "max_new_tokens": max_new_tokens,
                "temperature": temperature,
                "request_seconds": request_seconds,
                "num_drafts": num_drafts,
            },
            max_bytes=max_bytes,
            device=device,
            allow_other_weights=allow_other_weights,
        )

    @app.command()
    def edge(
        model: Annotated[str, typer.Argument(help="detached shadow, exported ONNX folder, or adapter to detach here")],
        router: RouterFile,
        cloud: Annotated[str | None, typer.Option(help="address of the cloud, such as http://127.0.0.1:8000")] = None,
        cloud_model: Annotated[str | None, typer.Option(help="name of the attached model there")] = None,
        cloud_api_key: Annotated[str | None, typer.Option(help="key for it", envvar="SHADOWPEFT_CLOUD_API_KEY")] = None,
        cloud_seconds: Annotated[float, typer.Option(help="wait so long for the cloud, all attempts together")] = 10.0,
        cloud_attempts: Annotated[int, typer.Option(help="attempts for one answer")] = 3,
        breaker_failures: Annotated[int, typer.Option(help="failures in a row, then the cloud is left alone")] = 5,
        breaker_seconds: Annotated[float, typer.Option(help="for so long")] = 5.0,
        max_cloud_share: MaxShare = None,
        max_normal_share: MaxNormalShare = None,
        min_accuracy: MinAccuracy = None,
        never_escalate: Annotated[bool, typer.Option(help="privacy: nothing leaves the device")] = False,
        host: Host = "127.0.0.1",
        port: Port = 8001,
        api_key: ApiKey = None,
        max_batch: MaxBatch = 32,
        max_waiting: MaxWaiting = 256,
        max_context: MaxContext = None,
        max_batch_tokens: MaxBatchTokens = 2**17,
        max_new_tokens: Annotated[
            int | None, typer.Option(help="as for `serve` [default: the router's task's, as it was calibrated; else 40]")
        ] = None,
        temperature: Temperature = 0.0,
        request_seconds: Seconds = 60.0,
        max_bytes: MaxBytes = 2**20,
        device: Device = None,
    ) -> None:
        """Serve a detached shadow that hands over to the cloud what it cannot do or is not sure of."""
        _commands().edge(
            model,
            console,
            router=router,
            cloud=cloud,
            cloud_model=cloud_model,
            cloud_api_key=cloud_api_key,
            cloud_seconds=cloud_seconds,
            cloud_attempts=cloud_attempts,
            breaker_failures=breaker_failures,
            breaker_seconds=breaker_seconds,
            target=_target(max_cloud_share=max_cloud_share, max_normal_share=max_normal_share, min_accuracy=min_accuracy),
            never_escalate=never_escalate,
            host=host,
            port=port,
            api_key=api_key,
            settings={
                "max_batch": max_batch,
                "max_waiting": max_waiting,
                "max_context": max_context,
                "max_batch_tokens": max_batch_tokens,
                "max_new_tokens": max_new_tokens,
                "temperature": temperature,
                "request_seconds": request_seconds,
            },
            max_bytes=max_bytes,
            device=device,
        )

    @app.command()
    def calibrate(
        adapter: Adapter,
        output: Annotated[Path, typer.Option(help="the router is written here")] = Path("router.json"),
        task: TaskName = "robot",
        data: Data = None,
        split: Annotated[str, typer.Option(help="rows to calibrate on; never those of the test")] = "validation",
        extra_rows: Extra = None,
        limit: Limit = None,
        base: Base = None,
        edge: EdgeModel = None,
        score: Annotated[str | None, typer.Option(help="confidence score [default: the best on these rows]")] = None,
        kind: Annotated[str, typer.Option(help="temperature or isotonic")] = "temperature",
        max_cloud_share: MaxShare = None,
        max_normal_share: MaxNormalShare = None,
        min_accuracy: MinAccuracy = None,
        batch_size: Annotated[int, typer.Option(help="rows a batch")] = 32,
        device: Device = None,
        allow_other_weights: OtherWeights = False,
    ) -> None:
        """Fit the router of an edge device: confidence, threshold, expected cost and accuracy."""
        _commands().calibrate(
            adapter,
            console,
            output=output,
            task=task,
            data=data,
            split=split,
            extra_rows=extra_rows or [],
            limit=limit,
            base=base,
            edge=edge,
            score=score,
            kind=kind,
            target=_target(max_cloud_share=max_cloud_share, max_normal_share=max_normal_share, min_accuracy=min_accuracy),
            batch_size=batch_size,
            device=device,
            allow_other_weights=allow_other_weights,
        )

    @app.command("system-eval")
    def system_eval(
        adapter: Adapter,
        router: RouterFile,
        output: Annotated[Path, typer.Option(help="folder for the report")] = Path("runs/system"),
        task: TaskName = "robot",
        data: Data = None,
        split: Annotated[str, typer.Option(help="rows to replay")] = "test",
        extra_rows: Extra = None,
        limit: Limit = None,
        base: Base = None,
        edge: EdgeModel = None,
        lora: Annotated[str | None, typer.Option(help="peft adapter of the same base, for comparison")] = None,
        round_trip_ms: Annotated[float, typer.Option(help="of the link in front of the cloud")] = 50.0,
        megabits: Annotated[float | None, typer.Option(help="a second on that link [default: unlimited]")] = None,
        concurrency: Annotated[int, typer.Option(help="requests under way at a time")] = 1,
        max_tokens: Annotated[int | None, typer.Option(help="of an answer [default: the task's]")] = None,
        max_cloud_share: MaxShare = None,
        max_normal_share: MaxNormalShare = None,
        min_accuracy: MinAccuracy = None,
        device: Device = None,
    ) -> None:
        """Measure edge, router and cloud as one system of processes, against the cloud alone."""
        commands = _commands()
        config = commands.SystemConfig(
            adapter=adapter,
            router=router,
            output=output,
            base=base,
            edge=edge,
            lora=lora,
            round_trip_ms=round_trip_ms,
            megabits=megabits,
            concurrency=concurrency,
            max_tokens=max_tokens,
            target=_target(max_cloud_share=max_cloud_share, max_normal_share=max_normal_share, min_accuracy=min_accuracy),
            device=device,
        )
        commands.system_eval(config, console, task=task, data=data, split=split, extra_rows=extra_rows or [], limit=limit)
