"""How many cases generated tests try: the same ones in every run, or new and many more of them with EXPLORE=20."""

from __future__ import annotations

import os
from typing import Any, Final

from hypothesis import settings

EXPLORE: Final = int(os.environ.get("EXPLORE", "1"))


def examples(count: int, **more: Any) -> settings:
    """Settings of a generated test that tries `count` cases, or `count` times EXPLORE new ones."""
    return settings(max_examples=count * EXPLORE, derandomize=EXPLORE == 1, deadline=None, **more)
