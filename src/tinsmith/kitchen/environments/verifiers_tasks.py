"""Tasks of verifiers (its `v1` interface) whose prompt needs one answer and whose rewards need no runtime.

Tool servers, containers and hooks that prepare a runtime belong to verifiers' own harnesses; such a task is refused by
name. To run those, point their harness at the OpenAI endpoint of `tinsmith serve --record`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, cast

from tinsmith.data import DataError, Message, ParsedAnswer
from tinsmith.data.conversations import Role
from tinsmith.kitchen.ports.environment import EnvironmentGroup, Observation, SameTask, StepResult


class VerifiersTasks:
    """The tasks of a taskset, or of any iterable of tasks: finite, read at once.

    Raises `DataError` if the package is missing or older, and for a task that needs more than an answer.
    """

    def __init__(self, tasks: Iterable[Any], *, name: str = "verifiers") -> None:
        try:
            self._vf: Any = import_module("verifiers.v1")
        except ImportError as error:
            raise DataError("these tasks need a package: pip install 'tinsmith[verifiers]'") from error
        if getattr(tasks, "bounded", True) is False:
            raise DataError(f"the taskset {name!r} never ends; take some of it: taskset.take(1000)")
        self._tasks = list(tasks)
        self._name = name
        for number, task in enumerate(self._tasks):
            self._check(task, f"task {number} of {name!r}")

    def __len__(self) -> int:
        return len(self._tasks)

    def group(self, index: int, size: int) -> EnvironmentGroup:
        if not 0 <= index < len(self._tasks):
            raise IndexError(f"task {index} of {len(self._tasks)}")
        task = self._tasks[index]
        return SameTask(
            make_one=lambda: VerifiersEnvironment(task=task, vf=self._vf),
            size=size,
            tags={"task": f"{self._name}/{index}"},
        )

    def _check(self, task: Any, where: str) -> None:
        base = self._vf.Task
        if task.NEEDS_CONTAINER:
            raise DataError(f"{where} needs a container")
        if task.toolsets(task.config):
            raise DataError(f"{where} needs tool servers")
        for hook in ("setup", "finalize"):
            if getattr(type(task), hook) is not getattr(base, hook):
                raise DataError(f"{where} prepares a runtime in {hook!r}")
        for signal in (*task.hooks("reward"), *task.hooks("metric")):
            needed = inspect.signature(signal).parameters.get("runtime")
            if needed is not None and needed.default is inspect.Parameter.empty:
                raise DataError(f"{where}: its {signal.__name__!r} needs a runtime")
        if task.data.prompt is None:
            raise DataError(f"{where} has no prompt")


@dataclass(slots=True, kw_only=True)
class VerifiersEnvironment:
    """One answer to one task, scored by the task's own weighted rewards."""

    task: Any
    vf: Any
    _prompt: tuple[Message, ...] = field(default=(), init=False)

    async def start(self) -> Observation:
        data = self.task.data
        system = (Message(role="system", content=data.system_prompt),) if data.system_prompt else ()
        if isinstance(data.prompt, str):
            prompt: tuple[Message, ...] = (Message(role="user", content=data.prompt),)
        else:
            prompt = tuple(_message(message) for message in data.prompt)
        self._prompt = (*system, *prompt)
        return Observation(messages=self._prompt)

    async def step(self, answer: ParsedAnswer) -> StepResult:
        trace = self._trace(answer.message)
        await self.task.score(trace)
        metrics = {name: float(value) for name, value in trace.metrics.items() if value is not None}
        parts = {name: float(reward.score) for name, reward in trace.rewards.items() if reward is not None}
        return StepResult(reward=float(trace.reward), metrics=metrics | parts)

    async def close(self) -> None:
        """Nothing to give back."""

    def _trace(self, answer: Message) -> Any:
        """The episode as verifiers records one."""
        types: Any = import_module("verifiers.v1.types")
        graph: Any = import_module("verifiers.v1.graph")
        traces: Any = import_module("verifiers.v1.trace")
        kinds = {"system": types.SystemMessage, "user": types.UserMessage, "assistant": types.AssistantMessage}
        messages = [kinds[message.role](content=message.content) for message in self._prompt]
        reply = types.AssistantMessage(content=answer.content, reasoning_content=answer.thinking)
        nodes = [
            graph.MessageNode(parent=place - 1 if place else None, message=message, sampled=message is reply)
            for place, message in enumerate([*messages, reply])
        ]
        return traces.Trace(
            task=traces.TraceTask(type=type(self.task).__name__, data=self.task.data),
            agent=traces.AgentInfo(config=self.vf.AgentConfig()),
            nodes=nodes,
            is_completed=True,
            ok=True,
        )


def _message(message: Any) -> Message:
    types: Any = import_module("verifiers.v1.types")
    if message.role not in ("system", "user", "assistant"):
        raise DataError(f"a prompt with a message of role {message.role!r} has no place here")
    return Message(role=cast(Role, message.role), content=types.content_text(message.content))
