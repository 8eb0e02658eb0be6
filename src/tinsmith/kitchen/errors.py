"""What can stop a recipe.

KitchenError             (types.errors.UserError)
├── ConfigError          a key or value of a config
├── ValidationError      a workflow that cannot run: names, stages, options, adapters; found before anything runs
├── AdapterError         an adapter that is missing, or lacks what its port promises
├── WorkflowError        a workflow ended early
│   └── StageError       one of its stages failed; knows where, and the cause
├── RunFolderError       the output folder holds something else, or not what is needed to resume
├── GateFailed           the numbers at the start of a run are not what they must be
├── NothingTrained       a run found no reason to train
└── TrainingDiverged     the loss is no longer a finite number
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from tinsmith.types.errors import UserError


class KitchenError(UserError):
    pass


class ConfigError(KitchenError):
    pass


class ValidationError(KitchenError):
    """Holds every problem that was found, one per line."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


class AdapterError(KitchenError):
    pass


class WorkflowError(KitchenError):
    pass


class StageError(WorkflowError):
    """`__cause__` is what the stage raised."""

    def __init__(self, stage_path: str, indices: dict[str, int], cause: BaseException) -> None:
        self.stage_path = stage_path
        """`epochs[1]/steps[14]/submit`: every enclosing loop with its index, then the stage."""
        self.indices = indices
        """Loop names to the indices (from 0) they stood at."""
        self.cause = cause
        super().__init__(f"stage {stage_path}: {str(cause) or type(cause).__name__}")


class RunFolderError(KitchenError):
    pass


class GateFailed(KitchenError):
    pass


class NothingTrained(KitchenError):
    pass


class TrainingDiverged(KitchenError):
    pass


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'lora_rank'?` if a known name is near, else nothing."""
    found = get_close_matches(name.replace(".", "_").replace("-", "_").lower(), list(known), n=1, cutoff=0.6)
    return f"; did you mean {found[0]!r}?" if found else ""
