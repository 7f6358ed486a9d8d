"""What each command does, for the command line and for scripts."""

import dataclasses
import json
import platform
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import GenerationConfig, PreTrainedTokenizerBase

from shadowpeft._version import __version__
from shadowpeft.core import ShadowConfig
from shadowpeft.core.config import require
from shadowpeft.core.kernels import step_backend
from shadowpeft.errors import ConfigError, DataError
from shadowpeft.evaluate import report as reports
from shadowpeft.evaluate.bars import scoring_bars
from shadowpeft.evaluate.modes import MODES, check_modes, parameters_in_use, score_modes
from shadowpeft.evaluate.record import data_revision, write_record
from shadowpeft.evaluate.score import majority_baseline
from shadowpeft.files import write_files
from shadowpeft.generate import SpeculativeConfig, as_speculative, collect_statistics
from shadowpeft.model import ARCHITECTURES, ShadowModel
from shadowpeft.model import checkpoint as checkpoints
from shadowpeft.model.bases import load_model, load_tokenizer
from shadowpeft.train.config import TrainConfig
from shadowpeft.train.data import load_rows, prompt_ids
from shadowpeft.train.health import health
from shadowpeft.train.run import ADAPTER_FOLDER, Trained, task_named
from shadowpeft.train.run import train as run_training
from shadowpeft.train.tasks import TASKS, Task

# The main job in about three minutes on two cores; see LOG.md for what was tried.
DEMO = {
    "base": "embedded",
    "task": "robot",
    "output": "runs/demo",
    "epochs": 3.0,
    "batch_size": 32,
    "max_length": 64,
    "shadow": {"shadow_alpha": 1.0, "auxiliary_loss_weight": 0.5, "shadow_dropout": 0.0},
}


def train(config: TrainConfig, console: Console) -> dict[str, Any] | None:
    """Trains, scores, writes ``report.json``, ``report.md`` and ``curves.png``.

    None if it was interrupted, or trained by several processes, which leave the scoring to one.
    """
    trained = run_training(config, console=console)
    console = console if trained.is_first else Console(quiet=True)
    _tell_encoding(trained, console)
    if trained.interrupted:
        console.print(
            f"stopped at step {trained.steps}; the checkpoint is complete. Go on with: "
            f"shadowpeft train --config {trained.folder / 'config.yaml'} --resume",
            soft_wrap=True,
        )
        return None
    if trained.num_processes > 1:
        console.print(
            f"adapter: {trained.folder / ADAPTER_FOLDER}; score it in one process with: shadowpeft eval "
            f"{trained.folder / ADAPTER_FOLDER} --task {config.task}",
            soft_wrap=True,
        )
        return None
    try:
        report = _score_and_write(config, trained, console)
    except KeyboardInterrupt:
        console.print(
            f"stopped while scoring; the adapter is complete: {trained.folder / ADAPTER_FOLDER}. Score it with: "
            f"shadowpeft train --config {trained.folder / 'config.yaml'} --resume",
            soft_wrap=True,
        )
        raise
    written = f"adapter: {trained.folder / ADAPTER_FOLDER}   report: {trained.folder / 'report.md'}"
    console.print(written, soft_wrap=True)
    return report


def _tell_encoding(trained: Trained, console: Console) -> None:
    encoding = trained.prepared.encoding
    if encoding.num_prompts_truncated or encoding.num_targets_truncated or encoding.num_dropped:
        console.print(
            f"of {encoding.num_rows} training rows, {encoding.num_prompts_truncated} prompts and "
            f"{encoding.num_targets_truncated} answers were cut to fit, {encoding.num_dropped} rows left out"
        )


def _score_and_write(config: TrainConfig, trained: Trained, console: Console) -> dict[str, Any]:
    prepared = trained.prepared
    with scoring_bars(console) as progress:
        scores = score_modes(
            prepared.model,
            prepared.tokenizer,
            prepared.task,
            prepared.test_rows,
            label_names=prepared.label_names,
            max_length=config.max_length,
            batch_size=config.eval_batch_size,
            progress=progress,
        )
    parameters = parameters_in_use(prepared.model)
    majority = majority_baseline(prepared.task, prepared.train_rows, prepared.test_rows)
    report = {
        "task": prepared.task.name,
        "metric": next(iter(scores.values())).headline,
        "config": config.to_dict(),
        "train_minutes": round(trained.seconds / 60, 2),
        "steps": trained.steps,
        "final_loss": trained.final_loss,
        "num_train_rows": len(prepared.train_rows),
        "num_test_rows": len(prepared.test_rows),
        "train_revision": data_revision(prepared.train_rows),
        "test_revision": data_revision(prepared.test_rows),
        "encoding": dataclasses.asdict(prepared.encoding),
        "parameters": parameters,
        "majority": majority,
        "scores": {mode: dataclasses.asdict(score) for mode, score in scores.items()},
    }
    write_record(trained.folder / "report.json", report)
    write_files(trained.folder, partial(_write_readable, report, trained.folder / "metrics.jsonl"))
    console.print(reports.results_table(scores, parameters, majority))
    console.print(f"trained for {report['train_minutes']} minutes, {trained.steps} steps")
    return report


def _write_readable(report: dict[str, Any], metrics: Path, folder: Path) -> None:
    (folder / "report.md").write_text(reports.markdown_table(report), encoding="utf-8")
    reports.draw_curves(metrics, folder / "curves.png")


def demo(flags: dict[str, Any], console: Console) -> dict[str, Any] | None:
    """:func:`train` with the settings of the demonstration; ``flags`` that are not None override them."""
    given = {name: value for name, value in flags.items() if value is not None}
    shadow_names = {item.name for item in dataclasses.fields(TrainConfig().shadow)}
    settings = {**DEMO, **{name: value for name, value in given.items() if name not in shadow_names}}
    settings["shadow"] = {**DEMO["shadow"], **{name: value for name, value in given.items() if name in shadow_names}}
    return train(TrainConfig.from_dict(settings), console)


def load(
    adapter: str, *, base: str | None = None, allow_other_weights: bool = False
) -> tuple[ShadowModel, PreTrainedTokenizerBase]:
    """A saved adapter on its base, and the tokenizer saved with it (else the base's)."""
    folder = checkpoints.find_folder(adapter)
    described = checkpoints.read_config(folder)["base"]
    name = base or described["name_or_path"]
    loaded = None
    if base is not None:
        loaded = load_model(base, labels=checkpoints.label_names(described))
    model = ShadowModel.from_pretrained(folder, loaded, allow_other_weights=allow_other_weights)
    tokenizer = load_tokenizer(str(folder) if (folder / "tokenizer_config.json").is_file() else name)
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def evaluate(
    adapter: str,
    console: Console,
    *,
    task: str,
    data: str | None,
    base: str | None,
    modes: list[str],
    split: str,
    limit: int | None,
    batch_size: int,
    max_length: int,
    output: Path | None,
    allow_other_weights: bool,
) -> None:
    """Scores a saved adapter and prints the table."""
    chosen = task_named(task)
    modes = list(check_modes(modes))
    rows = load_rows(chosen, split, source=Path(data) if data else None, limit=limit)
    model, tokenizer = load(adapter, base=base, allow_other_weights=allow_other_weights)
    _check_kind(chosen, model)
    labels = None
    if chosen.kind == "classification":
        labels = checkpoints.label_names(checkpoints.describe_base(model.base))
    with scoring_bars(console) as progress:
        scores = score_modes(
            model,
            tokenizer,
            chosen,
            rows,
            modes=modes,
            label_names=labels,
            max_length=max_length,
            batch_size=batch_size,
            progress=progress,
        )
    console.print(reports.results_table(scores, parameters_in_use(model), None))
    if output is not None:
        payload = {mode: dataclasses.asdict(score) for mode, score in scores.items()}
        write_record(output, {"adapter": Path(adapter).name, "task": task, "split": split, "scores": payload})


def _check_kind(task: Task, model: ShadowModel) -> None:
    """Raises ConfigError where a classifier is to write, or a language model to classify."""
    if (task.kind == "classification") != (not model.can_generate()):
        kind = "a language model" if model.can_generate() else "a classifier"
        writes = model.can_generate()
        fitting = [name for name, other in sorted(TASKS.items()) if (other.kind != "classification") == writes]
        raise ConfigError(
            f"the adapter belongs to {kind}, which cannot answer task {task.name!r}; choose one of {', '.join(fitting)}"
        )


def generate(
    adapter: str,
    prompts: list[str],
    console: Console,
    *,
    task: str | None,
    mode: str,
    base: str | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    speculative: str | None = None,
    allow_other_weights: bool,
) -> None:
    """Prints one answer for each prompt, and with ``speculative`` how the drafts fared; a classifier's answer is a label.

    Raises:
        ConfigError: a setting out of its range, or ``speculative`` where there is no shadow beside its base.
        DataError: an empty prompt.
    """
    require(mode in MODES, "mode", mode, f"one of {', '.join(MODES)}")
    require(max_new_tokens >= 1, "max_new_tokens", max_new_tokens, "at least 1")
    require(temperature >= 0, "temperature", temperature, "at least 0")
    require(0 < top_p <= 1, "top_p", top_p, "a share above 0, up to 1")
    options = {} if speculative is None else {"speculative": _drafts(speculative, mode)}
    model, tokenizer = load(adapter, base=base, allow_other_weights=allow_other_weights)
    if task is not None:
        _check_kind(task_named(task), model)
    torch.manual_seed(seed)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        **({"temperature": temperature, "top_p": top_p} if temperature > 0 else {}),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    speaker = model.detach() if mode == "detached" else model
    with collect_statistics() as collected:
        for number, prompt in enumerate(prompts, start=1):
            ids = torch.tensor([_prompt_ids(prompt, task, tokenizer)], device=model.device)
            if not ids.numel():
                raise DataError(f"prompt {number} is empty; write something to answer")
            with model.disable_adapter() if mode == "base" else nullcontext():
                answer = _answer(speaker, tokenizer, ids, generation_config=config, **options)
            console.print(answer, markup=False, highlight=False, soft_wrap=True)
    num_drafted, num_accepted = sum(s.num_drafted for s in collected), sum(s.num_accepted for s in collected)
    if num_drafted:
        console.print(f"{num_accepted} of {num_drafted} drafted tokens accepted", style="dim")


@torch.no_grad()
def _answer(model: Any, tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor, **options: Any) -> str:
    mask = torch.ones_like(ids)
    if not model.can_generate():
        return model.config.id2label[int(model(ids, attention_mask=mask).logits.argmax())]
    answer = model.generate(ids, attention_mask=mask, **options)
    return str(tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True))


def _drafts(speculative: str, mode: str) -> SpeculativeConfig:
    if mode != "attached":
        raise ConfigError(f"--speculative drafts for the attached model, but --mode is {mode}; leave one of them out")
    is_number = speculative.removeprefix("-").isdecimal()
    return as_speculative(int(speculative) if is_number else speculative)


def _prompt_ids(prompt: str, task: str | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if task is None:
        return tokenizer(prompt)["input_ids"]
    chosen = task_named(task)
    row = dict.fromkeys(chosen.fields, prompt)
    if chosen.kind == "choice":
        raise ConfigError(f"task {task!r} asks with options, which a prompt does not have; leave --task out")
    return prompt_ids(chosen, tokenizer, row)


def info(adapter: str | None, console: Console, *, with_health: bool = False) -> None:
    """Prints this installation, or an adapter's description; ``with_health`` adds what its run and weights tell.

    Raises:
        ConfigError: health without an adapter.
    """
    if with_health and adapter is None:
        raise ConfigError("--health looks at a saved adapter; name its folder")
    table = Table(show_header=False)
    if adapter is None:
        for key, value in _installation().items():
            table.add_row(key, value)
    else:
        for key, value in _description(checkpoints.find_folder(adapter)).items():
            table.add_row(key, value)
        for key, value in (health(checkpoints.find_folder(adapter)) if with_health else {}).items():
            table.add_row(f"health: {key}", value)
    console.print(table)


def _installation() -> dict[str, str]:
    return {
        "shadowpeft": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none (CPU)",
        "training step": "{}: {}".format(*step_backend(ShadowConfig(), device=_device(), dtype=_dtype())),
        "tasks": ", ".join(sorted(TASKS)),
        "architectures": ", ".join(sorted(ARCHITECTURES)),
    }


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _dtype() -> torch.dtype:
    """What a base is usually loaded in here."""
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def _description(folder: Path) -> dict[str, str]:
    described = checkpoints.read_config(folder)
    base = described["base"]
    size = (folder / checkpoints.WEIGHTS_FILE).stat().st_size if (folder / checkpoints.WEIGHTS_FILE).is_file() else 0
    settings = {key: json.dumps(value) for key, value in sorted(described["shadow"].items()) if value is not None}
    return {
        "base": f"{base['name_or_path']} ({base['architecture']}, "
        f"{base['num_blocks']} blocks of {base['hidden_size']})",
        "weights": f"{size:,} bytes",
        "written by": f"shadowpeft {described['library_version']}",
        **settings,
    }
