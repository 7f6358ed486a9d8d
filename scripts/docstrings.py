"""An extension of griffe, which reads docstrings for the site (mkdocs.yml)."""

import ast
import re
from typing import Any

from griffe import Attribute, Docstring, ExprCall, Extension, Object

_ROLE = re.compile(r":\w+:`([^`]+)`")


class Docstrings(Extension):
    """Settings are documented by the help text of their field; roles such as ``:meth:`` become plain code."""

    def on_attribute_instance(self, *, attr: Attribute, **_: Any) -> None:
        call = attr.value
        if isinstance(call, ExprCall) and str(call.function) == "setting":
            default, text = call.arguments
            attr.docstring = Docstring(ast.literal_eval(str(text)), parent=attr)
            attr.value = default

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(r"`\1`", obj.docstring.value)
