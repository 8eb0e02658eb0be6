"""What a workflow tells whoever watches it."""

from __future__ import annotations

from typing import Protocol

from tinsmith.observe.rows import StepRow


class RunObserver(Protocol):
    """Told in the order of the run, from one thread. After `started`, `ended` comes on every path, errors included."""

    def started(self, *, title: str, first_step: int, num_steps: int) -> None:
        """Steps `first_step` (from 1) to `num_steps` will run."""

    def stepped(self, row: StepRow) -> None: ...

    def noted(self, text: str) -> None:
        """Something a person wants to read: a checkpoint, an evaluation, a warning."""

    def ended(self) -> None: ...
