"""Optional packages of the exporters."""

import importlib
from types import ModuleType

from transformers import PreTrainedModel

from shadowpeft.errors import ShadowPeftError
from shadowpeft.train.sources import MissingPackageError


class ExportError(ShadowPeftError, RuntimeError):
    """A model that could not be exported, or whose exported file does not compute what the model does."""


def check_generates(model: PreTrainedModel, *, what: str) -> None:
    """Refuses classifiers, for which the exported files have no layout here."""
    if not model.can_generate():
        raise ExportError(
            f"{what} is for causal language models, not for {type(model).__name__}; the detached folder of a "
            "classifier runs in transformers"
        )


def need(name: str, *, what: str, install: str = "'shadowpeft[export]'") -> ModuleType:
    """Imports an optional package.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingPackageError(f"{what} needs the package `{name}`: pip install {install}") from error
