"""Writes every table of README.md and docs/ from the files in results/: `python scripts/render.py [--check]`.

A table stands between `<!-- result: NAME -->` and `<!-- end -->`; NAME is a key of TABLES. `--check` changes nothing
and fails where a page does not say what its results say.
"""

import argparse
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from result_tables import deployment, quality, speed
from result_tables.common import ROOT

BLOCK = re.compile(r"(<!-- result: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
TABLES: dict[str, Callable[[], str]] = {
    "demo": quality.demo_table,
    "parity": quality.parity_table,
    "decode-robot": partial(speed.decode_table, "decode-robot"),
    "decode-12x1024-plain": partial(speed.decode_table, "decode-12x1024-plain"),
    "decode-12x1024": partial(speed.decode_table, "decode-12x1024"),
    "decode-e2e": partial(speed.decode_table, "decode-e2e"),
    "speed": partial(speed.speed_table, "decode-e2e", "decode-robot"),
    "train-step": partial(speed.train_step_table, "train_step", "train_step-default", "train_step-all", every_label=False),
    "train-step-embedded": partial(speed.train_step_table, "train_step-embedded"),
    "train-step-151936": partial(speed.train_step_table, "train_step-151936"),
    "train-step-presets": partial(speed.train_step_table, "train_step-presets"),
    "memory-presets": partial(speed.memory_table, "memory-presets"),
    "memory-embedded": partial(speed.memory_table, "memory-embedded"),
    "training": partial(speed.training_table, "train_step-8B", "train_step"),
    "train-step-gpu": partial(speed.train_step_gpu_table, "train_step-0.6B", "train_step-4B", "train_step-8B"),
    "step-kernel": speed.step_kernel_table,
    "compare-embedded": partial(quality.compare_table, "compare_small", "embedded", leave_out=("probe", "full")),
    "compare-embedded-all": partial(quality.compare_table, "compare_small", "embedded"),
    "compare-unread": partial(quality.compare_table, "compare_unread", "unread"),
    "confirm": partial(quality.compare_table, "confirm", "embedded"),
    "compare-babyllama": partial(
        quality.compare_table,
        *("compare_babyllama", "babyllama", ("attached", "attached (detached)", "sublayers (detached)")),
    ),
    "compare-babyllama-all": partial(quality.compare_table, "compare_babyllama", "babyllama"),
    "compare-long": partial(quality.compare_table, "compare_long", "embedded"),
    "transfer": partial(quality.transfer_table, "compare_small", "embedded"),
    "transfer-long": partial(quality.transfer_table, "compare_long", "embedded"),
    "ablations": partial(quality.ablations_table, "compare_small", "embedded"),
    "latency": partial(quality.latency_table, "compare_small", "embedded"),
    "scaling": partial(quality.scaling_table, "compare_small", "embedded"),
    "scaling-searched": partial(quality.scaling_table, "scaling", "embedded"),
    "latency-babyllama": partial(quality.latency_table, "compare_babyllama", "babyllama"),
    "defaults-search": partial(quality.trials_table, "defaults_search"),
    "preset-study": quality.preset_table,
    "rank-search": partial(quality.chosen_table, "rank_search"),
    "longer-search": partial(quality.chosen_table, "longer_search"),
    "sublayer-search": partial(quality.chosen_table, "sublayer_search"),
    "generation-search": partial(quality.trials_table, "generation_search"),
    "shadow-init": quality.shadow_init_table,
    "shadow-text": quality.shadow_text_table,
    "export": deployment.export_table,
    "decode-12x1024-gpu": partial(speed.decode_table, "decode-12x1024-gpu"),
    "memory": partial(speed.memory_table, "memory", "memory-default", "memory-151936"),
    "distillation": quality.distillation_table,
    "tasks": quality.tasks_table,
    "system": partial(deployment.system_table, "system"),
    "system-short": deployment.system_short_table,
    "routers": deployment.routers_table,
    "serve-load": deployment.load_table,
    "cloud-restart": deployment.restart_table,
    "plan": speed.plan_table,
    "compatibility": deployment.compatibility_table,
    "base": quality.base_table,
}


def rendered(page: str) -> str:
    return BLOCK.sub(lambda block: f"{block[1]}{TABLES[block[2]]()}\n{block[3]}", page)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    is_check = parser.parse_args().check
    stale = []
    for path in pages():
        old = path.read_text(encoding="utf-8")
        new = rendered(old)
        if new != old:
            stale.append(path.relative_to(ROOT))
            if not is_check:
                path.write_text(new, encoding="utf-8")
    if is_check and stale:
        sys.exit(f"not what results/ says: {', '.join(map(str, stale))}; run python scripts/render.py")


if __name__ == "__main__":
    main()
