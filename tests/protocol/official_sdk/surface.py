"""The public surface of a package that speaks the Tinker API, as JSON: run with the Python that has the package.

`python surface.py tinker` prints names, parameters with their kinds and defaults, fields with their defaults, and the
bases of exceptions.
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from typing import Any

import pydantic

MODULES = ("", ".types", ".auth")
_MODEL_NAMES = frozenset(dir(pydantic.BaseModel))


def surface(package: str) -> dict[str, Any]:
    return {f"tinker{suffix}": _module(importlib.import_module(package + suffix)) for suffix in MODULES}


def _module(module: Any) -> dict[str, Any]:
    names = getattr(module, "__all__", None) or [name for name in dir(module) if not name.startswith("_")]
    found = {name: getattr(module, name) for name in names if name != "annotations"}
    return {name: _thing(value) for name, value in found.items() if not inspect.ismodule(value)}


def _thing(value: Any) -> dict[str, Any]:
    if inspect.isclass(value) and value not in (str, int):
        return {"kind": "class", **_class(value)}
    if inspect.isfunction(value):
        return {"kind": "function", "parameters": _parameters(value)}
    return {"kind": "value"}


def _class(value: type) -> dict[str, Any]:
    described: dict[str, Any] = {"members": {}}
    if issubclass(value, BaseException):
        described["bases"] = [base.__name__ for base in value.__mro__[1:] if base.__module__ != "builtins"]
    fields = getattr(value, "model_fields", None)
    if fields is not None:
        described["fields"] = {name: _default(field) for name, field in fields.items()}
    for name in dir(value):
        if name.startswith("_") and name != "__init__":
            continue
        if fields is not None and (name in _MODEL_NAMES or name in fields):
            continue
        if issubclass(value, BaseException) and name in dir(Exception) and name != "__init__":
            continue
        member = getattr(value, name)
        described["members"][name] = _parameters(member) if callable(member) else "attribute"
    return described


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return repr(float(value)) if isinstance(value, int | float) and not isinstance(value, bool) else repr(value)


def _parameters(function: Any) -> list[list[str]] | str:
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):
        return "callable"
    return [
        [
            one.name,
            one.kind.name,
            "required" if one.default is inspect.Parameter.empty else repr(one.default),
        ]
        for one in signature.parameters.values()
    ]


if __name__ == "__main__":
    json.dump(surface(sys.argv[1]), sys.stdout)
