"""What can be wrong with training data, before a model sees it.

InvalidInput             (types.errors, category "user")
├── DataError            a file, a line or a field of it cannot be read as conversations
└── RenderError          a conversation cannot become tokens under a chat template
"""

from __future__ import annotations

from tinsmith.types.errors import InvalidInput


class DataError(InvalidInput):
    """Messages name the file, the line (from 1), the field and the value."""


class RenderError(InvalidInput):
    """Messages name the conversation's source and the message (from 1)."""
