"""Metric reduction, where clients look for it; it lives with the types because the engine merges passes with it."""

from tinsmith.types.metrics import REDUCTIONS, merge_metrics, reduction_of

__all__ = ["REDUCTIONS", "merge_metrics", "reduction_of"]
