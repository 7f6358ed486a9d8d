"""Training one model of any method, and what it cost."""

import ctypes
import gc
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from shadowpeft.evaluate.memory import peak_resident_bytes
from shadowpeft.train.config import TrainConfig
from shadowpeft.train.run import make_trainer, training_arguments

_CLEAR = Path("/proc/self/clear_refs")


def num_steps(config: TrainConfig, num_examples: int) -> int:
    """Optimizer steps of a run."""
    if config.max_steps > 0:
        return config.max_steps
    return math.ceil(math.ceil(num_examples / config.batch_size / config.gradient_accumulation) * config.epochs)


def fit(
    model: Any, tokenizer: PreTrainedTokenizerBase, examples: list[dict[str, Any]], config: TrainConfig, steps: int
) -> dict[str, Any]:
    """Trains ``model`` for ``steps`` optimizer steps; no checkpoint is written.

    Returns:
        minutes, steps, tokens (without padding), tokens_per_second, first_loss and final_loss (nats),
        peak_memory_mib of the training (None where the system does not tell).
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(config, Path(folder))
        arguments.max_steps = steps
        arguments.set_save(strategy="no")
        rate = config.head_lr_multiplier
        trainer = make_trainer(model, tokenizer, examples, arguments, callbacks=[], head_lr_multiplier=rate)
        reset_peak_memory()
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    # accelerate's autocast would stay on what was trained, and not on a shadow that is detached from it.
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    mean = sum(len(example["input_ids"]) for example in examples) / len(examples)
    tokens = round(mean * min(config.batch_size, len(examples)) * config.gradient_accumulation * steps)
    return {
        "minutes": round(seconds / 60, 6),
        "steps": steps,
        "tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 1),
        "first_loss": losses[0] if losses else None,
        "final_loss": losses[-1] if losses else None,
        "peak_memory_mib": peak_memory_mib(),
    }


def reset_peak_memory() -> None:
    """Gives freed memory back and starts the peak anew, so that it belongs to what follows."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
        try:
            _CLEAR.write_text("5")  # sets the high-water mark of the resident memory back, see man 5 proc
        except OSError:
            return


def peak_memory_mib() -> float | None:
    """Largest memory since :func:`reset_peak_memory`: allocated on the accelerator, else resident in this process."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    found = peak_resident_bytes()
    return None if found is None else round(found / 2**20, 1)
