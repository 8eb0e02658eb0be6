"""What an engine says of itself about once a second, whatever it works on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

PULSE_S: Final = 1.0
"""How often an engine with a process of its own sends one."""
PHASES: Final = ("pack", "forward", "loss", "backward", "optimizer", "prefill", "decode", "idle", "other")
"""What an engine's time goes into. `other`: loads, saves, choosing what comes next."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulse:
    """Counts go up from the engine's start; all times are the host's, in seconds."""

    number: int
    """Grows with every pulse of one engine."""
    slice_s: float
    """How long the slice of work it is in has lasted; 0 if it waits for work."""
    num_slices: int
    """Slices that it finished."""
    phase_s: Mapping[str, float]
    """By `PHASES`. A GPU works on after a call has returned: there, the phase that waits for it has the time."""
    tokens_trained: int
    tokens_prefilled: int
    tokens_sampled: int
    num_training_passes: int
    num_decode_passes: int
    """Passes in which sequences that were drawing took part."""
    num_decode_rows: int
    """Sequences in those passes, summed."""
    training_pass_tokens_max: int
    """Most tokens that requests share a pass with."""
    decode_batch_max: int
    num_running: int
    """Sample requests that are being drawn."""
    num_waiting: int
    num_adapters: int
    num_snapshots: int
    cache_blocks: int
    cache_blocks_free: int
    """Blocks that a new sequence could have, those with prompts kept for reuse among them."""
    rss_bytes: int
    device_bytes: int
    """Held on a GPU; 0 without one."""

    @property
    def tokens(self) -> int:
        return self.tokens_trained + self.tokens_prefilled + self.tokens_sampled
