"""The text the embedded base is trained on: train splits only, labels never included.

Each source is read from a folder laid out as `NAME/SPLIT.jsonl.gz` (one JSON object a row). Splits
named `test` are never opened. Two percent of the documents of every source, chosen by a hash of
their text, are held out to measure bits per byte.
"""

import gzip
import json
import math
import random
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

# source -> (file, copies seen in one epoch). Short command-like texts are repeated, because the
# embedded base is meant for commands; newsgroup posts are plentiful and noisy.
SOURCES = {
    "home_commands": ("train", 3),
    "clinc150": ("train", 3),
    "snips": ("train", 3),
    "trec": ("train", 3),
    "sst5": ("train", 2),
    "e2e": ("dev", 3),
    "gsm8k": ("train", 1),
    "tinystories": ("all", 2),
    "tinyshakespeare": ("all", 1),
    "20news": ("train", 1),
}
HELD_OUT_OF_1000 = 20
MAX_NEWS_CHARS = 450  # a few huge posts (FAQs, encoded files) would dominate otherwise


def rows(folder: Path, source: str) -> Iterator[dict]:
    split, _ = SOURCES[source]
    with gzip.open(folder / source / f"{split}.jsonl.gz", "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def news_body(text: str) -> str:
    """The post without its header, quotes and signature; lines were joined by tabs in the data."""
    _, _, body = text.partition("\t\t")
    kept = [line for line in body.split("\t") if not re.match(r"\s*([>|:}]|--|In article)", line)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()[:MAX_NEWS_CHARS]


def texts(folder: Path, source: str) -> Iterator[str]:
    for row in rows(folder, source):
        if source == "gsm8k":
            yield row["question"] + "\n" + re.sub(r"<<[^>]*>>", "", row["answer"])
        elif source == "e2e":
            yield row["ref"]
        elif source == "20news":
            yield news_body(row["text"])
        elif source == "tinyshakespeare":
            speeches = row["text"].split("\n\n")
            for start in range(0, len(speeches), 8):
                yield "\n\n".join(speeches[start : start + 8])
        else:
            yield row["text"].strip()


def is_held_out(text: str) -> bool:
    return zlib.crc32(text.encode()) % 1000 < HELD_OUT_OF_1000


def split_documents(folder: Path, leave_out: Iterable[str] = ()) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """(training documents by source, held-out documents by source); exact duplicates are dropped.

    Raises:
        ValueError: ``leave_out`` names no source.
    """
    if unknown := set(leave_out) - SOURCES.keys():
        raise ValueError(f"cannot leave out {', '.join(sorted(unknown))}: the sources are {', '.join(SOURCES)}")
    train: dict[str, list[str]] = {}
    held_out: dict[str, list[str]] = {}
    for source in (name for name in SOURCES if name not in leave_out):
        documents = [text for text in dict.fromkeys(texts(folder, source)) if text]
        train[source] = [text for text in documents if not is_held_out(text)]
        held_out[source] = [text for text in documents if is_held_out(text)]
    return train, held_out


def training_stream(train: dict[str, list[str]], seed: int) -> list[str]:
    """All training documents, each source repeated as SOURCES says, in one shuffled list."""
    stream = [text for source, documents in train.items() for text in documents * SOURCES[source][1]]
    random.Random(seed).shuffle(stream)
    return stream


@torch.no_grad()
def bits_per_byte(model: Any, tokenizer: Any, documents: list[str], *, context: int) -> float:
    """Bits the model needs for each UTF-8 byte; every document starts after END, long ones are cut into contexts."""
    bits, num_bytes = 0.0, 0
    for document in documents:
        ids = [tokenizer.bos_token_id, *tokenizer(document)["input_ids"]]
        num_bytes += len(document.encode())
        for start in range(0, len(ids) - 1, context - 1):
            window = torch.tensor([ids[start : start + context]])
            loss = model(window, labels=window).loss.item()
            bits += loss * (window.shape[1] - 1) / math.log(2)
    return bits / num_bytes
