"""What a call of ``generate`` goes by: its arguments by name, and its settings wherever they were given."""

import inspect
from typing import Any

from transformers import GenerationMixin, PreTrainedModel


def by_name(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of ``generate``, those given by position under their names."""
    plain: Any = GenerationMixin
    given = inspect.signature(plain.generate).bind(model, *args, **kwargs).arguments
    others = given.pop("kwargs", {})
    return {name: value for name, value in given.items() if name != "self"} | others


def setting(model: PreTrainedModel, arguments: dict[str, Any], name: str) -> Any:
    """As transformers reads it: the argument, else the given config's value, else the model's.

    Args:
        arguments: of :func:`by_name`.
    """
    if name in arguments:
        return arguments[name]
    value = getattr(arguments.get("generation_config"), name, None)
    return getattr(model.generation_config, name, None) if value is None else value
