"""Errors that only control raises.

UserError
├── SessionEnded     the session was finished or stopped sending heartbeats
├── ModelEnded       the model was unloaded, failed to be created, or ended with its session
├── SamplerGone      the sampler's snapshot was dropped
├── Unauthorized     no key, or one that is unknown, expired or revoked
├── Forbidden        the key is good, and not for this
├── FutureExpired    the request existed; its result is no longer kept
└── DiskBudgetExceeded   there is no room for another checkpoint

Overloaded
└── QuotaExceeded    a user or project has as much as it may have at a time: ask again later

StorageError
├── NotTaken         the request could not be written down, and was not begun: send it again
└── Unsettled        a write may have been done or not: the connection was lost at its end
"""

from __future__ import annotations

from tinsmith.types.errors import Overloaded, StorageError, TinsmithError, UserError


class SessionEnded(UserError):
    @classmethod
    def because(cls, session_id: str, reason: str | None, detail: str | None) -> SessionEnded:
        why = reason if detail is None else f"{reason}: {detail}"
        return cls(f"session {session_id!r} has ended ({why}); create a new one")


class ModelEnded(UserError):
    pass


class SamplerGone(UserError):
    pass


class Unauthorized(UserError):
    pass


class Forbidden(UserError):
    pass


class FutureExpired(UserError):
    pass


class DiskBudgetExceeded(UserError):
    pass


class QuotaExceeded(Overloaded):
    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NotTaken(StorageError):
    pass


def creation_failed(model_id: str, error: TinsmithError) -> ModelEnded:
    return ModelEnded(f"model {model_id!r} could not be created: {error}")


class Unsettled(StorageError):
    pass
