"""Flags in groups: a command takes frozen dataclasses, typer sees their fields.

@dataclass(frozen=True)
class Colours:
    ink: Annotated[str, typer.Option("--ink", help="Colour of the text.")] = "black"

@app.command()
@bundled
def write(text: str, colours: Colours) -> None: ...
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

_KEYWORD = inspect.Parameter.KEYWORD_ONLY


def bundled(command: Callable[..., None]) -> Callable[..., None]:
    """`command`, with each parameter that is a dataclass replaced by that dataclass' fields.

    Every field needs a default. No two groups of a command may share a field name.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, type[Any]] = {}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if is_dataclass(hint := hints[name]) and isinstance(hint, type):
            groups[name] = hint
            parameters += _parameters(hint)
        else:
            parameters.append(parameter.replace(annotation=hint, kind=_KEYWORD))

    def call(**values: Any) -> None:
        made = {
            name: group(**{field.name: values.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        command(**made, **values)

    call.__name__, call.__doc__, call.__module__ = command.__name__, command.__doc__, __name__
    call.__annotations__ = {}
    vars(call)["__signature__"] = inspect.Signature(parameters)
    return call


def _parameters(group: type[Any]) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(f.name, _KEYWORD, default=f.default, annotation=hints[f.name])
        for f in fields(group)
    ]
