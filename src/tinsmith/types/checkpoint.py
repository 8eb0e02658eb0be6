"""Names of stored things: `tinker://<run>/<kind>/<name>` and the records behind them."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Literal, TypeAlias

from pydantic import BaseModel

from tinsmith.types.errors import InvalidInput

CheckpointType: TypeAlias = Literal["training", "sampler", "external"]

PATH_KINDS: dict[str, CheckpointType] = {
    "weights": "training",
    "sampler_weights": "sampler",
    "external_weights": "external",
}
"""The middle segment of a path, and the type of checkpoint it holds."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=@:-]{0,199}")


class Checkpoint(BaseModel):
    checkpoint_id: str
    """`<kind>/<name>`, unique within its run."""
    checkpoint_type: CheckpointType
    time: datetime
    tinker_path: str
    size_bytes: int | None = None
    public: bool = False
    user_metadata: dict[str, str] | None = None
    expires_at: datetime | None = None


class ParsedCheckpointTinkerPath(BaseModel):
    tinker_path: str
    training_run_id: str
    checkpoint_type: CheckpointType
    checkpoint_id: str

    @classmethod
    def from_tinker_path(cls, tinker_path: str) -> ParsedCheckpointTinkerPath:
        """Raises `InvalidInput` (a `ValueError` too) if the path has another form."""
        scheme, _, rest = tinker_path.partition("://")
        segments = rest.split("/")
        if scheme != "tinker" or len(segments) != 3 or segments[1] not in PATH_KINDS or not all(segments):
            raise InvalidTinkerPath(
                f"not a checkpoint path: {tinker_path!r}; "
                f"expected tinker://<training run>/<{'|'.join(PATH_KINDS)}>/<name>"
            )
        return cls(
            tinker_path=tinker_path,
            training_run_id=segments[0],
            checkpoint_type=PATH_KINDS[segments[1]],
            checkpoint_id=f"{segments[1]}/{segments[2]}",
        )


class InvalidTinkerPath(InvalidInput, ValueError):
    pass


def check_checkpoint_name(name: str) -> str:
    """Raises `InvalidInput` unless `name` can be one path segment and one file name."""
    if not _NAME.fullmatch(name):
        raise InvalidInput(
            f"checkpoint name {name!r} must start with a letter or digit "
            "and hold only letters, digits and . _ + = @ : - (200 at most)"
        )
    return name
