"""What recovery can raise.

TinkerError
└── RecoveryFailed     training cannot go on; `.reason` says why in one word, `__cause__` is the last real error
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from tinsmith.client.errors import TinkerError
from tinsmith.types.errors import RequestErrorCategory

FailureReason: TypeAlias = Literal[
    "recovery_disabled", "already_pending", "no_checkpoint", "user_error", "max_attempts_exceeded"
]


class RecoveryFailed(TinkerError):
    type = "recovery_failed"

    def __init__(self, run_id: str, reason: FailureReason, detail: str = "") -> None:
        super().__init__(f"run {run_id!r} was not recovered: {reason}{f' ({detail})' if detail else ''}")
        self.run_id = run_id
        self.reason = reason
        self.detail = detail
        self.category = RequestErrorCategory.User if reason == "user_error" else RequestErrorCategory.Unknown

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.run_id, self.reason, self.detail)

    @property
    def advice(self) -> str:
        return {
            "recovery_disabled": "Set RecoveryPolicy(enabled=True).",
            "already_pending": "Wait for the recovery that is under way.",
            "no_checkpoint": "Start anew, and save checkpoints: CheckpointPolicy(save_every=…).",
            "user_error": "Correct what the last error names, then continue from the last checkpoint.",
            "max_attempts_exceeded": "Look at the last error; once its cause is gone, continue from a checkpoint.",
        }[self.reason]
