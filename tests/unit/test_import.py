"""`import tinsmith` is light: it must not make a notebook, a linter or a command line wait."""

from __future__ import annotations

import subprocess
import sys

import pytest

import tinsmith

HEAVY = ("torch", "transformers", "fastapi", "sqlalchemy", "matplotlib", "datasets", "uvicorn")


@pytest.mark.parametrize(
    "statement",
    [
        "import tinsmith",
        "import tinsmith.client",
        "import tinsmith.cli",
        "import tinsmith.types",
        "import tinsmith.kitchen",
    ],
)
def test_nothing_heavy_is_imported_before_it_is_used(statement: str) -> None:
    code = f"import sys; {statement}; print([m for m in {HEAVY!r} if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_every_public_name_exists() -> None:
    for name in tinsmith.__all__:
        assert getattr(tinsmith, name) is not None
    assert "ServiceClient" in dir(tinsmith)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'ServiceKlient'"):
        _ = tinsmith.ServiceKlient
