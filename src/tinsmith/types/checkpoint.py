"""Names of stored things: `tinker://<run>/<kind>/<name>` and the records behind them.

In place of the name an address may stand. No name holds a `~`, so that none can be taken for one:

    <name>                     the newest version of a name
    <name>~<version>           one version of it, as long as it is kept
    ~latest                    the newest checkpoint of the run and kind
    ~best(<metric>)            the one with the best value of a metric
    ~best(<metric>,min|max)    the same, where a metric's name does not say whether small or large is good
"""

from __future__ import annotations

import re
from dataclasses import dataclass
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
_VERSION = re.compile(r"(?P<name>[^~]+)~(?P<version>[1-9][0-9]{0,8})")
_BEST = re.compile(r"~best\((?P<metric>[^(),~]+)(,(?P<goal>[^(),~]*))?\)")
LATEST = "~latest"
_FORMS = "NAME, NAME~VERSION, ~latest, ~best(METRIC) or ~best(METRIC,min|max)"

Goal: TypeAlias = Literal["min", "max"]
_SMALL_IS_GOOD = ("loss", "nll", "perplexity", "ppl", "error", "wer", "kl")
_LARGE_IS_GOOD = ("accuracy", "acc", "reward", "score", "f1", "bleu", "rouge", "pass", "win_rate", "exact_match")


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
    version: int | None = None
    """Counts the saves under this name, from 1; `tinker_path` means the newest, `<tinker_path>~<version>` this one."""
    step: int | None = None
    """Optimizer steps behind it."""
    metrics: dict[str, float] | None = None
    """The run's last training metrics when it was saved."""
    digest: str | None = None
    """Hash of its weights: equal digests sample equally."""
    parent: str | None = None
    """The run's checkpoint saved or loaded before it, as an exact path."""
    pinned: bool | None = None
    """Whether no rule removes it."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointAddress:
    """Which checkpoint of a run and kind is meant: by name, by version, the newest (neither), or by `metric`."""

    path: str
    run_id: str
    kind: str
    name: str | None = None
    version: int | None = None
    metric: str | None = None
    goal: Goal | None = None

    @property
    def is_chosen(self) -> bool:
        """Whether it means another checkpoint as more are saved."""
        return self.name is None

    @classmethod
    def parse(cls, path: str) -> CheckpointAddress:
        """Raises `InvalidTinkerPath` if the path has another form."""
        parsed = ParsedCheckpointTinkerPath.from_tinker_path(path)
        kind, _, last = parsed.checkpoint_id.partition("/")
        run_id = parsed.training_run_id
        if "~" not in last:
            return cls(path=path, run_id=run_id, kind=kind, name=last)
        if last == LATEST:
            return cls(path=path, run_id=run_id, kind=kind)
        if found := _VERSION.fullmatch(last):
            return cls(path=path, run_id=run_id, kind=kind, name=found["name"], version=int(found["version"]))
        if found := _BEST.fullmatch(last):
            goal = _goal(path, found["metric"], found["goal"])
            return cls(path=path, run_id=run_id, kind=kind, metric=found["metric"], goal=goal)
        raise InvalidTinkerPath(f"the end of {path!r}, {last!r}, is no address of a checkpoint; known are {_FORMS}")


def _goal(path: str, metric: str, said: str | None) -> Goal:
    if said is not None:
        if said == "min":
            return "min"
        if said == "max":
            return "max"
        raise InvalidTinkerPath(f"{path!r} asks for {said!r} of metric {metric!r}; give min or max")
    words = set(re.split(r"[^a-z0-9]+", metric.lower()))
    name = metric.lower().partition(":")[0]
    small = any(word in words or name.endswith(f"_{word}") for word in _SMALL_IS_GOOD)
    large = any(word in words or name.endswith(f"_{word}") for word in _LARGE_IS_GOOD)
    if small == large:
        raise InvalidTinkerPath(
            f"whether metric {metric!r} of {path!r} is better small or large, its name does not say; "
            f"ask for ~best({metric},min) or ~best({metric},max)"
        )
    return "min" if small else "max"


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
