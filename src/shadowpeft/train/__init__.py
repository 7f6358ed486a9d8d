"""Tasks, data and training, on transformers' Trainer."""

from shadowpeft.train.config import TrainConfig
from shadowpeft.train.data import AnswerCollator, encode_classification, encode_generation, load_rows
from shadowpeft.train.groups import parameter_groups
from shadowpeft.train.run import Trained, train
from shadowpeft.train.tasks import TASKS, Task
from shadowpeft.train.trainer import ShadowTrainer

__all__ = [
    "TASKS",
    "AnswerCollator",
    "ShadowTrainer",
    "Task",
    "TrainConfig",
    "Trained",
    "encode_classification",
    "encode_generation",
    "load_rows",
    "parameter_groups",
    "train",
]
