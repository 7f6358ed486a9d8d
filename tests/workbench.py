"""A tiny base with a tokenizer, and small data sets, on disk: what the command line needs to run."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from models import tiny_base

COLOURS = ("red", "green", "blue")
THINGS = ("lamp", "door", "car", "box", "hat", "cup", "bag", "pen")
WORDS = [f"the {thing} is {colour}" for thing in THINGS for colour in COLOURS]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 320 tokens, trained on the spot: any text can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(WORDS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=128
    )


def write_base(folder: Path, model_type: str = "llama", **overrides: object) -> Path:
    """A random base of two blocks with its tokenizer, as ``save_pretrained`` writes them."""
    import torch

    sizes = {"vocab_size": 320, "num_hidden_layers": 2, "max_position_embeddings": 128} | overrides
    tiny_base(model_type, dtype=torch.float32, **sizes).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_classification(folder: Path) -> Path:
    """Texts whose last word is their label: 18 to train, 6 to test."""
    rows = [{"text": text, "label": text.split()[-1]} for text in WORDS]
    write_rows(folder / "train.jsonl", rows[:18])
    write_rows(folder / "test.jsonl", rows[18:])
    return folder


def write_intents(folder: Path) -> Path:
    """The same texts, answered by a skill call."""
    rows = [{"text": text, "intent": f"paint_{text.split()[-1]}"} for text in WORDS]
    write_rows(folder / "train.jsonl", rows[:18])
    write_rows(folder / "test.jsonl", rows[18:])
    return folder
