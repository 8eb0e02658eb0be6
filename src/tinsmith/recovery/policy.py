"""When and how a run is recovered."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from tinsmith.recovery.diagnosis import Trigger
from tinsmith.types.checkpoint import ParsedCheckpointTinkerPath

if TYPE_CHECKING:
    from tinsmith.client.training import TrainingClient
    from tinsmith.recovery.checkpoints import RecordedCheckpoint

CheckpointStrategy: TypeAlias = Literal["latest", "best_loss", "best"] | tuple[Literal["specific"], str]
"""`best` is another word for `best_loss`; `("specific", "tinker://…")` names one."""

OnRecovery: TypeAlias = "Callable[[str, TrainingClient, RecordedCheckpoint], Awaitable[None] | None]"
"""`(old run id, new client, checkpoint)`."""
OnFailure: TypeAlias = Callable[[str, str], "Awaitable[None] | None"]
"""`(run id, reason)`."""

_POSITIVE = ("max_attempts", "backoff_ms", "max_backoff_ms", "poll_interval_ms", "max_concurrent")


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryPolicy:
    """Raises `ValueError` naming a field whose value cannot work."""

    enabled: bool = False
    max_attempts: int = 3
    """For one failure; and so many failures at the same step end the run."""
    backoff_ms: int = 5000
    """Before the second attempt; doubled before each further one."""
    max_backoff_ms: int = 60_000
    jitter: float = 0.1
    """Waits vary by this share, so that many runs do not come back together."""
    checkpoint_strategy: CheckpointStrategy = "latest"
    restore_optimizer: bool = True
    poll_interval_ms: int = 30_000
    """How often the monitor asks for the state of a run."""
    stall_ms: int | None = None
    """A step that takes longer than this counts as stalled; `None` waits for ever."""
    triggers: frozenset[Trigger] = frozenset(Trigger)
    """What is recovered from; anything else ends the loop with its own error."""
    max_concurrent: int = 4
    """Recoveries of different runs at once."""
    on_recovery: OnRecovery | None = None
    on_failure: OnFailure | None = None

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer, not {value!r}")
        if self.stall_ms is not None and self.stall_ms < 1:
            raise ValueError(f"stall_ms must be a positive integer or None, not {self.stall_ms!r}")
        if not 0 <= self.jitter < 1:
            raise ValueError(f"jitter must lie between 0 and 1, not {self.jitter!r}")
        if unknown := sorted(map(str, set(self.triggers) - set(Trigger))):
            raise ValueError(f"triggers has none called {', '.join(unknown)}; there are {', '.join(Trigger)}")
        match self.checkpoint_strategy:
            case "latest" | "best_loss" | "best":
                pass
            case ("specific", str(path)):
                try:
                    ParsedCheckpointTinkerPath.from_tinker_path(path)
                except ValueError as error:
                    raise ValueError(f"checkpoint_strategy: {error}") from error
            case other:
                raise ValueError(f"checkpoint_strategy must be latest, best_loss or ('specific', path), not {other!r}")

    def backoff_s(self, attempt: int) -> float:
        """Seconds to wait after failed attempt `attempt`, counted from 0."""
        delay_ms = min(self.backoff_ms * 2.0 ** min(attempt, 32), self.max_backoff_ms)
        return delay_ms / 1000 * (1 + self.jitter * random.uniform(-1, 1))
