"""Words in users' metadata that the server acts on. What looks like one of them, and is none, is refused.

Others that begin with `tinsmith.` are notes of our own client: recovery keeps step and lineage there.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches

from tinsmith.control import records
from tinsmith.types.errors import InvalidInput

KEEP = "tinsmith.keep"
"""Of a run: how many of its checkpoints of a kind are kept. `records.PIN` is that of a checkpoint."""
_OURS = "tinsmith."
_RESEMBLES = 0.6
"""How like a word of ours (difflib's ratio, beyond the prefix) a key must be to be taken for a slip."""


def kept_by(metadata: Mapping[str, str]) -> int | None:
    """What a run's metadata says of how many to keep. Raises `InvalidInput`."""
    text = metadata.get(KEEP)
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or not int(text):
        raise InvalidInput(f"user_metadata[{KEEP!r}] must be a whole number of at least 1, not {text!r}")
    return int(text)


def check_run_metadata(metadata: Mapping[str, str]) -> None:
    """Raises `InvalidInput` for what is nearly a word of ours, for one that belongs elsewhere, and for bad values."""
    _check_names(metadata, known=KEEP, belongs="a run", elsewhere=records.PIN)
    kept_by(metadata)


def check_checkpoint_metadata(metadata: Mapping[str, str] | None) -> None:
    """As `check_run_metadata`."""
    _check_names(metadata or {}, known=records.PIN, belongs="a checkpoint", elsewhere=KEEP)
    pin = (metadata or {}).get(records.PIN)
    if pin not in (None, records.PINNED, "false"):
        raise InvalidInput(f"user_metadata[{records.PIN!r}] must be 'true' or 'false', not {pin!r}")


def _check_names(metadata: Mapping[str, str], *, known: str, belongs: str, elsewhere: str) -> None:
    words = [word.removeprefix(_OURS) for word in (known, elsewhere)]
    for key in metadata:
        if not key.startswith(_OURS) or key == known:
            continue
        if get_close_matches(key.removeprefix(_OURS), words, n=1, cutoff=_RESEMBLES):
            raise InvalidInput(f"user_metadata[{key!r}] means nothing here; {belongs} has {known!r}")
