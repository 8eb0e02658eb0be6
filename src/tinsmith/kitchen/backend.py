"""A backend that is opened when it is first needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tinsmith.kitchen.ports import Sampler, SessionSpec, TrainingBackend


class DeferredBackend(TrainingBackend):
    """Opens at the first session or sampler: data that cannot be read is found before a model is loaded."""

    def __init__(self, connect: Callable[[], TrainingBackend]) -> None:
        self._connect = connect
        self._opened: TrainingBackend | None = None

    def _backend(self) -> TrainingBackend:
        if self._opened is None:
            self._opened = self._connect()
        return self._opened

    @property
    def location(self) -> str | None:
        return self._backend().location

    def start_session(self, spec: SessionSpec) -> Any:
        return self._backend().start_session(spec)

    def open_sampler(self, model: str) -> Sampler:
        return self._backend().open_sampler(model)

    def close(self, *, failed: bool = False) -> None:
        if self._opened is not None:
            self._opened.close(failed=failed)
