"""An environment whose answers may call tools before the one that counts."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Final

from tinsmith.data import Message, ParsedAnswer, Tool, ToolCall
from tinsmith.kitchen.environments.questions import Score
from tinsmith.kitchen.ports.environment import Observation, StepResult

_JSON_TYPES: Final[Mapping[str, str]] = {"str": "string", "int": "integer", "float": "number", "bool": "boolean"}


@dataclass(frozen=True, slots=True, kw_only=True)
class PythonTool:
    """A function with typed parameters, plain or async, as a tool."""

    run: Callable[..., Any | Awaitable[Any]]
    tool: Tool

    @classmethod
    def of(cls, run: Callable[..., Any]) -> PythonTool:
        """Name, description and parameters come from the function's own name, docstring and annotations.

        Raises `ValueError` for a parameter that is none of str, int, float, bool.
        """
        properties: dict[str, Any] = {}
        required = []
        for name, parameter in inspect.signature(run).parameters.items():
            annotation = parameter.annotation
            kind = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
            if kind not in _JSON_TYPES:
                raise ValueError(f"parameter {name!r} of tool {run.__name__!r} must be str, int, float or bool")
            properties[name] = {"type": _JSON_TYPES[kind]}
            if parameter.default is inspect.Parameter.empty:
                required.append(name)
        description = (inspect.getdoc(run) or "").partition("\n\n")[0]
        parameters = {"type": "object", "properties": properties, "required": required}
        return cls(run=run, tool=Tool.of(run.__name__, description, parameters))


@dataclass(slots=True, kw_only=True)
class ToolEnvironment:
    """A question that may be answered with the help of tools. The first answer without a call is scored.

    What a tool raises, an unknown name and a wrong argument go back to the model as the tool's result: it may try
    again.
    """

    question: str
    target: str
    score: Score
    tools: Sequence[PythonTool]
    system: str | None = None
    call_reward: float = 0.0
    """For each call that a tool could run; negative to make calls cost."""
    _by_name: Mapping[str, PythonTool] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._by_name = {tool.tool.name: tool for tool in self.tools}
        if len(self._by_name) != len(self.tools):
            raise ValueError(f"two tools have one name: {[tool.tool.name for tool in self.tools]}")

    async def start(self) -> Observation:
        system = () if self.system is None else (Message(role="system", content=self.system),)
        question = Message(role="user", content=self.question)
        return Observation(messages=(*system, question), tools=tuple(tool.tool for tool in self.tools))

    async def step(self, answer: ParsedAnswer) -> StepResult:
        calls = answer.message.tool_calls
        if not calls:
            score = await asyncio.to_thread(self.score, answer.message.content, self.target)
            return StepResult(reward=score, metrics={"score": score, "faults": float(len(answer.faults))})
        results = [await self._call(call) for call in calls]
        num_good = sum(is_good for _, is_good in results)
        return StepResult(
            reward=self.call_reward * num_good,
            done=False,
            messages=tuple(message for message, _ in results),
            metrics={"calls": float(len(calls)), "failed_calls": float(len(calls) - num_good)},
        )

    async def close(self) -> None:
        """Nothing to give back."""

    async def _call(self, call: ToolCall) -> tuple[Message, bool]:
        """The tool's message, and whether the tool could run."""
        tool = self._by_name.get(call.name)
        if tool is None:
            near = get_close_matches(call.name, self._by_name, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; the tools are {', '.join(self._by_name)}"
            return _result(call, f"error: there is no tool {call.name!r}{hint}"), False
        try:
            inspect.signature(tool.run).bind(**call.arguments)
        except TypeError as error:
            return _result(call, f"error: {error}"), False
        try:
            if inspect.iscoroutinefunction(tool.run):
                value = await tool.run(**call.arguments)
            else:
                value = await asyncio.to_thread(tool.run, **call.arguments)
        except Exception as error:  # noqa: BLE001 - a task's boundary: the model is told and goes on
            return _result(call, f"error: {type(error).__name__}: {error}"), False
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        return _result(call, text), True


def _result(call: ToolCall, text: str) -> Message:
    valid = text.encode("utf-8", "replace").decode()
    return Message(role="tool", content=valid, tool_call_id=call.id, name=call.name)
