"""Metrics are named `name:reduction`; the reduction says how the values of several requests become one."""

from __future__ import annotations

from collections.abc import Sequence

REDUCTIONS = ("sum", "min", "max", "mean", "slack", "hash2", "unique")


def reduction_of(key: str) -> str | None:
    """The reduction a key asks for (after its last colon), or `None` if it names none we know."""
    _, colon, suffix = key.rpartition(":")
    return suffix if colon and suffix in REDUCTIONS else None


def merge_metrics(chunks: Sequence[dict[str, float]], weights: Sequence[int]) -> dict[str, float]:
    """Combine the metrics of the chunks of one call; `weights` are their numbers of datums.

    `sum`, `min`, `max` as named; `mean` weighted by datums (unweighted if there are none); `slack` is the maximum minus
    that mean; `hash2` the sum modulo 2^64; `unique`, and keys with no known reduction, keep the first value and number
    the differing others `key_1`, `key_2`, … A key missing in some chunks is merged over those that have it.
    Never raises.
    """
    if len(chunks) == 1:
        return dict(chunks[0])
    merged: dict[str, float] = {}
    for key in dict.fromkeys(key for chunk in chunks for key in chunk):
        present = [(chunk[key], w) for chunk, w in zip(chunks, weights, strict=True) if key in chunk]
        merged.update(_merge_one(key, [value for value, _ in present], [w for _, w in present]))
    return merged


def _merge_one(key: str, values: list[float], weights: list[int]) -> dict[str, float]:
    match reduction_of(key):
        case "sum":
            return {key: sum(values)}
        case "min":
            return {key: min(values)}
        case "max":
            return {key: max(values)}
        case "mean":
            return {key: _weighted_mean(values, weights)}
        case "slack":
            return {key: max(values) - _weighted_mean(values, weights)}
        case "hash2":
            return {key: float(sum(int(value) for value in values) % 2**64)}
        case _:
            distinct = list(dict.fromkeys(values))
            return {key if i == 0 else f"{key}_{i}": value for i, value in enumerate(distinct)}


def _weighted_mean(values: list[float], weights: list[int]) -> float:
    total = sum(weights)
    if total == 0:
        return sum(values) / len(values)
    return sum(value * w for value, w in zip(values, weights, strict=True)) / total
