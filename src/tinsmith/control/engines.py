"""The engines of one server, one per base model, and what they were last known to be."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tinsmith.runtime.handle import EngineCall, EngineHandle
from tinsmith.types.errors import EngineDied, NotFound, UserError
from tinsmith.types.operations import BaseModelCard, Operation


class EngineSlot:
    """One engine, seen from control."""

    def __init__(self, handle: EngineHandle, card: BaseModelCard) -> None:
        self.handle = handle
        self.card = card
        self.dead: EngineDied | None = None
        self.is_recovering = False
        """It is dead, and will be started again."""
        self.num_deaths = 0
        self.num_results = 0
        """Requests that ended with a result of it, each counted once."""
        self._revived = asyncio.Event()
        self.on_death: Callable[[EngineSlot], None] = lambda slot: None

    def submit(self, operation: Operation) -> EngineCall:
        """Raises `EngineDied` if the engine is gone."""
        (call,) = self.submit_all([operation])
        return call

    def submit_all(self, operations: Sequence[Operation]) -> list[EngineCall]:
        """Raises `EngineDied` if the engine is gone."""
        if self.dead is not None:
            raise self.dead
        try:
            return self.handle.submit_all(operations)
        except EngineDied as error:
            self.declare_dead(error)
            raise

    async def call(self, operation: Operation) -> Any:
        """Submit and wait. Cancelling the wait does not stop the operation."""
        return await self.answer(self.submit(operation))

    async def answer(self, call: EngineCall) -> Any:
        """Wait for a submitted operation."""
        try:
            return await asyncio.shield(call.answer)
        except EngineDied as error:
            self.declare_dead(error)
            raise

    def tell(self, operation: Operation) -> None:
        """Submit an operation whose answer nobody needs. A dead engine is told nothing."""
        with contextlib.suppress(EngineDied):
            self.submit(operation).answer.add_done_callback(discard)

    def declare_dead(self, error: EngineDied) -> None:
        if self.dead is None:
            self.dead = error
            self.num_deaths += 1
            self._revived.clear()
            self.on_death(self)

    @property
    def pause_reason(self) -> str:
        return f"the engine of {self.card.name!r} is being started again; what it worked on will be done again"

    def revive(self) -> None:
        """It has been started again, with empty hands."""
        self.dead, self.is_recovering = None, False
        self._revived.set()

    def give_up(self) -> None:
        """It will not be started again."""
        self.is_recovering = False
        self._revived.set()

    async def settled(self) -> None:
        """Wait while it is being started again. Raises `EngineDied` if it stays dead."""
        while self.is_recovering:
            await self._revived.wait()
        if self.dead is not None:
            raise self.dead

    def check_alive(self) -> None:
        """Notice an engine that went away while nothing was asked of it."""
        if self.dead is None and not self.handle.is_alive:
            self.declare_dead(EngineDied(f"the engine of base model {self.card.name!r} is gone"))


def discard(answer: asyncio.Future[Any]) -> None:
    """For an answer that nobody waits for: its error is no complaint."""
    if not answer.cancelled():
        answer.exception()


class EngineBook:
    """Finds the engine for a base model's name."""

    def __init__(self, handles: Sequence[EngineHandle]) -> None:
        self._handles = tuple(handles)
        self._slots: dict[str, EngineSlot] = {}

    def __iter__(self) -> Iterator[EngineSlot]:
        return iter(self._slots.values())

    async def start(self) -> None:
        """Start all engines side by side. Raises the first one's `UserError`; then none is left running."""
        started = await asyncio.gather(*(handle.start() for handle in self._handles), return_exceptions=True)
        failures = [result for result in started if isinstance(result, BaseException)]
        if failures:
            await self.close()
            raise failures[0]
        for handle in self._handles:
            if handle.card.name in self._slots:
                await self.close()
                raise UserError(f"two engines serve a base model named {handle.card.name!r}; give one another name")
            self._slots[handle.card.name] = EngineSlot(handle, handle.card)

    async def close(self) -> None:
        await asyncio.gather(*(handle.close() for handle in self._handles))

    def resolve(self, base_model: str) -> EngineSlot:
        """By full name first, then by what stands before a `:suffix`.

        Raises `NotFound` listing what exists, or `EngineDied`.
        """
        for name in (base_model, base_model.partition(":")[0]):
            if name in self._slots:
                slot = self._slots[name]
                slot.check_alive()
                if slot.dead is not None and not slot.is_recovering:
                    raise slot.dead
                return slot
        raise NotFound(f"no base model {base_model!r} on this server; it has: {', '.join(self._slots) or 'none'}")
