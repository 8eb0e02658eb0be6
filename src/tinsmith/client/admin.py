"""`AdminClient`: what an account did and what it costs."""

from __future__ import annotations

from datetime import date, datetime
from typing import Literal, TypeAlias

from tinsmith.client.exchanges import RestExchanges
from tinsmith.client.futures import APIFuture, value_twin
from tinsmith.client.http import get
from tinsmith.types.usage import AuditLogResponse, BillingUsageResponse, CurrentCheckpointStorageUsageResponse

AuditEventType: TypeAlias = Literal["all", "checkpoints", "projects", "teams", "organizations"]


class AdminClient(RestExchanges):
    """Reads the books of an account. Servers without books refuse with an `APIStatusError`."""

    def get_audit_log(
        self, event_type: AuditEventType = "all", day: date | str | None = None
    ) -> APIFuture[AuditLogResponse]:
        """Who did what, on one day if given."""
        return self._read(get("audit", event_type=event_type, day=None if day is None else str(day)), AuditLogResponse)

    def get_billing_usage(
        self, starting_on: datetime | str, ending_before: datetime | str
    ) -> APIFuture[BillingUsageResponse]:
        """What was used between two full hours, two weeks apart at most."""
        call = get("billing/usage/events", starting_on=_rfc3339(starting_on), ending_before=_rfc3339(ending_before))
        return self._read(call, BillingUsageResponse)

    def get_current_checkpoint_storage_usage(
        self, project_id: str | None = None
    ) -> APIFuture[CurrentCheckpointStorageUsageResponse]:
        call = get("billing/usage/checkpoints/current", project_id=project_id)
        return self._read(call, CurrentCheckpointStorageUsageResponse)

    get_audit_log_async = value_twin(get_audit_log)
    get_billing_usage_async = value_twin(get_billing_usage)
    get_current_checkpoint_storage_usage_async = value_twin(get_current_checkpoint_storage_usage)


def _rfc3339(when: datetime | str) -> str:
    """Raises `ValueError` for a time without a zone: it could mean any hour of the day."""
    if isinstance(when, str):
        return when
    if when.tzinfo is None:
        raise ValueError(f"{when!r} has no time zone")
    return when.isoformat()
