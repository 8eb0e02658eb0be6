"""For all tiers: no network, threads that do not fight over two cores, and no test that fails for being slow."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

from tests.generated import EXPLORE

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

settings.register_profile(
    "tinsmith",
    deadline=None,
    print_blob=True,
    derandomize=EXPLORE == 1,
    max_examples=100 * EXPLORE,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("tinsmith")
