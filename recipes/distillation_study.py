"""What the distillation term does for drafts: `python recipes/distillation_study.py --data DIR [--tiny]`.

Adapters that differ in the distillation term alone are trained for equally many epochs and scored attached and
detached; then each drafts for itself on the same test prompts. A cell (task, variant, seed) is one JSON file, and its
adapter stays under ``--work``; cells that are there are not run again, so the study can be stopped and continued.
"""

import argparse
import itertools
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from shadowpeft import ShadowConfig, collect_statistics
from shadowpeft.evaluate.modes import score_modes
from shadowpeft.evaluate.record import write_record
from shadowpeft.train.checkpoints import RUN_FILE
from shadowpeft.train.config import TrainConfig
from shadowpeft.train.data import prompt_ids
from shadowpeft.train.run import Trained, train

# The preset as it was when this study was made.
ADAPTER = ShadowConfig.preset(
    "recommended", auxiliary_loss_weight=0.5, shadow_alpha=1.0, inject_activation="none", shadow_lr_multiplier=1.0
)
VARIANTS = {
    "none": {},
    "KL 0.5": {"distillation_weight": 0.5},
    "KL 2": {"distillation_weight": 2.0},
    "KL 0.5 alone": {"auxiliary_loss_weight": 0.0, "distillation_weight": 0.5},
}
# The settings of the demonstration and of recipes/e2e.yaml.
TASKS = {"robot": {"max_length": 64}, "e2e": {"max_length": 192}}
NUM_DRAFTS = 6


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One adapter of the study."""

    task: str
    variant: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.task}-{self.variant.replace(' ', '-')}-{self.seed}"


@torch.no_grad()
def drafting(done: Trained, num_prompts: int, max_length: int) -> dict[str, float]:
    """Greedy speculative decoding of the first test prompts, one at a time, with a fixed number of drafts."""
    prepared, parts = done.prepared, []
    tokenizer, task, model = prepared.tokenizer, prepared.task, prepared.model.eval()
    for row in prepared.test_rows[:num_prompts]:
        ids = torch.tensor([prompt_ids(task, tokenizer, row, max_length)])
        with collect_statistics() as calls:
            model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=task.max_new_tokens, do_sample=False,
                eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, speculative=NUM_DRAFTS,
            )  # fmt: skip
        parts += calls
    rounds, new = sum(p.num_row_rounds for p in parts), sum(p.num_generated for p in parts)
    tested, accepted = sum(p.num_tested for p in parts), sum(p.num_accepted for p in parts)
    return {
        "num_prompts": len(parts),
        "num_drafts": NUM_DRAFTS,
        "acceptance": accepted / max(tested, 1),
        "tokens_a_pass": new / max(rounds, 1),
    }


def run_cell(given: argparse.Namespace, cell: Cell) -> dict[str, Any]:
    folder = given.work / cell.name
    data = None if given.data is None or cell.task == "robot" else str(given.data / cell.task)
    limits = {"limit_train": 64, "limit_eval": 8, "epochs": 1.0} if given.tiny else {"limit_eval": 300, "epochs": 3.0}
    shadow = ADAPTER.replace(**VARIANTS[cell.variant])
    config = TrainConfig(
        base="embedded", task=cell.task, data=data, output=str(folder), seed=cell.seed, batch_size=16,
        learning_rate=1.5e-3, shadow=shadow, resume=(folder / RUN_FILE).is_file(), **TASKS[cell.task], **limits,
    )  # fmt: skip
    done = train(config)
    if done.interrupted:
        sys.exit("stopped; the same command goes on from here")
    prepared = done.prepared
    scores = score_modes(
        prepared.model, prepared.tokenizer, prepared.task, prepared.test_rows,
        modes=("attached", "detached"), max_length=config.max_length,
    )  # fmt: skip
    return {
        "task": cell.task,
        "variant": cell.variant,
        "seed": cell.seed,
        "steps": done.steps,
        "num_test_rows": len(prepared.test_rows),
        "metric": prepared.task.metric,
        "scores": {mode: score.metrics for mode, score in scores.items()},
        **drafting(done, 4 if given.tiny else 200, config.max_length),
    }


def summary(cells: list[dict[str, Any]]) -> str:
    """Markdown: means over seeds, with the lowest and the highest."""
    columns = ("task", "distillation", "attached", "detached", "acceptance", "tokens a pass", "seeds")
    lines = [f"| {' | '.join(columns)} |", "|---|---|" + "---:|" * (len(columns) - 2)]
    for task, variant in dict.fromkeys((cell["task"], cell["variant"]) for cell in cells):
        found = [cell for cell in cells if (cell["task"], cell["variant"]) == (task, variant)]
        values = [[cell["scores"][mode][cell["metric"]] for cell in found] for mode in ("attached", "detached")]
        values.append([cell["acceptance"] for cell in found])
        shown = [spread([100 * value for value in column], 1) for column in values]
        shown.append(spread([cell["tokens_a_pass"] for cell in found], 2))
        lines.append(f"| {task} | {variant} | {' | '.join(shown)} | {len(found)} |")
    return "\n".join(lines)


def spread(values: list[float], digits: int) -> str:
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} - {max(values):.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder with a folder for each task; default: the hub")
    parser.add_argument("--work", type=Path, default=Path("runs/distillation"))
    parser.add_argument("--out", type=Path, default=Path("results/distillation"))
    parser.add_argument("--tasks", default="robot,e2e")
    parser.add_argument("--seeds", type=int, default=1, help="so many for every variant")
    parser.add_argument("--tiny", action="store_true", help="a few steps: does it run?")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for seed, task, variant in itertools.product(range(given.seeds), given.tasks.split(","), VARIANTS):
        cell = Cell(task=task, variant=variant, seed=seed)
        path = given.out / f"{cell.name}.json"
        if not path.is_file():
            write_record(path, run_cell(given, cell))
        Console().print(path.name)
    print(summary([json.loads(path.read_text(encoding="utf-8")) for path in sorted(given.out.glob("*.json"))]))


if __name__ == "__main__":
    main()
