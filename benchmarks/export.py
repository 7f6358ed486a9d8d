"""Size, memory, speed and accuracy of a shadow's exported forms: `python benchmarks/export.py ADAPTER --task robot`.

Prints one table and ends with one JSON line. Each form runs in a process of its own, the forms in turn, repeatedly; times
and memory are medians. Memory is the peak of the process beyond what it held with its runtime imported and nothing loaded.
Accuracy stands beside size: the task's own metric on test rows, bits a token on the first few of them (`--rows`, cut to
`--length` tokens) or on `--data`, and the share of answers that equal torch's in float32.
"""

import argparse
import itertools
import json
import statistics
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import AutoModelForCausalLM

from shadowpeft.deploy.commands import detach, export
from shadowpeft.deploy.gguf import GGUF_FILE, SUPPORTED
from shadowpeft.deploy.measure import Questions, measure
from shadowpeft.deploy.serve.service import end_ids
from shadowpeft.errors import DataError
from shadowpeft.evaluate.record import data_revision, origin, write_record
from shadowpeft.evaluate.result import Answers, scored
from shadowpeft.model.load import find_tokenizer
from shadowpeft.model.positions import num_positions
from shadowpeft.model.pretrained import read_raw_config
from shadowpeft.train.answers import Row
from shadowpeft.train.data import all_prompt_ids, cut_left, load_rows, target_ids
from shadowpeft.train.run import task_named
from shadowpeft.train.tasks import Task
from shadowpeft.train.text import stream_texts

# How each form is run; GGUF by llama.cpp, where xllamacpp is installed.
RUNNABLE = {"torch-float32": "torch", "onnx": "onnx", "onnx-int8": "onnx", "gguf": "gguf", "gguf-f16": "gguf"}
REFERENCE = "torch-float32"
PACKAGES = ("onnxruntime", "onnx", "gguf", "xllamacpp")


def write_forms(adapter: str, base: str | None, folder: Path) -> dict[str, Path]:
    """Every form that this shadow can take, by name."""
    quiet = Console(quiet=True)
    forms = {name: folder / name for name in RUNNABLE}
    detach(adapter, str(forms[REFERENCE]), quiet, base=base, dtype="float32")
    if read_raw_config(str(forms[REFERENCE]))["model_type"] not in SUPPORTED:
        forms = {name: path for name, path in forms.items() if not name.startswith("gguf")}
    for name, path in forms.items():
        if name != REFERENCE:
            export(str(forms[REFERENCE]), str(path), quiet, format=name)
    return forms


def questions_of(task: Task, rows: list[Row], folder: Path, tokenizer: Any) -> Questions:
    """The task's prompts, cut and ended as `shadowpeft eval` does."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    positions = num_positions(model.config)
    num_new = int(min(task.max_new_tokens, positions / 2))
    room = int(min(positions - num_new, 10**6))
    prompts = [cut_left(tokenizer, ids, room) for ids in all_prompt_ids(task, tokenizer, rows)]
    return Questions(prompts=prompts, max_new_tokens=num_new, ends=list(end_ids(model, tokenizer)))


def texts_of(data: str, tokenizer: Any) -> list[list[int]]:
    """Token ids of the texts of a file, those long enough to be cut in two."""
    encoded = (tokenizer(text)["input_ids"] for text in stream_texts(data))
    return list(itertools.islice((row for row in encoded if len(row) >= 4), 1000))


def run(
    forms: dict[str, Path], rows: list[list[int]], questions: Questions, *, new_tokens: int, num_threads: int, repeats: int
) -> tuple[dict[str, dict[str, Any]], dict[str, list[Any]]]:
    """(what was measured of each form, its answers); a form that nothing here runs has a size alone."""
    runs: dict[str, list[dict[str, Any]]] = {
        name: [] for name in forms if not name.startswith("gguf") or find_spec("xllamacpp") is not None
    }
    for repeat in range(repeats):
        for name, found in runs.items():
            # Answers do not change from one repetition to the next.
            asked = questions if repeat == 0 else None
            found.append(
                measure(RUNNABLE[name], forms[name], rows, new_tokens=new_tokens, num_threads=num_threads, questions=asked)
            )
    results: dict[str, dict[str, Any]] = {}
    for name, folder in forms.items():
        found = runs.get(name)
        if found is None:
            results[name] = {"file_bytes": (folder / GGUF_FILE).stat().st_size}
            continue
        medians = ("tokens_per_second", "load_seconds", "peak_bytes", "peak_bytes_before_loading")
        results[name] = {"file_bytes": found[0]["file_bytes"], "bits_per_token": found[0]["bits_per_token"]}
        results[name] |= {key: statistics.median(each[key] for each in found) for key in medians}
    return results, {name: found[0]["answers"] for name, found in runs.items()}


def add_scores(
    results: dict[str, Any], answers: dict[str, list[Any]], task: Task, rows: list[Row], tokenizer: Any
) -> None:
    """The task's metric and its interval, for every form that answered."""
    said = {
        name: [each if isinstance(each, str) else tokenizer.decode(each, skip_special_tokens=True,
                                                                   clean_up_tokenization_spaces=False) for each in found]
        for name, found in answers.items()
    }  # fmt: skip
    for name, texts in said.items():
        found = scored(task, rows, Answers(texts=texts, num_truncated=0, seconds=0.0, num_tokens=0))
        same = sum(one == two for one, two in zip(texts, said[REFERENCE], strict=True)) / len(texts)
        results[name] |= {"score": found.metrics[task.metric], "interval": found.interval, "same_answers": same}


def table(results: dict[str, dict[str, Any]], metric: str) -> str:
    lines = [
        f"| form | file MB | memory MB | tokens/s | ratio | {metric} | answers as torch's | bits/token |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    speed = results[REFERENCE]["tokens_per_second"]
    for name, found in results.items():
        shown = [f"{found['file_bytes'] / 1e6:.2f}"]
        if "tokens_per_second" in found:
            memory = found["peak_bytes"] - found["peak_bytes_before_loading"]
            shown += [f"{memory / 1e6:.0f}", f"{found['tokens_per_second']:.0f}"]
            shown += [f"{found['tokens_per_second'] / speed:.2f}", f"{100 * found['score']:.1f}"]
            bits = found["bits_per_token"]
            shown += [f"{100 * found['same_answers']:.1f}%", "-" if bits is None else f"{bits:.4f}"]
        else:
            shown += ["-"] * 6
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("adapter")
    parser.add_argument("--task", default="robot", help="task whose test rows are answered")
    parser.add_argument("--task-data", type=Path, help="its data; default: as in `shadowpeft eval`")
    parser.add_argument("--data", help="text for bits/token and speed, .txt or .jsonl; default: the task's rows")
    parser.add_argument("--base", help="base, if not the one the adapter names")
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--rows", type=int, default=16, help="of text")
    parser.add_argument("--length", type=int, default=64, help="tokens of a text at most")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="also write the result, with its origin, to this JSON file")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    task = task_named(given.task)
    if task.kind != "generation":
        raise DataError(f"task {task.name!r} is not answered by text; choose one that is")
    asked = load_rows(task, "test", source=given.task_data, limit=given.questions)
    with tempfile.TemporaryDirectory() as work:
        forms = write_forms(given.adapter, given.base, Path(work))
        tokenizer = find_tokenizer(str(forms[REFERENCE]))
        if tokenizer is None:
            raise DataError("the adapter and its base have no tokenizer, so text cannot be read")
        questions = questions_of(task, asked, forms[REFERENCE], tokenizer)
        prompts = questions.prompts
        targets = target_ids(tokenizer, [task.target(row) for row in asked])
        texts = texts_of(given.data, tokenizer) if given.data else [a + b for a, b in zip(prompts, targets, strict=True)]
        rows = [text[: given.length] for text in texts[: given.rows]]
        if not rows:
            raise DataError(f"{given.data!r} holds no text of at least 4 tokens")
        results, answers = run(
            forms, rows, questions, new_tokens=given.new_tokens, num_threads=given.threads, repeats=given.repeats
        )
        add_scores(results, answers, task, asked, tokenizer)
    print(table(results, task.metric))
    payload = {
        "benchmark": "export",
        "setting": {"adapter": Path(given.adapter).name, "task": task.name, "metric": task.metric, "questions": len(asked),
                    "revision": data_revision(asked), "text": given.data and Path(given.data).name, "rows": len(rows),
                    "length": given.length, "new_tokens": given.new_tokens, "threads": given.threads,
                    "repeats": given.repeats, "versions": {name: version(name) for name in PACKAGES if find_spec(name)}},
        "results": results,
    }  # fmt: skip
    if given.out is not None:
        write_record(given.out, payload)
    print(json.dumps({**payload, "origin": origin()}))


if __name__ == "__main__":
    main()
