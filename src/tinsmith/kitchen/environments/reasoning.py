"""Tasks of reasoning-gym: made by rule, checked by rule, as many as one wants."""

from __future__ import annotations

import re
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from typing import Any, Final

from tinsmith.data import DataError
from tinsmith.kitchen.environments.questions import QuestionEnvironment
from tinsmith.kitchen.ports.environment import EnvironmentGroup, SameTask

_ANSWER: Final = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
ANSWER_INSTRUCTIONS: Final = "Give the final answer alone between <answer> and </answer>."


class ReasoningGymTasks:
    """`size` tasks of one kind; the same seed gives the same tasks. `options` go to the kind's own configuration.

    Raises `DataError` if the package is missing, and for an unknown kind (with the nearest) or option.
    """

    def __init__(
        self, kind: str, *, size: int, seed: int, system: str | None = ANSWER_INSTRUCTIONS, **options: Any
    ) -> None:
        try:
            package: Any = import_module("reasoning_gym")
            kinds: Any = import_module("reasoning_gym.factory").DATASETS
        except ImportError as error:
            raise DataError("these tasks need a package: pip install 'tinsmith[environments]'") from error
        if kind not in kinds:
            near = get_close_matches(kind, kinds, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise DataError(f"reasoning-gym has no tasks of kind {kind!r}{hint}")
        try:
            self._tasks: Any = package.create_dataset(kind, size=size, seed=seed, **options)
        except (TypeError, ValueError, AssertionError) as error:
            raise DataError(f"reasoning-gym refuses {options!r} for {kind!r}: {error}") from error
        self._kind = kind
        self._system = system

    def __len__(self) -> int:
        return len(self._tasks)

    def group(self, index: int, size: int) -> EnvironmentGroup:
        if not 0 <= index < len(self._tasks):
            raise IndexError(f"task {index} of {len(self._tasks)}")
        entry = self._tasks[index]

        def make_one() -> QuestionEnvironment:
            return QuestionEnvironment(
                question=entry["question"],
                target=str(entry["answer"]),
                score=partial(self._score, entry),
                system=self._system,
            )

        return SameTask(make_one=make_one, size=size, tags={"task": f"{self._kind}/{index}"})

    def _score(self, entry: Any, answer: str, target: str) -> float:
        return float(self._tasks.score_answer(answer=final_answer(answer), entry=entry))


def final_answer(text: str) -> str:
    """What stands in the last `<answer>`, else the whole text."""
    found = _ANSWER.findall(text)
    return (found[-1] if found else text).strip()
