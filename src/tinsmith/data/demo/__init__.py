"""Conversations that ship: small enough to learn in seconds, and about things the base model knows nothing of."""

from __future__ import annotations

from pathlib import Path
from typing import Final

DEMO_CONVERSATIONS: Final = Path(__file__).parent / "tinsmith.jsonl"
"""A tinsmith named Tilly answers questions about her trade."""

DEMO_PREFERENCES: Final = Path(__file__).parent / "preferences.jsonl"
"""Pairs of answers to plain questions: the chosen ones greet, as Tilly would; the rejected ones are curt."""
