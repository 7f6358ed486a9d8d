"""What one exported form costs and is worth: file size, peak memory, tokens a second, and how well it predicts.

One form is measured by one process (:func:`measure_here`), because peak memory is a process's own; :func:`measure`
starts it.
"""

import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from shadowpeft.errors import ConfigError
from shadowpeft.evaluate.memory import peak_resident_bytes

# Kinds of forms, and the package that runs each.
RUNTIMES = {"torch": "transformers", "onnx": "onnxruntime", "gguf": "xllamacpp"}


class Runner(NamedTuple):
    """A loaded form.

    Attributes:
        logits: ids [1, T] -> logits [1, T, V]; None where the runtime does not give them.
        generate: (ids of a prompt, n, end tokens) -> what comes behind it, greedily: n tokens, or fewer if one of the ends
            comes. Ids, or a text from a runtime that tells no ids.
    """

    logits: Callable[[np.ndarray], np.ndarray] | None
    generate: Callable[[list[int], int, Sequence[int]], list[int] | str]


@dataclass(frozen=True, kw_only=True)
class Questions:
    """Prompts to answer greedily: token ids of each, the longest answer, and the tokens that end one."""

    prompts: list[list[int]]
    max_new_tokens: int
    ends: list[int]


def measure(
    kind: str,
    folder: Path,
    rows: list[list[int]],
    *,
    new_tokens: int,
    num_threads: int,
    questions: Questions | None = None,
) -> dict[str, Any]:
    """Runs :func:`measure_here` in a process of its own.

    Args:
        kind: ``torch`` (a detached folder), ``onnx`` (a folder with ``model.onnx``, int8 or not) or ``gguf`` (``model.gguf``).
        rows: token ids of held-out texts, at least 2 each.
        new_tokens: tokens decoded behind the first half of each row.
        num_threads: of the runtime.
        questions: answered behind everything that is timed; ids (texts of gguf) are in ``answers``.
    """
    if kind not in RUNTIMES:
        raise ConfigError(f"unknown kind {kind!r}; choose one of {', '.join(RUNTIMES)}")
    job = {"kind": kind, "folder": str(folder), "rows": rows, "new_tokens": new_tokens, "num_threads": num_threads}
    job["questions"] = None if questions is None else asdict(questions)
    command = [sys.executable, "-m", "shadowpeft.deploy.measure"]
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ConfigError(f"measuring {kind} in {folder} failed: {last}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure_here(job: dict[str, Any]) -> dict[str, Any]:
    """Size and peak memory (bytes), load time (s), tokens/s of greedy decoding, bits a token, what was decoded, answers.

    Memory is the peak of the process, and what it was with the runtime imported but nothing loaded. Decoding is timed after
    one row of warm-up; the first half of each row is its prompt.
    """
    folder, count = Path(job["folder"]), job["new_tokens"]
    import_module(RUNTIMES[job["kind"]])  # which is no part of the model
    before = _peak_bytes()
    started = time.perf_counter()
    runner = _open(job["kind"], folder, job["num_threads"])
    load_seconds = time.perf_counter() - started
    prompts = [row[: max(1, len(row) // 2)] for row in job["rows"]]
    runner.generate(prompts[0], count, ())
    started = time.perf_counter()
    decoded = [runner.generate(prompt, count, ()) for prompt in prompts]
    seconds = time.perf_counter() - started
    bits = None if runner.logits is None else _bits_per_token(runner.logits, job["rows"])
    peak = _peak_bytes()
    asked = Questions(**(job.get("questions") or {"prompts": [], "max_new_tokens": 0, "ends": []}))
    answers = [runner.generate(prompt, asked.max_new_tokens, asked.ends) for prompt in asked.prompts]
    return {
        "file_bytes": _weight_bytes(folder),
        "load_seconds": load_seconds,
        "peak_bytes": peak,
        "peak_bytes_before_loading": before,
        "tokens_per_second": count * len(prompts) / seconds,
        "bits_per_token": bits,
        "decoded": decoded,
        "answers": answers,
    }


def _open(kind: str, folder: Path, num_threads: int) -> Runner:
    return {"torch": _open_torch, "onnx": _open_onnx, "gguf": _open_gguf}[kind](folder, num_threads)


def _open_torch(folder: Path, num_threads: int) -> Runner:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(num_threads)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def logits(ids: np.ndarray) -> np.ndarray:
        return model(torch.from_numpy(ids)).logits.numpy()

    @torch.inference_mode()
    def generate(ids: list[int], count: int, ends: Sequence[int]) -> list[int]:
        given = torch.tensor([ids])
        options = {"max_new_tokens": count, "min_new_tokens": None if ends else count, "do_sample": False}
        options |= {"eos_token_id": list(ends) or None, "pad_token_id": ends[0] if ends else 0}
        return model.generate(given, attention_mask=torch.ones_like(given), **options)[0, len(ids) :].tolist()

    return Runner(logits, generate)


def _open_onnx(folder: Path, num_threads: int) -> Runner:
    from shadowpeft.deploy.onnx_model import OnnxModel

    model = OnnxModel(folder, num_threads=num_threads)

    def generate(ids: list[int], count: int, ends: Sequence[int]) -> list[int]:
        given = np.array([ids], dtype=np.int64)
        return model.generate(given, max_new_tokens=count, eos=ends)[0, len(ids) :].tolist()

    return Runner(lambda ids: model.run(ids, None)[0], generate)


def _open_gguf(folder: Path, num_threads: int) -> Runner:
    from shadowpeft.deploy.gguf_model import GgufModel

    model = GgufModel(folder, num_threads=num_threads)
    # Its ends are those in the file.
    return Runner(None, lambda ids, count, ends: model.generate(ids, max_new_tokens=count, ignore_end=not ends))


def _bits_per_token(logits: Callable[[np.ndarray], np.ndarray], rows: list[list[int]]) -> float:
    total, count = 0.0, 0
    for ids in rows:
        row = np.array([ids], dtype=np.int64)
        scores = logits(row)[0, :-1].astype(np.float64)
        scores -= scores.max(-1, keepdims=True)
        log_probabilities = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
        total -= np.take_along_axis(log_probabilities, row[0, 1:, None], axis=-1).sum()
        count += row.shape[1] - 1
    return total / count / math.log(2)


def _weight_bytes(folder: Path) -> int:
    endings = (".safetensors", ".onnx", ".onnx.data", ".gguf")
    return sum(path.stat().st_size for path in folder.iterdir() if path.name.endswith(endings))


def _peak_bytes() -> int:
    """Peak resident set of this process."""
    found = peak_resident_bytes()
    if found is not None:
        return found
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    print(json.dumps(measure_here(json.load(sys.stdin))))
