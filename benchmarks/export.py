"""Size, memory, speed and accuracy of a shadow's exported forms: `python benchmarks/export.py ADAPTER --data TEXT`.

Prints one table and ends with one JSON line. Each form runs in a process of its own, the forms in turn, repeatedly;
the fastest repetition counts. Accuracy stands beside size: bits a token on held-out text, and the share of greedy
tokens that equal torch's in float32.
"""

import argparse
import itertools
import json
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

from shadowpeft.deploy.commands import detach, export
from shadowpeft.deploy.gguf import SUPPORTED
from shadowpeft.deploy.measure import measure
from shadowpeft.errors import DataError
from shadowpeft.model.load import find_tokenizer
from shadowpeft.model.pretrained import read_raw_config
from shadowpeft.train.text import stream_texts

RUNNABLE = {"torch-float32": "torch", "onnx": "onnx", "onnx-int8": "onnx"}


def write_forms(adapter: str, base: str | None, folder: Path) -> dict[str, Path]:
    """Every form that this shadow can take, by name."""
    quiet = Console(quiet=True)
    forms = {name: folder / name for name in (*RUNNABLE, "gguf", "gguf-f16")}
    detach(adapter, str(forms["torch-float32"]), quiet, base=base, dtype="float32")
    if read_raw_config(str(forms["torch-float32"]))["model_type"] not in SUPPORTED:
        forms = {name: path for name, path in forms.items() if not name.startswith("gguf")}
    for name, path in forms.items():
        if name != "torch-float32":
            export(str(forms["torch-float32"]), str(path), quiet, format=name)
    return forms


def token_rows(data: str, folder: Path, *, num_rows: int, length: int) -> list[list[int]]:
    tokenizer = find_tokenizer(str(folder))
    if tokenizer is None:
        raise DataError("the adapter and its base have no tokenizer, so text cannot be read")
    encoded = (tokenizer(text)["input_ids"][:length] for text in stream_texts(data))
    rows = list(itertools.islice((row for row in encoded if len(row) >= 4), num_rows))
    if not rows:
        raise DataError(f"{data!r} holds no text of at least 4 tokens")
    return rows


def run(forms: dict[str, Path], rows: list[list[int]], *, new_tokens: int, num_threads: int, repeats: int) -> dict:
    results: dict[str, dict] = {}
    for _ in range(repeats):
        for name, kind in RUNNABLE.items():
            found = measure(kind, forms[name], rows, new_tokens=new_tokens, num_threads=num_threads)
            if name not in results or found["tokens_per_second"] > results[name]["tokens_per_second"]:
                results[name] = found
    reference = results["torch-float32"]["decoded"]
    for found in results.values():
        rows_of_both = zip(found["decoded"], reference, strict=True)
        equal = [a == b for one, two in rows_of_both for a, b in zip(one, two, strict=True)]
        found["same_greedy_tokens"] = sum(equal) / len(equal)
    for found in results.values():
        del found["decoded"]
    for name in forms.keys() - results.keys():
        results[name] = {"file_bytes": (forms[name] / "model.gguf").stat().st_size}  # read back, but not run, here
    return results


def print_table(results: dict[str, dict]) -> None:
    table = Table(title="exported forms of one detached shadow")
    for heading in ("form", "file MB", "peak MB", "tokens/s", "bits/token", "greedy as torch"):
        table.add_column(heading, justify="left" if heading == "form" else "right")
    for name, found in results.items():
        shown = [f"{found['file_bytes'] / 1e6:.2f}"]
        if "peak_bytes" in found:
            shown += [f"{found['peak_bytes'] / 1e6:.0f}", f"{found['tokens_per_second']:.1f}"]
            shown += [f"{found['bits_per_token']:.4f}", f"{100 * found['same_greedy_tokens']:.1f}%"]
        table.add_row(name, *shown)
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("adapter")
    parser.add_argument("--data", required=True, help="held-out text: .txt or .jsonl")
    parser.add_argument("--base", help="base, if not the one the adapter names")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        forms = write_forms(given.adapter, given.base, Path(work))
        rows = token_rows(given.data, forms["torch-float32"], num_rows=given.rows, length=given.length)
        results = run(forms, rows, new_tokens=given.new_tokens, num_threads=given.threads, repeats=given.repeats)
    print_table(results)
    packages = ("shadowpeft", "torch", "transformers", "onnxruntime", "onnx", "gguf")
    origin = {
        "versions": {name: version(name) for name in packages} | {"python": platform.python_version()},
        "processor": platform.processor() or platform.machine(),
        "num_threads": given.threads,
        "num_rows": len(rows),
        "new_tokens": given.new_tokens,
        "repeats": given.repeats,
    }
    print(json.dumps({"benchmark": "export", "origin": origin, "results": results}))


if __name__ == "__main__":
    main()
