"""Values that are not in memory."""

from __future__ import annotations

from typing import Any


class Elsewhere:
    """Stands for a value that is kept somewhere else."""

    __slots__ = ()

    def load(self) -> Any:
        """Blocks. Raises `StorageError`."""
        raise NotImplementedError
