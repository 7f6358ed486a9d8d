"""What a preset's values do in trainings of full length: `python recipes/preset_study.py --data DIR`.

The system study's trainings with other values in the preset, scored attached and detached on validation rows; test rows are
never read. A training that is there is not run again, so the study can be stopped and continued; `--out` keeps what it holds.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console

import system_study
from shadowpeft.deploy.serve import load_served
from shadowpeft.evaluate.modes import score_modes
from shadowpeft.evaluate.record import data_revision, write_record
from shadowpeft.model import ShadowModel
from shadowpeft.train.tasks import TASKS

# How the correction is made, and its training: `linear` is what `recommended` was before it got an activation.
FORMULAS: dict[str, dict[str, Any]] = {
    "linear": {"inject_activation": "none", "shadow_lr_multiplier": 1.0},
    "recommended": {},
}
LINEAR_RATE = 1.5e-3
# (lambda, alpha): first the weight of the shadow's own loss was searched, then that of the correction.
CHANGES = tuple(
    {"auxiliary_loss_weight": weight, "shadow_alpha": alpha}
    for weight, alpha in ((0.5, 1.0), (2.0, 1.0), (8.0, 1.0), (32.0, 1.0), (8.0, 4.0))
)
MODES = ("attached", "detached")


def changed(text: str) -> dict[str, Any]:
    """``{"shadow_alpha": 4.0}`` of ``shadow_alpha=4``; several are joined by commas. Values are numbers."""
    return {name.strip(): float(value) for name, _, value in (part.partition("=") for part in text.split(","))}


def measured(given: argparse.Namespace, task: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Exact answers of validation rows, after a training with ``changes`` to the study's shadow."""
    name = "-".join([given.formula, *(f"{field}-{value:g}" for field, value in changes.items())])
    shadow = system_study.SHADOW.replace(**FORMULAS[given.formula], **changes)
    own = argparse.Namespace(**{**vars(given), "work": given.work / name, "shadow": shadow})
    if given.formula == "linear":
        own.learning_rate = LINEAR_RATE
    config = system_study.training(own, task)
    loaded = load_served([f"cloud={system_study.shadow_of(own, task)}"])
    assert isinstance(loaded.model, ShadowModel)
    rows = system_study.rows_of(given, task, "validation", given.rows)
    scores = score_modes(loaded.model, loaded.tokenizer, TASKS[task], rows, modes=MODES, max_length=config.max_length)
    found = {mode: {"score": score.metrics[score.headline], "interval": score.interval} for mode, score in scores.items()}
    return {"task": task, "formula": given.formula, "changes": changes, "steps": config.max_steps, "num_rows": len(rows),
            "rows_revision": data_revision(rows), "seed": config.seed, **found}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder with a folder for each task; default: the hub")
    parser.add_argument("--tasks", default="robot,clinc150,home_commands")
    parser.add_argument("--formula", choices=FORMULAS, default="linear")
    parser.add_argument("--change", type=changed, nargs="+", default=list(CHANGES), metavar="FIELD=VALUE")
    parser.add_argument("--work", type=Path, default=Path("runs/preset_study"))
    parser.add_argument("--out", type=Path, default=Path("results/preset_study.json"))
    parser.add_argument("--rows", type=int, default=500, help="validation rows at most")
    parser.add_argument("--steps", type=int, help="of every training [default: the system study's]")
    parser.add_argument("--tiny", action="store_true", help="two steps, a few rows: does it run?")
    given = parser.parse_args()
    given.adapter = {}
    if given.tiny:
        given.steps, given.rows, given.out = 2, 6, given.work / "tiny.json"
    cells = json.loads(given.out.read_text(encoding="utf-8"))["cells"] if given.out.is_file() else []
    for task in given.tasks.split(","):
        steps = given.steps or system_study.STEPS[task]
        same = {"task": task, "steps": steps, "formula": given.formula}
        done = [cell["changes"] for cell in cells if same.items() <= cell.items()]
        for changes in [each for each in given.change if each not in done]:
            cells.append(measured(given, task, changes))
            write_record(given.out, {"cells": cells})
            Console().print(cells[-1], markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
