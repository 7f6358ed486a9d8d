"""A comparison small enough for tests: a tiny random base on disk, generated data, a recipe over both."""

import json
import random
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from models import tiny_base

WORDS = ["sit", "stand", "play", "stop", "wake", "sing"]


def byte_tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    """One token a byte; 0-2 are special."""
    names = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    built = Tokenizer(models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=[]))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    options = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"} | options
    return PreTrainedTokenizerFast(tokenizer_object=built, **options)


def write_base(folder: Path, **overrides: Any) -> None:
    base = tiny_base(**{"dtype": torch.float32, "vocab_size": 259, "num_hidden_layers": 3} | overrides)
    base.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    """The first half is for training, the rest for validation and test."""
    folder.mkdir(parents=True)
    third = len(rows) // 4
    for name, part in (
        ("train", rows[: 2 * third]),
        ("validation", rows[2 * third : 3 * third]),
        ("test", rows[3 * third :]),
    ):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")


def write_data(root: Path) -> None:
    """Classes, commands of two kinds, and meanings with references: what the tasks of the recipe need."""
    draw = random.Random(0)
    words = [draw.choice(WORDS) for _ in range(80)]
    write_rows(root / "classes", [{"text": f"please {word} now", "label": word[0]} for word in words])
    write_rows(root / "commands", [{"text": f"{word} now", "intent": word} for word in words])
    write_rows(root / "orders", [{"text": f"do {word}", "intent": f"go_{word}"} for word in words])
    write_rows(root / "e2e", [{"mr": f"name[{word}]", "ref": f"{word} is here now"} for word in words])


def small_recipe(**changes: Any) -> dict[str, Any]:
    values = {
        "name": "small",
        "seeds": [0, 1],
        "train": {"max_steps": 2, "batch_size": 4, "max_length": 48, "eval_batch_size": 16, "limit_eval": 12},
        "search": {"trials": 2, "share": 0.5, "limit_validation": 8},
        "bases": {"tiny": {"path": "base", "parameters": 12000}},
        "tasks": {
            "classes": {"task": "classification", "data": "classes"},
            "commands": {"task": "intent", "data": "commands"},
            "orders": {"task": "intent", "data": "orders"},
            "e2e": {"data": "e2e"},
        },
        "methods": {
            "none": {},
            "probe": {},
            "lora": {},
            "dora": {},
            "shadow": {"shadow": {"r": 2, "update_hidden_size": 2, "shadow_intermediate_size": 16}},
            "full": {},
        },
        "main": {"tasks": ["classes", "e2e"], "score_detached": True},
    }
    return {**values, **changes}


def write_recipe(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return path
