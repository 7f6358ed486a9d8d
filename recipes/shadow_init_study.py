"""What pretraining does for a shadow: `python recipes/shadow_init_study.py --data DIR [--text TEXT] [--tiny]`.

Random, truncated-base and pretrained shadows are fine-tuned for equally many steps and scored attached and detached,
with the shadow as its own drafter's acceptance; beside them the small model that was pretrained from, fine-tuned alone. A
cell (task, initialisation, seed) is one JSON file; cells that are there are not run again, so the study can be stopped and
continued. The summary, with what the shadows know of held-out text before any fine-tuning, is a file beside the cells.
"""

import argparse
import dataclasses
import itertools
import json
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, default_data_collator, set_seed

from shadowpeft import ShadowConfig, ShadowModel, get_shadow_model
from shadowpeft.errors import ConfigError
from shadowpeft.evaluate.compare.fit import fit
from shadowpeft.evaluate.modes import score_modes
from shadowpeft.evaluate.record import write_record
from shadowpeft.evaluate.score import evaluate
from shadowpeft.files import write_files
from shadowpeft.model.bases import load_model, load_tokenizer
from shadowpeft.train.checkpoints import RUN_FILE
from shadowpeft.train.config import TrainConfig
from shadowpeft.train.data import encode_generation, load_rows, prompt_ids
from shadowpeft.train.pretrain import run as pretrain
from shadowpeft.train.pretrain import training_arguments
from shadowpeft.train.pretrain_config import PretrainConfig
from shadowpeft.train.run import Trained, train
from shadowpeft.train.tasks import TASKS
from shadowpeft.train.text import PackedText

# With the embedded base's vocabulary of 4096 about 2.1M parameters, a quarter of its 8M.
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
COMPANION = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 8, **HEADS}
TINY_COMPANION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, **HEADS}
# Equal fine-tuning, as in the demonstration.
# The preset as it was when this study was made, so that LEADING stands beside it.
ADAPTER = ShadowConfig.preset("recommended").replace(
    freeze_embeddings=False, auxiliary_loss_weight=0.5, shadow_alpha=1.0, inject_activation="none", shadow_lr_multiplier=1.0
)
INITIALISATIONS = ("random", "truncated", "pretrained")
# The pretrained shadow again, its own loss so heavy that it leads: what the detached shadow can be beside an attached one.
LEADING = "pretrained, lambda 20"
LEADING_WEIGHT = 20.0
ALONE = "small model alone"
SEEDS = (0, 1, 2)


def companion(given: argparse.Namespace, steps: int) -> Path:
    """A small language model with the base's tokenizer, trained from nothing on the text; made once."""
    folder = given.work / "companion"
    if (folder / "model.safetensors").is_file():
        return folder
    tokenizer, base = load_tokenizer(given.base), load_model(given.base)
    sizes = TINY_COMPANION if given.tiny else COMPANION
    config = LlamaConfig(
        **sizes, vocab_size=base.config.vocab_size, max_position_embeddings=base.config.max_position_embeddings,
        tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    set_seed(0)
    model = LlamaForCausalLM(config)
    settings = PretrainConfig(base=given.base, data=given.text, output=str(given.work / "companion-run"), steps=steps,
                              learning_rate=2e-3, batch_size=4 if given.tiny else 16, length=32 if given.tiny else 256,
                              save_every=max(steps, 1))  # fmt: skip
    rows = PackedText(given.text, tokenizer, length=settings.length, seed=0)
    arguments = training_arguments(settings, given.work / "companion-run")
    Trainer(model, arguments, train_dataset=rows, data_collator=default_data_collator).train()
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def pretrained_shadow(given: argparse.Namespace, small: Path, steps: int) -> Path:
    """The companion behind the base's head, distilled from the base on the same text; made once."""
    folder = given.work / "pretrain"
    if not (folder / "shadow/model.safetensors").is_file():
        rest = {"batch_size": 4, "length": 32} if given.tiny else {"batch_size": 16, "length": 256}
        done = pretrain(
            PretrainConfig(base=given.base, shadow=str(small), data=given.text, output=str(folder), objective="distill",
                           steps=steps, resume=(folder / RUN_FILE).is_file(), train_embeddings=True, **rest)
        )  # fmt: skip
        stop_if(done.interrupted)
    return folder / "shadow"


def projected_shadow(given: argparse.Namespace, small: Path) -> Path:
    """The companion behind the base's head by Eq. 12 alone; made once."""
    folder = given.work / "projected"
    if not (folder / "shadow/model.safetensors").is_file():
        pretrain(PretrainConfig(base=given.base, shadow=str(small), output=str(folder), steps=0,
                                resume=(folder / RUN_FILE).is_file()))  # fmt: skip
    return folder / "shadow"


def stop_if(interrupted: bool) -> None:
    """A run that was cut off is no cell."""
    if interrupted:
        sys.exit("stopped; the same command goes on from here")


def shadow_of(initialisation: str, pretrained: Path) -> ShadowConfig:
    where = {"random": "implicit", "truncated": "base:first:2"}.get(initialisation, str(pretrained))
    fields: dict[str, Any] = {}
    if initialisation == "random":
        fields = {"shadow_num_hidden_layers": 2, "shadow_intermediate_size": None}
    if initialisation == LEADING:
        fields = {"auxiliary_loss_weight": LEADING_WEIGHT}
    return ADAPTER.replace(shadow_model=where, **fields)


@torch.no_grad()
def acceptance(model: ShadowModel, done: Trained, max_length: int, rows: int) -> dict[str, float]:
    """Share of the attached model's greedy answer tokens that the shadow, given the same text, would have drafted."""
    tokenizer, task = done.prepared.tokenizer, done.prepared.task
    agreed = total = 0
    for row in done.prepared.test_rows[:rows]:
        ids = torch.tensor([prompt_ids(task, tokenizer, row, max_length)])
        options = {"max_new_tokens": task.max_new_tokens, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
        text = model.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=tokenizer.eos_token_id, **options)
        drafts = model(text, output_shadow_logits=True).shadow_logits.argmax(-1)
        start = ids.shape[1]
        agreed += (drafts[:, start - 1 : -1] == text[:, start:]).sum().item()
        total += text.shape[1] - start
    return {"acceptance": agreed / max(total, 1), "num_tokens": total}


def run_cell(given: argparse.Namespace, task: str, initialisation: str, seed: int, pretrained: Path) -> dict[str, Any]:
    folder = given.work / "cells" / cell_name(task, initialisation, seed)
    config = fine_tuning(given, task, seed, output=str(folder), shadow=shadow_of(initialisation, pretrained),
                         resume=(folder / RUN_FILE).is_file())  # fmt: skip
    done = train(config)
    stop_if(done.interrupted)
    prepared = done.prepared
    model = prepared.model.eval()
    scores = score_modes(model, prepared.tokenizer, prepared.task, prepared.test_rows,
                         modes=("attached", "detached"), max_length=config.max_length)  # fmt: skip
    return {
        "task": task,
        "initialisation": initialisation,
        "seed": seed,
        "steps": done.steps,
        "parameters": model.network().num_parameters(),
        "num_test_rows": len(prepared.test_rows),
        "scores": {mode: without_generations(score) for mode, score in scores.items()},
        "draft": acceptance(model, done, config.max_length, 4 if given.tiny else 200),
    }


def cell_name(task: str, initialisation: str, seed: int) -> str:
    return f"{task}-{initialisation.replace(',', '').replace(' ', '-')}-{seed}"


def fine_tuning(given: argparse.Namespace, task: str, seed: int, **options: Any) -> TrainConfig:
    """The same rows, order and steps for every cell of a task and seed."""
    data = None if given.data is None or task == "robot" else str(given.data / task)
    limits = {"limit_train": 64, "limit_eval": 8} if given.tiny else {"limit_eval": given.limit_eval}
    return TrainConfig(**{"base": given.base, **options}, task=task, data=data, max_steps=given.steps, seed=seed, batch_size=16,
                       learning_rate=1.5e-3, max_length=64, **limits)  # fmt: skip


def run_alone(given: argparse.Namespace, task: str, seed: int, small: Path) -> dict[str, Any]:
    """The small model itself, all of it fine-tuned as the shadows are: what a detached shadow could be."""
    config = fine_tuning(given, task, seed, base=str(small))
    source = None if config.data is None else Path(config.data)
    rows = {split: load_rows(TASKS[task], split, source=source, limit=limit, seed=seed)
            for split, limit in (("train", config.limit_train), ("test", config.limit_eval))}  # fmt: skip
    tokenizer, model = load_tokenizer(str(small)), load_model(str(small), dtype=torch.float32)
    examples, _ = encode_generation(TASKS[task], tokenizer, rows["train"], config.max_length)
    set_seed(seed)
    steps = fit(model, tokenizer, examples, config, config.max_steps)["steps"]
    score = evaluate(model.eval(), tokenizer, TASKS[task], rows["test"], max_length=config.max_length, batch_size=64)
    return {
        "task": task,
        "initialisation": ALONE,
        "seed": seed,
        "steps": steps,
        "parameters": model.num_parameters(),
        "num_test_rows": len(rows["test"]),
        "scores": {"detached": without_generations(score)},
    }


@torch.no_grad()
def language_modelling(given: argparse.Namespace, small: Path, pretrained: Path) -> dict[str, float] | None:
    """Bits a byte on held-out documents before any fine-tuning; None without the base's own text."""
    if given.data is None:
        return None
    corpus = base_corpus()
    sources = corpus.split_documents(given.data)[1].values()
    documents = [text for texts in sources for text in texts[: given.documents]]
    tokenizer, base = load_tokenizer(given.base), load_model(given.base)
    measure = partial(corpus.bits_per_byte, tokenizer=tokenizer, documents=documents, context=256)
    models = {"base": base, "small model": load_model(str(small))}
    found = {name: measure(model) for name, model in models.items()}
    places = {"Eq. 12 alone": projected_shadow(given, small), "pretrained": pretrained}
    for name in ("random", "truncated", *places):
        shadow = shadow_of(name if name in INITIALISATIONS else "pretrained", places.get(name, pretrained))
        set_seed(0)
        model = get_shadow_model(base, shadow)
        found[name] = measure(model.detach())
        base = model.unload()
    return found


def base_corpus() -> Any:
    """The module that reads the documents the embedded base was trained on."""
    sys.path.insert(0, str(Path(__file__).parent / "base"))
    import corpus

    return corpus


def without_generations(score: Any) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(score).items() if name != "generations"}


def corpus_text(given: argparse.Namespace) -> str:
    """The training documents of the embedded base (train splits, no labels) as one file; made once."""
    path = given.work / "text.jsonl"
    if given.data is None:
        raise ConfigError("pass --text with a file, or --data with the folders the embedded base was trained on")
    if not path.is_file():
        corpus = base_corpus()
        documents = corpus.training_stream(corpus.split_documents(given.data)[0], seed=0)
        lines = "".join(json.dumps({"text": document}) + "\n" for document in documents)
        write_files(given.work, lambda staging: (staging / path.name).write_text(lines, encoding="utf-8"))
    return str(path)


def summary(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For every task and shadow the mean over seeds of each measure, with the half-width of its 95% interval."""
    rows = []
    for task, initialisation in dict.fromkeys((cell["task"], cell["initialisation"]) for cell in cells):
        found = [cell for cell in cells if (cell["task"], cell["initialisation"]) == (task, initialisation)]
        columns = {
            mode: [headline(cell, mode) for cell in found if mode in cell["scores"]] for mode in ("attached", "detached")
        }
        columns["acceptance"] = [cell["draft"]["acceptance"] for cell in found if "draft" in cell]
        measures = {name: interval(values) for name, values in columns.items() if values}
        rows.append({"task": task, "initialisation": initialisation, "seeds": len(found), "steps": found[0]["steps"],
                     "parameters": found[0]["parameters"], **measures})  # fmt: skip
    return rows


def headline(cell: dict[str, Any], mode: str) -> float:
    score = cell["scores"][mode]
    return score["metrics"][score["headline"]]


def interval(values: list[float]) -> dict[str, float | None]:
    """Mean and half-width, the latter from the t distribution for 2 and 3 values."""
    quantile = {2: 12.706, 3: 4.303}.get(len(values))
    half = None if quantile is None else quantile * statistics.stdev(values) / len(values) ** 0.5
    return {"mean": statistics.fmean(values), "half_width": half}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="embedded")
    parser.add_argument("--data", type=Path, help="folder with a folder for each task; default: the hub")
    parser.add_argument("--text", help="pretraining text, .txt or .jsonl; default: the embedded base's")
    parser.add_argument("--work", type=Path, default=Path("runs/shadow_init"))
    parser.add_argument("--out", type=Path, default=Path("results/shadow_init"))
    parser.add_argument("--tasks", default="robot,clinc150")
    parser.add_argument("--steps", type=int, default=300, help="fine-tuning steps of every cell")
    parser.add_argument("--companion-steps", type=int, default=2000)
    parser.add_argument("--pretrain-steps", type=int, default=800)
    parser.add_argument("--limit-eval", type=int, default=500)
    parser.add_argument("--documents", type=int, default=60, help="held-out documents of every source, for bits a byte")
    parser.add_argument("--tiny", action="store_true", help="one seed, a few steps: does it run?")
    given = parser.parse_args()
    if given.tiny:
        given.steps = given.companion_steps = given.pretrain_steps = 2
    given.text = given.text or corpus_text(given)
    small = companion(given, given.companion_steps)
    pretrained = pretrained_shadow(given, small, given.pretrain_steps)
    given.out.mkdir(parents=True, exist_ok=True)
    seeds = SEEDS[:1] if given.tiny else SEEDS
    cells = []
    for task, seed, initialisation in itertools.product(given.tasks.split(","), seeds, (*INITIALISATIONS, LEADING, ALONE)):
        path = given.out / f"{cell_name(task, initialisation, seed)}.json"
        if not path.is_file():
            if initialisation == ALONE:
                write_record(path, run_alone(given, task, seed, small))
            else:
                write_record(path, run_cell(given, task, initialisation, seed, pretrained))
        Console().print(path.name)
        cells.append(json.loads(path.read_text(encoding="utf-8")))
    record = {"text": language_modelling(given, small, pretrained), "rows": summary(cells)}
    write_record(given.out.with_suffix(".json"), record)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
