"""Plain text for pretraining: streamed from files or the hub, never held as a whole, packed into rows of one length."""

import gzip
import json
import random
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerBase

from shadowpeft.errors import DataError
from shadowpeft.train.data import token_ids
from shadowpeft.train.sources import load_from_hub

SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz")


def stream_texts(data: str, *, field: str = "text", split: str = "train") -> Iterator[str]:
    """Documents of a file, of all files of a folder (by name), or of a hub data set ``hub:NAME[:CONFIG]``.

    In ``.txt`` files empty lines separate documents; in ``.jsonl`` files each row is one, in ``field``.

    Raises:
        DataError: nothing readable is there, or a row without the field.
        MissingPackageError: the hub is asked for without the package `datasets`.
    """
    if data.startswith("hub:"):
        yield from _hub_texts(data, field, split)
        return
    for path in text_files(data):
        read = _jsonl_texts if ".jsonl" in path.name else _txt_texts
        yield from read(path, field)


def text_files(data: str) -> list[Path]:
    """The files that ``data`` stands for.

    Raises:
        DataError: there are none.
    """
    path = Path(data)
    files = sorted(path.rglob("*")) if path.is_dir() else [path] if path.is_file() else []
    found = [file for file in files if file.name.endswith(SUFFIXES)]
    if not found:
        raise DataError(f"there is no text at {data!r}; expected a file or folder with {', '.join(SUFFIXES)}, or hub:NAME")
    return found


def _lines(path: Path) -> Iterator[str]:
    opener: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="\n") as lines:
            yield from lines
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}; expected UTF-8 text, gzipped if named .gz") from error


def _txt_texts(path: Path, field: str) -> Iterator[str]:
    document: list[str] = []
    for line in _lines(path):
        if line.strip():
            document.append(line)
        elif document:
            yield "".join(document).strip()
            document = []
    if document:
        yield "".join(document).strip()


def _jsonl_texts(path: Path, field: str) -> Iterator[str]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not valid JSON ({error.msg}); correct it") from error
        yield _text_of(row, field, f"{path}, line {number}")


def _text_of(row: Any, field: str, where: str) -> str:
    if not isinstance(row, dict) or not isinstance(row.get(field), str):
        found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise DataError(f"{where}: no text in the field {field!r}; it has {found}. Name the field with text_field")
    return row[field]


def _hub_texts(data: str, field: str, split: str) -> Iterator[str]:
    name, _, config = data.removeprefix("hub:").partition(":")
    way_out = "Pass a local file or folder"
    rows = load_from_hub(name, config or None, way_out=way_out, split=split, streaming=True)
    for number, row in enumerate(rows, start=1):
        yield _text_of(row, field, f"{name}, row {number}")


def mixed(documents: Iterable[str], buffer: int, generator: random.Random) -> Iterator[str]:
    """The documents in an order mixed within a sliding buffer."""
    held: list[str] = []
    for document in documents:
        if len(held) < buffer:
            held.append(document)
            continue
        if not held:
            yield document
            continue
        place = generator.randrange(len(held))
        yield held[place]
        held[place] = document
    generator.shuffle(held)
    yield from held


class PackedText(IterableDataset):
    """Rows of exactly ``length`` tokens, documents joined by the end token, passes repeated without end.

    The order depends on ``seed`` and the number of the pass alone, so a resumed run that skips what it had sees the
    same rows. A row may join the end of one document and the start of the next; attention is not cut between them.

    Args:
        data, field, split: as for :func:`stream_texts`.
        tokenizer: the one of base and shadow.
        length: tokens a row.
        seed, buffer: of the mixing.
    """

    def __init__(
        self,
        data: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        length: int,
        field: str = "text",
        split: str = "train",
        seed: int = 0,
        buffer: int = 1000,
    ) -> None:
        super().__init__()
        self._data, self._field, self._split = data, field, split
        self._tokenizer, self._length = tokenizer, length
        self._seed, self._buffer = seed, buffer

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        row: list[int] = []
        number, has_rows = 0, False
        while True:
            documents = stream_texts(self._data, field=self._field, split=self._split)
            for text in mixed(documents, self._buffer, random.Random(f"{self._seed}-{number}")):
                row += self._ids(text)
                while len(row) >= self._length:
                    ids, row = torch.tensor(row[: self._length]), row[self._length :]
                    has_rows = True
                    yield {"input_ids": ids, "labels": ids}
            if not has_rows and not row:
                raise DataError(f"{self._data!r} holds no text")
            number += 1

    def _ids(self, text: str) -> list[int]:
        ids = token_ids(self._tokenizer, text)
        end: Any = self._tokenizer.eos_token_id
        return ids if end is None else [*ids, end]
