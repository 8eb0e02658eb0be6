"""Words in users' metadata that the server acts on: all begin with `tinsmith.`, and unknown ones are refused."""

from __future__ import annotations

from collections.abc import Mapping

from tinsmith.control import records
from tinsmith.types.errors import InvalidInput

KEEP = "tinsmith.keep"
"""Of a run: how many of its checkpoints of a kind are kept. `records.PIN` is that of a checkpoint."""
_OURS = "tinsmith."


def kept_by(metadata: Mapping[str, str]) -> int | None:
    """What a run's metadata says of how many to keep. Raises `InvalidInput`."""
    text = metadata.get(KEEP)
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or not int(text):
        raise InvalidInput(f"user_metadata[{KEEP!r}] must be a whole number of at least 1, not {text!r}")
    return int(text)


def check_run_metadata(metadata: Mapping[str, str]) -> None:
    """Raises `InvalidInput` for names of ours that we do not know, and for bad values."""
    _check_names(metadata, KEEP)
    kept_by(metadata)


def check_checkpoint_metadata(metadata: Mapping[str, str] | None) -> None:
    """As `check_run_metadata`."""
    _check_names(metadata or {}, records.PIN)
    pin = (metadata or {}).get(records.PIN)
    if pin not in (None, records.PINNED, "false"):
        raise InvalidInput(f"user_metadata[{records.PIN!r}] must be 'true' or 'false', not {pin!r}")


def _check_names(metadata: Mapping[str, str], known: str) -> None:
    for key in metadata:
        if key.startswith(_OURS) and key != known:
            raise InvalidInput(
                f"user_metadata[{key!r}] is unknown; of names that begin with {_OURS!r} there is {known!r}"
            )
