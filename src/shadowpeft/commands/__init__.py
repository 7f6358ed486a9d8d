"""What each verb does, for the command line and for scripts."""

from shadowpeft.commands.answering import generate
from shadowpeft.commands.demonstration import DEMO, demo
from shadowpeft.commands.describing import info
from shadowpeft.commands.planning import plan
from shadowpeft.commands.scoring import evaluate
from shadowpeft.commands.training import train

__all__ = ["DEMO", "demo", "evaluate", "generate", "info", "plan", "train"]
