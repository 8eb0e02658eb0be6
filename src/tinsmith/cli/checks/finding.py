"""What a check found."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, TypeAlias


class Verdict(StrEnum):
    OK = "ok"
    WARN = "warn"
    """It works, but not as well or as safely as it could."""
    FAIL = "fail"
    """A server would not start, would be wrong, or would lose data."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    check: str
    verdict: Verdict
    found: str
    """What is so, with the number."""
    advice: str | None = None
    """What to do; set unless the verdict is ok."""

    def as_row(self) -> dict[str, Any]:
        return asdict(self)


Check: TypeAlias = Callable[[], Iterable[Finding]]


def ok(check: str, found: str) -> Finding:
    return Finding(check=check, verdict=Verdict.OK, found=found)


def warn(check: str, found: str, advice: str) -> Finding:
    return Finding(check=check, verdict=Verdict.WARN, found=found, advice=advice)


def fail(check: str, found: str, advice: str) -> Finding:
    return Finding(check=check, verdict=Verdict.FAIL, found=found, advice=advice)


def run(name: str, check: Check) -> list[Finding]:
    """The findings; a check that breaks is itself a finding."""
    try:
        return list(check())
    except Exception as error:  # noqa: BLE001 - a boundary: one broken check must not hide the others
        return [fail(name, f"could not be checked: {type(error).__name__}: {error}", "report this as a bug")]
