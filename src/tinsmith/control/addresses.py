"""From an address to the checkpoint it means. The forms of addresses are told in `types.checkpoint`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import sqlalchemy as sa

from tinsmith.control import records
from tinsmith.control.records import CheckpointRow
from tinsmith.types.checkpoint import CheckpointAddress
from tinsmith.types.errors import NotFound

_NAMED_IN_ERRORS = 20


def resolve(
    connection: sa.Connection, address: CheckpointAddress, now: float, counts: Callable[[CheckpointRow], bool]
) -> CheckpointRow:
    """Among those that count. Raises `NotFound`, with what there is instead."""
    if address.version is not None and address.name is not None:
        return _version(connection, address, address.name, now, counts)
    found = records.checkpoints(connection, now, run_id=address.run_id, kinds=[address.kind])[0]
    there = [row for row in found if counts(row)]
    if address.metric is not None:
        return _best(there, address)
    if address.name is None:
        if not there:
            raise NotFound(f"no checkpoint {address.path!r}: the run has no {address.kind}")
        return there[0]
    for row in there:
        if row.name == address.name:
            return row
    raise NotFound(
        f"no checkpoint {address.path!r}; it was never saved, or was deleted, or has expired. {_names(address, there)}"
    )


def metrics_of(row: CheckpointRow) -> dict[str, float]:
    """What it can be compared by: training metrics, and numbers that its user gave as metadata."""
    return dict(row.metrics) | _numbers(row.user_metadata or {})


def _numbers(metadata: Mapping[str, str]) -> dict[str, float]:
    numbers = {}
    for key, text in metadata.items():
        try:
            numbers[key] = float(text)
        except ValueError:
            continue  # a label, not a metric
    return numbers


def _version(
    connection: sa.Connection,
    address: CheckpointAddress,
    name: str,
    now: float,
    counts: Callable[[CheckpointRow], bool],
) -> CheckpointRow:
    kept = [
        row
        for row in records.versions(connection, address.run_id, address.kind, name)
        if row.deleted_at is None and (row.expires_at is None or row.expires_at > now) and counts(row)
    ]
    for row in kept:
        if row.version == address.version:
            return row
    versions = ", ".join(str(row.version) for row in kept)
    there = f"of {name!r} there is version {versions}" if kept else f"there is no {name!r}"
    raise NotFound(f"no checkpoint {address.path!r}; {there}")


def _best(there: Sequence[CheckpointRow], address: CheckpointAddress) -> CheckpointRow:
    """The newest of equals."""
    sign = 1 if address.goal == "min" else -1
    best: CheckpointRow | None = None
    lowest = math.inf
    for row in there:
        value = _metric(metrics_of(row), address.metric or "")
        if value is not None and math.isfinite(value) and sign * value < lowest:
            best, lowest = row, sign * value
    if best is None:
        known = sorted({name for row in there for name in metrics_of(row)})
        words = f"they have {', '.join(known)}" if known else "they have no metrics"
        raise NotFound(
            f"no checkpoint {address.path!r}: none of the run's {len(there)} {address.kind} has a metric "
            f"{address.metric!r}; {words}"
        )
    return best


def _metric(metrics: Mapping[str, float], name: str) -> float | None:
    """By its full name, or by what stands before the colon (`loss` for `loss:sum`) if only one begins so."""
    if name in metrics:
        return metrics[name]
    similar = [value for key, value in metrics.items() if key.partition(":")[0] == name]
    return similar[0] if len(similar) == 1 else None


def _names(address: CheckpointAddress, there: Sequence[CheckpointRow]) -> str:
    if not there:
        return f"The run has no {address.kind}"
    more = len(there) - _NAMED_IN_ERRORS
    names = ", ".join(repr(row.name) for row in there[:_NAMED_IN_ERRORS])
    return f"The run's {address.kind}, newest first: {names}{f' and {more} more' if more > 0 else ''}"
