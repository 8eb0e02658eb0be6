"""What can go wrong on our side of the wire, and whose fault it is.

    TinsmithError                    category "unknown"
    ├── UserError                    category "user": the request cannot work; sending it again changes nothing
    │   ├── InvalidInput             a field holds a value it must not hold
    │   ├── NotFound                 a model, run, checkpoint, session or sampler that does not exist (or is not yours)
    │   ├── AlreadyExists            a name is taken
    │   ├── PayloadConflict          a sequence number was used again with another payload
    │   ├── Unsupported              a known feature of the protocol that this server does not have
    │   └── AdapterCorrupted         the adapter's numbers are no longer finite; training on it has ended
    └── ServerError                  category "server": the request was fine
        ├── StorageError             a disk or store refused a read or write
        ├── CheckpointDamaged        a stored file does not match its hash
        ├── EngineDied               the process that computes went away
        └── Overloaded               a limit was reached; try again later

Dialects translate these at the edge; nothing below the server knows an HTTP status.
"""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar


class RequestErrorCategory(StrEnum):
    """Whose fault a failed request is, as the Tinker wire names it."""

    Unknown = "unknown"
    Server = "server"
    User = "user"


class TinsmithError(Exception):
    """Root of every error this package raises on purpose."""

    category: ClassVar[RequestErrorCategory] = RequestErrorCategory.Unknown

    @property
    def message(self) -> str:
        return str(self)


class UserError(TinsmithError):
    category = RequestErrorCategory.User


class InvalidInput(UserError):
    """A field holds a value it must not hold. The message names both."""


class NotFound(UserError):
    pass


class AlreadyExists(UserError):
    pass


class PayloadConflict(UserError):
    pass


class Unsupported(UserError):
    pass


class AdapterCorrupted(UserError):
    pass


class ServerError(TinsmithError):
    category = RequestErrorCategory.Server


class StorageError(ServerError):
    pass


class CheckpointDamaged(ServerError):
    pass


class EngineDied(ServerError):
    pass


class Overloaded(ServerError):
    pass
