"""Metric reduction, where clients look for it. It lives with the types because the engine merges micro-batches with it."""

from tinsmith.types.metrics import REDUCTIONS, merge_metrics, reduction_of

__all__ = ["REDUCTIONS", "merge_metrics", "reduction_of"]
