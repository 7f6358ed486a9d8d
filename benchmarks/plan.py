"""What `shadowpeft plan` says a training step needs, against the memory that a real step takes.

``python benchmarks/plan.py`` (about 3 minutes on two cores); ``--tiny`` for one small case, in CI.

Planned: the peak of the traced step. Measured: in a process of its own, the highest resident set during the third
training step (the counter is set back in front of it), less the resident set before base and adapter were made; libraries
have run a tiny step by then. Measured twice: with glibc told to give freed memory back at once, which is what a plan of
tensors can be held against, and as glibc comes, which keeps some for later. The first has to agree within 15%.
Linux only, as the counter is read from ``/proc``.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from shadowpeft import ShadowConfig, get_shadow_model
from shadowpeft.evaluate.record import origin, write_record
from shadowpeft.model.bases import EMBEDDED, load_model
from shadowpeft.train import parameter_groups
from shadowpeft.train.plan import StepShape, build_skeleton, enable_checkpointing, trace_step

AGREES = 0.15
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A base (``config`` empty: the embedded one), the shadow's settings and a step."""

    config: dict[str, Any] = field(default_factory=dict)
    shadow: dict[str, Any] = field(default_factory=dict)
    batch: int
    length: int
    dtype: str = "float32"
    checkpointing: bool = False

    def step(self) -> StepShape:
        return StepShape(batch=self.batch, length=self.length)


def base_config(kind: str, width: int, blocks: int, vocabulary: int) -> dict[str, Any]:
    heads = {"num_attention_heads": width // 64, "num_key_value_heads": width // 128, "head_dim": 64}
    sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": blocks, "vocab_size": vocabulary}
    return {"model_type": kind, **sizes, **heads, "tie_word_embeddings": False, "pad_token_id": 0}


CASES = {
    "embedded": Case(batch=8, length=128),
    "embedded, one long row": Case(batch=1, length=512),
    "qwen3 512 x 4, recommended": Case(
        config=base_config("qwen3", 512, 4, 16_000), shadow={"preset": "recommended"}, batch=8, length=96
    ),
    "qwen3 512 x 6, recomputed": Case(config=base_config("qwen3", 512, 6, 8_000), batch=8, length=128, checkpointing=True),
    "llama 256 x 4, large vocabulary": Case(config=base_config("llama", 256, 4, 128_256), batch=4, length=96),
    "llama 384 x 8": Case(config=base_config("llama", 384, 8, 8_000), batch=4, length=160),
}
TINY = {"tiny": Case(config=base_config("qwen3", 256, 4, 4_000), batch=8, length=128)}


def shadow_of(case: Case) -> ShadowConfig:
    given = dict(case.shadow)
    return ShadowConfig.preset(given.pop("preset", "paper"), **given)


def planned(case: Case) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        name = EMBEDDED
        if case.config:
            values = dict(case.config)
            AutoConfig.for_model(values.pop("model_type"), **values).save_pretrained(folder)
            name = folder
        dtype = "auto" if name == EMBEDDED else case.dtype
        skeleton = build_skeleton(name, shadow_of(case), dtype=dtype, checkpointing=case.checkpointing)
        step = trace_step(skeleton, case.step())
        return {"parameters": skeleton.parameters(), "planned": step.peak, "kept": step.kept, "phase": step.worst_phase}


def measured(case: Case) -> int:
    """Bytes that the third step of a training takes at most, in this process."""
    small = AutoConfig.for_model("llama", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                                 num_key_value_heads=2, vocab_size=64)  # fmt: skip
    _train(AutoModelForCausalLM.from_config(small), Case(batch=2, length=8))
    gc.collect()
    before = _status("VmRSS")
    if case.config:
        values = dict(case.config)
        config = AutoConfig.for_model(values.pop("model_type"), **values)
        base = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, case.dtype))
    else:
        base = load_model(EMBEDDED)
    _train(base, case)
    return _status("VmHWM") - before


def _train(base: Any, case: Case) -> None:
    """Three steps; the counter of the highest resident set is set back before the last."""
    model = get_shadow_model(base, shadow_of(case)).train()
    if case.checkpointing:
        enable_checkpointing(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameter_groups(model, learning_rate=1e-3), fused=True)
    ids = torch.randint(1, model.config.vocab_size, (case.batch, case.length))
    mask = torch.ones_like(ids)
    mask[-1, -1] = 0
    for index in range(3):
        if index == 2:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def _status(name: str) -> int:
    (line,) = [x for x in Path("/proc/self/status").read_text(encoding="ascii").splitlines() if x.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


def in_own_process(name: str, environment: dict[str, str]) -> int:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    command = [sys.executable, __file__, "--case", name]
    done = subprocess.run(command, capture_output=True, text=True, env={**clean, **environment})
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr[-3000:]}")
    return int(done.stdout.strip().splitlines()[-1])


def compare(name: str, case: Case) -> dict[str, Any]:
    row = {"case": name, "batch": case.batch, "length": case.length, **planned(case)}
    row["measured"] = in_own_process(name, GIVES_BACK)
    row["measured_default_malloc"] = in_own_process(name, {})
    return row | {"ratio": row["planned"] / row["measured"]}


def table(rows: list[dict[str, Any]]) -> str:
    columns = ("case", "batch", "planned MB", "measured MB", "planned / measured", "as glibc comes MB")
    lines = [f"| {' | '.join(columns)} |", "|---|---|" + "---:|" * 4]
    for row in rows:
        sizes = [row[name] / 1e6 for name in ("planned", "measured", "measured_default_malloc")]
        lines.append(
            f"| {row['case']} | {row['batch']} x {row['length']} | {sizes[0]:.0f} | {sizes[1]:.0f} | {row['ratio']:.3f} "
            f"| {sizes[2]:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="one small case")
    parser.add_argument("--out", type=Path, help="also write the result, with its origin, to this JSON file")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case is not None:
        print(measured((CASES | TINY)[options.case]))
        return
    rows = [compare(name, case) for name, case in (TINY if options.tiny else CASES).items()]
    print(table(rows))
    payload = {"benchmark": "plan", "rows": rows}
    if options.out is not None:
        write_record(options.out, payload)
    print(json.dumps({**payload, "origin": origin()}))
    wrong = [f"{row['case']}: {row['ratio']:.3f}" for row in rows if abs(row["ratio"] - 1) > AGREES]
    assert not wrong, f"expected planned within {AGREES:.0%} of measured, found {', '.join(wrong)}"


if __name__ == "__main__":
    main()
