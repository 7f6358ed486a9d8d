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
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from shadowpeft.errors import ConfigError

KINDS = ("torch", "onnx")
# A row of logits for [1, T] ids; greedy decoding of at most n tokens behind [1, T] ids, up to one of some tokens.
Logits = Callable[[np.ndarray], np.ndarray]
Generate = Callable[..., np.ndarray]


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
        kind: ``torch`` (a detached folder) or ``onnx`` (a folder with ``model.onnx``, int8 or not).
        rows: token ids of held-out texts, at least 2 each.
        new_tokens: tokens decoded behind the first half of each row.
        num_threads: of the runtime.
        questions: answered behind everything that is timed; the ids are in ``answers``.
    """
    if kind not in KINDS:
        raise ConfigError(f"unknown kind {kind!r}; choose one of {', '.join(KINDS)}")
    job = {"kind": kind, "folder": str(folder), "rows": rows, "new_tokens": new_tokens, "num_threads": num_threads}
    job["questions"] = None if questions is None else asdict(questions)
    command = [sys.executable, "-m", "shadowpeft.deploy.measure"]
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ConfigError(f"measuring {kind} in {folder} failed: {last}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure_here(job: dict[str, Any]) -> dict[str, Any]:
    """Size and peak memory (bytes), load time (s), tokens/s of greedy decoding, bits a token, tokens, answers.

    Memory is the peak of the process, and what it was with the runtime imported but nothing loaded. Decoding is timed after
    one row of warm-up; the first half of each row is its prompt.
    """
    folder = Path(job["folder"])
    import_module({"torch": "transformers", "onnx": "onnxruntime"}[job["kind"]])  # the runtime is no part of the model
    before = _peak_bytes()
    started = time.perf_counter()
    logits, generate = _open(job["kind"], folder, job["num_threads"])
    load_seconds = time.perf_counter() - started
    rows = [np.array([row], dtype=np.int64) for row in job["rows"]]
    prompts = [row[:, : max(1, row.shape[1] // 2)] for row in rows]
    generate(prompts[0], job["new_tokens"])
    started = time.perf_counter()
    decoded = [generate(prompt, job["new_tokens"])[0, prompt.shape[1] :].tolist() for prompt in prompts]
    seconds = time.perf_counter() - started
    peak = _peak_bytes()
    asked = job.get("questions") or {"prompts": []}
    answers = []
    for prompt in asked["prompts"]:
        ids = generate(np.array([prompt], dtype=np.int64), asked["max_new_tokens"], asked["ends"])
        answers.append(ids[0, len(prompt) :].tolist())
    return {
        "file_bytes": _weight_bytes(folder),
        "load_seconds": load_seconds,
        "peak_bytes": peak,
        "peak_bytes_before_loading": before,
        "tokens_per_second": sum(map(len, decoded)) / seconds,
        "bits_per_token": _bits_per_token(logits, rows),
        "decoded": decoded,
        "answers": answers,
    }


def _open(kind: str, folder: Path, num_threads: int) -> tuple[Logits, Generate]:
    if kind == "onnx":
        from shadowpeft.deploy.onnx_model import OnnxModel

        runner = OnnxModel(folder, num_threads=num_threads)
        return lambda ids: runner.run(ids, None)[0], partial(_generate_onnx, runner)
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(num_threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def logits(ids: np.ndarray) -> np.ndarray:
        return model(torch.from_numpy(ids)).logits.numpy()

    @torch.inference_mode()
    def generate(ids: np.ndarray, count: int, ends: Sequence[int] = ()) -> np.ndarray:
        given = torch.from_numpy(ids)
        options = {"max_new_tokens": count, "min_new_tokens": None if ends else count, "do_sample": False}
        options |= {"eos_token_id": list(ends) or None, "pad_token_id": ends[0] if ends else 0}
        writer: Any = model
        return writer.generate(given, attention_mask=torch.ones_like(given), **options).numpy()

    return logits, generate


def _generate_onnx(runner: Any, ids: np.ndarray, count: int, ends: Sequence[int] = ()) -> np.ndarray:
    return runner.generate(ids, max_new_tokens=count, eos=ends)


def _bits_per_token(logits: Logits, rows: list[np.ndarray]) -> float:
    total, count = 0.0, 0
    for row in rows:
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
    """Peak resident set of this process. ``ru_maxrss`` starts at what the parent had when it forked; Linux knows better."""
    status = Path("/proc/self/status")
    if status.is_file():
        lines = [line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM:")]
        if lines:
            return int(lines[0].split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    print(json.dumps(measure_here(json.load(sys.stdin))))
