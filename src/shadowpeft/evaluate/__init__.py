"""Scores of any model under a task's prompts, and results as files that say where they come from."""

from shadowpeft.evaluate.modes import score_modes
from shadowpeft.evaluate.record import write_record
from shadowpeft.evaluate.result import Evaluation
from shadowpeft.evaluate.score import evaluate, majority_baseline

__all__ = ["Evaluation", "evaluate", "majority_baseline", "score_modes", "write_record"]
