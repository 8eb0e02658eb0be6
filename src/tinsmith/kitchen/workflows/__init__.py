"""How recipes are carried out."""

from tinsmith.kitchen.workflows.supervised import SupervisedResult, run_supervised

__all__ = ["SupervisedResult", "run_supervised"]
