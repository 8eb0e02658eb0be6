"""The base model that ships inside the package; importing this module loads nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Final

__all__ = ["TINY", "tiny_folder"]

TINY: Final = "tinsmith/tiny"
"""The name that clients give for the shipped base model."""


def tiny_folder() -> Path:
    """The folder of the shipped base model, in the layout that `from_pretrained` reads."""
    return Path(__file__).parent / "tiny"
