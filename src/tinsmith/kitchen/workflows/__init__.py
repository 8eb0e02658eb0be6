"""The workflows that ship."""

from tinsmith.kitchen.workflows.supervised import supervised

__all__ = ["supervised"]
