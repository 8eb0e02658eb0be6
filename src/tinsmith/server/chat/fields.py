"""Fields of a request: what they ask for, and a plain no to what this server does not do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError

from tinsmith.server.errors import brief
from tinsmith.types.errors import InvalidInput

ANY: Sequence[Any] = (...,)
"""For `refuse_unsupported`: whatever the field holds asks for nothing here."""


class BadField(InvalidInput):
    """`param` is the field's place in the body, as `messages[0].role`."""

    def __init__(self, param: str, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


def refuse_unsupported(
    extra: Mapping[str, Any], neutral: Mapping[str, Sequence[Any]], instead: Mapping[str, str] | None = None
) -> None:
    """`extra` are the fields that nobody reads; each may only hold a value that asks for nothing.

    `neutral`: such values by field, beside `None`; `...` stands for any value. `instead`: what to do about a field.
    Raises `BadField`.
    """
    for name, value in extra.items():
        accepted = neutral.get(name, ())
        if value is None or ... in accepted or any(type(value) is type(a) and value == a for a in accepted):
            continue
        if name not in neutral:
            message = f"there is no field {name!r} on this server; leave it out"
        else:
            message = f"{name} {brief(value)} is not supported by this server"
            if accepted:
                message += f"; it takes {' or '.join(repr(a) for a in accepted)}"
        hint = (instead or {}).get(name)
        raise BadField(name, f"{message}: {hint}" if hint else message)


def place_of(error: RequestValidationError) -> str | None:
    """Where in the body the first fault lies; `None` if it is the body itself."""
    fault = error.errors()[0]
    value, place = error.body, ""
    for part in fault["loc"][1:]:
        if isinstance(value, list) and isinstance(part, int) and part < len(value):
            value, place = value[part], f"{place}[{part}]"
        elif isinstance(value, dict) and (part in value or (fault["type"] == "missing" and part == fault["loc"][-1])):
            value, place = value.get(part), f"{place}.{part}" if place else str(part)
        else:
            break  # the name of a variant, not of a field
    return place or None
