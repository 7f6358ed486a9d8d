"""Reading rows from the hub, a folder or a file, and deciding which rows belong to which split."""

import gzip
import hashlib
import json
import logging
import zlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HfHubHTTPError

from shadowpeft.errors import DataError, ShadowPeftError, first_line
from shadowpeft.train.answers import Row
from shadowpeft.train.tasks import SPLITS, Task

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
NUM_BUCKETS = 10
PARQUET = "refs/convert/parquet"  # where the hub keeps every public data set as parquet files
# With the error class of the HTTP client beneath, whichever it is (httpx, later httpx2).
HTTP_ERRORS: tuple[type[Exception], ...] = HfHubHTTPError.__bases__

logger = logging.getLogger(__name__)


class MissingPackageError(ShadowPeftError, ImportError):
    """An optional package that this call needs."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where rows come from: a name for messages, and one reader for each split the source has."""

    name: str
    readers: dict[str, Callable[[], list[Row]]]


def open_source(task: Task, path: Path | None) -> Source:
    """The source at ``path`` (folder or file), else the task's own rows or those of the hub.

    Raises:
        DataError: nothing readable is there.
    """
    if path is not None:
        return _open_path(path)
    if task.built_in is not None:
        splits = task.built_in()
        readers = {name: partial(splits.__getitem__, name) for name in splits}
        return Source(name=f"task {task.name}", readers=readers)
    return _open_hub(task)


# ---------------------------------------------------------------- folders and files


def _open_path(path: Path) -> Source:
    if not path.exists():
        raise DataError(
            f"there is no data at {path}; expected a folder with train.jsonl, test.jsonl, or a file"
        )
    files = sorted(file for file in path.iterdir() if _stem(file)) if path.is_dir() else [path]
    if not files or not all(_stem(file) for file in files):
        raise DataError(
            f"{path} holds no data that can be read; expected files ending in {', '.join(SUFFIXES)}"
        )
    readers = {_stem(file): partial(read_file, file) for file in files}
    if len(readers) < len(files):
        raise DataError(
            f"{path} holds one name with several endings: {', '.join(f.name for f in files)}; keep one"
        )
    return Source(name=str(path), readers=readers)


def _stem(file: Path) -> str:
    """The name without its ending; empty for files of other kinds."""
    ending = next((suffix for suffix in reversed(SUFFIXES) if file.name.endswith(suffix)), None)
    return file.name.removesuffix(ending) if ending else ""


def read_file(path: Path) -> list[Row]:
    """All rows of a JSON-lines file or of a JSON file with one list, plain or gzipped.

    Raises:
        DataError: the file is unreadable, or a line is no JSON object (with its number).
    """
    text = _read_text(path)
    if path.name.removesuffix(".gz").endswith(".jsonl"):
        # Not splitlines(): JSON texts may hold other line ends, such as U+2028.
        lines = enumerate(text.split("\n"), start=1)
        return [_parse_object(line, f"{path}, line {number}") for number, line in lines if line.strip()]
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}); correct it") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: expected a list of objects, [{{...}}, ...]")
    return rows


def _read_text(path: Path) -> str:
    opener: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as lines:
            return lines.read()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}; expected UTF-8 text, gzipped if named .gz") from error


def _parse_object(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: not valid JSON ({error.msg}): {line.strip()[:60]!r}; correct it"
        ) from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object with named fields, found {line.strip()[:60]!r}")
    return row


# ---------------------------------------------------------------- the hub


def _open_hub(task: Task) -> Source:
    if task.hub_name is None:
        raise DataError(
            f"task {task.name!r} reads your own data: pass --data with a folder or file whose rows have the "
            f"fields {', '.join(task.fields)}"
        )
    fields = ", ".join(task.fields)
    splits = load_from_hub(
        task.hub_name,
        task.hub_config,
        way_out=f"Pass --data with a local folder that holds train.jsonl and test.jsonl with the fields {fields}",
    )
    readers = {str(name): partial(_hub_rows, splits[name]) for name in splits}
    return Source(name=f"{task.hub_name} (hub)", readers=readers)


def load_from_hub(name: str, config: str | None, *, way_out: str, **options: Any) -> Any:
    """``datasets.load_dataset``; a data set that is a program is read from the parquet files the hub makes of it.

    Raises:
        DataError: the hub does not give it; the message ends with ``way_out``.
        MissingPackageError: ``datasets`` is not installed.
    """
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise MissingPackageError(
            "reading from the hub needs the package `datasets`: pip install 'shadowpeft[hub]', or pass "
            "--data with a local folder"
        ) from error
    try:
        try:
            return load_dataset(name, config, **options)
        except RuntimeError as error:
            # datasets 4 runs no programs any more, and older ones ask before they do.
            if "scripts are no longer supported" not in str(error):
                raise
            return load_dataset(name, config, revision=PARQUET, **options)
    except (OSError, ValueError, RuntimeError, DatasetsError, *HTTP_ERRORS) as error:
        raise DataError(f"cannot load {name!r} from the hub: {first_line(error)}. {way_out}") from error


def _hub_rows(dataset: Any) -> list[Row]:
    """Rows with class numbers turned into the classes' names."""
    from datasets import ClassLabel

    labels = {name: feature for name, feature in dataset.features.items() if isinstance(feature, ClassLabel)}
    rows = dataset.to_list()
    for row in rows:
        for name, feature in labels.items():
            row[name] = None if row[name] in (None, -1) else feature.int2str(row[name])
    return rows


# ---------------------------------------------------------------- splits


def read_split(task: Task, split: str, source: Source) -> list[Row]:
    """The rows of one of our splits, checked, under our field names.

    Raises:
        DataError: the source has no such split, no rows in it, or rows without the fields.
    """
    files = assign_splits(task, list(source.readers))
    name, buckets = locate(split, files)
    if name is None:
        expected = ", ".join(f"{candidate}.jsonl" for candidate in task.splits[split])
        found = ", ".join(source.readers) or "nothing"
        raise DataError(
            f"{source.name} has no {split!r} split: expected one of {expected} (or .json, .gz); found {found}"
        )
    where = f"{source.name}, {name}"
    rows = [with_our_names(row, task) for row in source.readers[name]()]
    check_fields(task, rows, where)
    rows = task.prepare(rows)
    if not rows:
        raise DataError(f"{where} holds no rows; expected rows with the fields {', '.join(task.fields)}")
    if buckets is None:
        return rows
    kept = [row for row in rows if bucket_of(task, row) in buckets]
    logger.info("%s: %s is %d of %d rows, chosen by a hash of the prompt", where, split, len(kept), len(rows))
    if not kept:
        raise DataError(
            f"{where} has {len(rows)} rows, too few to set some aside for {split}; add {split}.jsonl "
            "or more rows"
        )
    return kept


def assign_splits(task: Task, names: Sequence[str]) -> dict[str, str]:
    """Our split -> the source's name for it.

    A lone file of any name, or ``all``, is taken as ``train`` (and then carved, see :func:`locate`). Where
    there is no test split, the validation split is the test.
    """
    found: dict[str, str] = {}
    for split in SPLITS:
        free = [name for name in task.splits[split] if name in names and name not in found.values()]
        found |= {split: free[0]} if free else {}
    if not found and (len(names) == 1 or "all" in names):
        found["train"] = "all" if "all" in names else names[0]
    if "test" not in found and "validation" in found:
        found["test"] = found["validation"]
        if "train" in found:
            del found["validation"]
    return found


def locate(split: str, files: dict[str, str]) -> tuple[str | None, Collection[int] | None]:
    """(the source's split to read, the tenths of it that are ours; None: all of it).

    Tenths are told apart by a hash of the prompt, so they never change and rows of one prompt stay together:

    ===================================  =================  ============  =======
    the source has                       train              validation    test
    ===================================  =================  ============  =======
    train, validation, test              train              validation    test
    train and one more                   9 tenths of train  1 tenth       the other
    one set of rows                      8 tenths           1 tenth       1 tenth
    ===================================  =================  ============  =======
    """
    is_pool = set(files) == {"train"}
    must_carve = "train" in files and "validation" not in files
    if split in files and not (split == "train" and must_carve):
        return files[split], None
    if not must_carve:
        return None, None
    first = {"validation": range(0, 1), "test": range(1, 2), "train": range(2 if is_pool else 1, NUM_BUCKETS)}
    return files["train"], first[split]


def bucket_of(task: Task, row: Row) -> int:
    """The tenth that a row belongs to, by SHA-256 of its prompt."""
    digest = hashlib.sha256(task.prompt(row).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") % NUM_BUCKETS


def with_our_names(row: Row, task: Task) -> Row:
    """The row with missing fields filled from the names other copies of the data use."""
    renamed = {}
    for name, aliases in task.aliases.items():
        there = [alias for alias in aliases if alias in row]
        if name not in row and there:
            renamed[name] = row[there[0]]
    return {**row, **renamed}


def check_fields(task: Task, rows: list[Row], where: str) -> None:
    """Raises DataError for the first row in which a field is missing or null."""
    for number, row in enumerate(rows, start=1):
        for name in task.fields:
            if row.get(name) is None:
                problem = "is null" if name in row else "is missing"
                raise DataError(
                    f"{where}, row {number}: the field {name!r} {problem}; task {task.name!r} needs "
                    f"{', '.join(task.fields)}, this row has {', '.join(row) or 'none'}. Rename or add it"
                )
