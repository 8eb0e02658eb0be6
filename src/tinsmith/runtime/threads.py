"""How the engine's CPU threads wait for each other."""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping


def sleep_instead_of_spinning(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let OpenMP threads sleep at barriers instead of spinning, unless the user chose otherwise.

    Beside any other busy process, spinning threads hold the cores that the thread they wait for needs: training was
    measured up to ten times slower so. Has an effect only before torch is loaded.
    """
    if environment is not os.environ or "torch" not in sys.modules:
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
