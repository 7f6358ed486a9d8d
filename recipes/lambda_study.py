"""How heavy the shadow's own loss should be in trainings of full length: `python recipes/lambda_study.py --data DIR`.

The system study's trainings with several weights (lambda, Eq. 8), scored attached and detached on validation rows; test rows
are never read. A training that is there is not run again, so the study can be stopped and continued.
"""

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

import system_study
from shadowpeft.deploy.serve import load_served
from shadowpeft.evaluate.modes import score_modes
from shadowpeft.evaluate.record import data_revision, write_record
from shadowpeft.model import ShadowModel
from shadowpeft.train.tasks import TASKS

WEIGHTS = (0.5, 2.0, 8.0, 32.0)
MODES = ("attached", "detached")


def measured(given: argparse.Namespace, task: str, weight: float) -> dict[str, Any]:
    """Exact answers of validation rows, after a training with ``weight``."""
    shadow = system_study.SHADOW.replace(auxiliary_loss_weight=weight)
    own = argparse.Namespace(**{**vars(given), "work": given.work / f"lambda-{weight:g}", "shadow": shadow})
    config = system_study.training(own, task)
    loaded = load_served([f"cloud={system_study.shadow_of(own, task)}"])
    assert isinstance(loaded.model, ShadowModel)
    rows = system_study.rows_of(given, task, "validation", given.rows)
    scores = score_modes(loaded.model, loaded.tokenizer, TASKS[task], rows, modes=MODES, max_length=config.max_length)
    found = {mode: {"score": score.metrics[score.headline], "interval": score.interval} for mode, score in scores.items()}
    return {"task": task, "lambda": weight, "steps": config.max_steps, "num_rows": len(rows),
            "rows_revision": data_revision(rows), "seed": config.seed, **found}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder with a folder for each task; default: the hub")
    parser.add_argument("--tasks", default="robot,clinc150")
    parser.add_argument("--weights", default=",".join(f"{weight:g}" for weight in WEIGHTS))
    parser.add_argument("--work", type=Path, default=Path("runs/lambda_study"))
    parser.add_argument("--out", type=Path, default=Path("results/lambda_study.json"))
    parser.add_argument("--rows", type=int, default=500, help="validation rows at most")
    parser.add_argument("--steps", type=int, help="of every training [default: the system study's]")
    parser.add_argument("--tiny", action="store_true", help="two steps, a few rows: does it run?")
    given = parser.parse_args()
    given.adapter = {}
    if given.tiny:
        given.steps, given.rows = 2, 6
    cells: list[dict[str, Any]] = []
    for task in given.tasks.split(","):
        for weight in map(float, given.weights.split(",")):
            cells.append(measured(given, task, weight))
            write_record(given.out, {"cells": cells})
            Console().print(cells[-1], markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
