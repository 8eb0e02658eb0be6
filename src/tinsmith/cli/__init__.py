"""The command line. Importing this package loads nothing; each command loads what it needs when it runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit: 0 when it worked, 1 when it could not, 2 when it was asked wrongly, 130 on Ctrl-C."""
    from tinsmith.cli.app import app

    app(args=None if arguments is None else list(arguments), prog_name="tinsmith")
    raise SystemExit(0)
