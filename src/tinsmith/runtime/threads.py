"""How the engine's CPU threads wait for each other."""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping

_SPINS = "5000"
"""A few microseconds: long enough for the next part of a product, too short to starve anybody."""


def spin_briefly(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let OpenMP threads spin only briefly at barriers before they sleep, unless the user chose otherwise.

    Beside another busy process, spinning threads hold the cores that the thread they wait for needs: with the usual
    limit small models were measured up to ten times slower there. Threads that sleep at once are no better: on a quiet
    machine they are up to twice as slow. Has an effect only before torch is loaded.
    """
    if environment is os.environ and "torch" in sys.modules:
        return
    if not environment.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        environment["GOMP_SPINCOUNT"] = _SPINS
