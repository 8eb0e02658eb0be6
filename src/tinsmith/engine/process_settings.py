"""Settings of torch that hold for the whole process: an engine that shares it with a program gives them back."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from tinsmith.types.engine_options import EngineOptions


@dataclass(frozen=True, slots=True)
class _Settings:
    num_threads: int
    is_deterministic: bool
    fills_memory: bool

    @classmethod
    def current(cls) -> _Settings:
        return cls(
            torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        )

    def put_back(self) -> None:
        torch.set_num_threads(self.num_threads)
        torch.use_deterministic_algorithms(self.is_deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = self.fills_memory  # type: ignore[attr-defined]


_lock = threading.Lock()
_num_engines = 0
_before: _Settings | None = None


@contextmanager
def process_settings(options: EngineOptions) -> Iterator[None]:
    """What `options` ask of the process, until the last engine in it has ended. Of several engines the last decides."""
    global _num_engines, _before
    with _lock:
        _before = _before or _Settings.current()
        _num_engines += 1
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        if options.deterministic:
            torch.use_deterministic_algorithms(True)
            # filling new memory is a debugging aid, and costs a pass each time
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        with _lock:
            _num_engines -= 1
            if not _num_engines:
                _before.put_back()
                _before = None
