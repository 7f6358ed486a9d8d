"""Kills a training run at random points and checks that it goes on as if nothing had happened.

``python benchmarks/kill_resume.py`` (30 points, 2 minutes on one core); ``--points 4`` for a few seconds.

A tiny run is trained once without interruption. Then, for every point, the same run is started in a process of its own,
killed with SIGKILL, and started again until it ends. Odd points are moments of the clock over the whole run, sent from
outside. Even points lie inside saving: the process kills itself at a random one of the Python calls that it makes while
it saves a checkpoint or the adapter, so that every file operation can be the last. Losses of all steps and the saved
weights have to be those of the uninterrupted run, bit for bit.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from shadowpeft import ShadowConfig
from shadowpeft.model import ShadowModel
from shadowpeft.train import TrainConfig, train
from shadowpeft.train.checkpoints import RUN_FILE
from shadowpeft.train.saving import SafeTrainer

STEPS, SAVE_EVERY = 8, 2
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def make_bench(folder: Path) -> None:
    """A random base of two blocks, a byte tokenizer and 40 rows to train on."""
    torch.manual_seed(0)
    names = ["<pad>", "<s>", "</s>", *ALPHABET]
    tokenizer = Tokenizer(models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder / "base")
    config = LlamaConfig(
        vocab_size=len(names), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    rows = [{"text": f"the thing {number} is on", "intent": f"switch_{number % 3}"} for number in range(40)]
    (folder / "rows").mkdir()
    for split in ("train", "test"):
        (folder / "rows" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(bench: Path, output: Path) -> None:
    """Starts the run in ``output``, or goes on with it."""
    torch.set_num_threads(1)
    settings = TrainConfig(
        base=str(bench / "base"), task="intent", data=str(bench / "rows"), output=str(output), max_steps=STEPS,
        batch_size=4, gradient_accumulation=2, log_every=1, save_every=SAVE_EVERY, resume=(output / RUN_FILE).is_file(),
        shadow=ShadowConfig(r=4, shadow_intermediate_size=24, shadow_dropout=0.2),
    )  # fmt: skip
    train(settings)


class CallCounter:
    """Counts Python calls while a run saves; at the call number ``fatal`` the process kills itself."""

    def __init__(self, fatal: int | None = None) -> None:
        self.num_calls = 0
        self._fatal = fatal

    def _note(self, frame: Any, event: str, argument: Any) -> None:
        self.num_calls += 1
        if self.num_calls == self._fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self, owner: type, name: str) -> None:
        """Counts inside the named method."""
        saves = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            before = sys.getprofile()  # a model is saved within its checkpoint
            sys.setprofile(self._note)
            try:
                return saves(*args, **kwargs)
            finally:
                sys.setprofile(before)

        setattr(owner, name, counted)


def watch_saving(fatal: int | None = None) -> CallCounter:
    """Watches checkpoints and the adapter at the end, which is saved outside of any."""
    counter = CallCounter(fatal)
    counter.watch(SafeTrainer, "_save_checkpoint")
    counter.watch(ShadowModel, "save_pretrained")
    return counter


def in_fork(work: Callable[[], None]) -> int:
    """Starts ``work`` in a copy of this process, which has loaded everything already; returns its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(child: int) -> int:
    """The exit code; minus the signal's number if one ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@dataclass(frozen=True)
class Outcome:
    """What has to be equal: the lines of the log, step by step, and the bytes of the adapter."""

    losses: list[tuple]
    weights: bytes

    @classmethod
    def of(cls, folder: Path) -> "Outcome":
        entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        kept = [e for e in entries if "loss" in e]
        losses = [(e["step"], e["loss"], e["shadow_loss"], e["grad_norm"], e["learning_rate"]) for e in kept]
        return cls(losses, (folder / "adapter" / "shadow_model.safetensors").read_bytes())


def uninterrupted(bench: Path) -> tuple[Outcome, int, float]:
    """(outcome, Python calls inside saving, seconds) of runs that nobody kills."""
    started = time.monotonic()
    assert wait(in_fork(lambda: run(bench, bench / "whole"))) == 0, "the uninterrupted run failed"
    seconds = time.monotonic() - started

    def counted() -> None:
        counter = watch_saving()
        run(bench, bench / "counted")
        (bench / "calls").write_text(str(counter.num_calls))

    assert wait(in_fork(counted)) == 0, "the counted run failed"
    return Outcome.of(bench / "whole"), int((bench / "calls").read_text()), seconds


def start_and_kill(bench: Path, output: Path, point: int, generator: random.Random, calls: int, seconds: float) -> bool:
    """Whether the process was killed; it may have ended before its moment came."""
    if point % 2 == 0:
        fatal = generator.randint(1, calls)

        def doomed() -> None:
            watch_saving(fatal)
            run(bench, output)

        return wait(in_fork(doomed)) == -signal.SIGKILL
    child = in_fork(lambda: run(bench, output))
    time.sleep(generator.random() * seconds)
    os.kill(child, signal.SIGKILL)
    return wait(child) == -signal.SIGKILL


def try_points(bench: Path, num_points: int, seed: int) -> dict[str, Any]:
    expected, calls, seconds = uninterrupted(bench)
    generator = random.Random(seed)
    counts = {"killed_by_clock": 0, "killed_while_saving": 0, "resumed_from_checkpoint": 0, "started_anew": 0}
    for point in range(num_points):
        output = bench / f"point{point}"
        killed = start_and_kill(bench, output, point, generator, calls, seconds)
        counts["killed_while_saving" if point % 2 == 0 else "killed_by_clock"] += killed
        has_checkpoint = any((output / "checkpoints").glob("checkpoint-*"))
        counts["resumed_from_checkpoint" if has_checkpoint else "started_anew"] += 1
        assert wait(in_fork(lambda output=output: run(bench, output))) == 0, f"point {point} does not resume"
        found = Outcome.of(output)
        assert found.losses == expected.losses, f"point {point}: {found.losses} instead of {expected.losses}"
        assert found.weights == expected.weights, f"point {point}: the saved weights differ"
        assert not list(output.rglob(".saving-*")), f"point {point} leaves temporary folders"
        shutil.rmtree(output)
    return {"points": num_points, "seed": seed, "steps": STEPS, "calls_inside_saving": calls, **counts}


def main() -> None:
    disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_bench(Path(folder))
        started = time.monotonic()
        counts = try_points(Path(folder), options.points, options.seed)
        counts["seconds"] = round(time.monotonic() - started, 1)
    for name, value in counts.items():
        print(f"{name:26} {value}")
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
