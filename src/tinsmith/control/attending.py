"""Samples that a caller waits for in place: drawn once more if the engine dies meanwhile, and every token told once."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable
from typing import TypeAlias

from tinsmith.control.engines import EngineSlot, discard
from tinsmith.types.errors import EngineDied
from tinsmith.types.operations import CancelSample, Sample
from tinsmith.types.results import DrawnToken, SampleResponse

OnToken: TypeAlias = Callable[[DrawnToken], None]

_MAX_TRIES = 2
"""Below the number of deaths after which a request that is in the ledger is blamed: it would be beside this one."""


async def attend(
    slot: EngineSlot, prepare: Callable[[], Awaitable[Sample]], on_token: OnToken | None
) -> SampleResponse:
    """Draw what `prepare` gives, which is asked before every try and gives the same but for the snapshot's name.

    Cancelling the wait stops the drawing. Raises `EngineDied` if the engine dies again or stays dead, or if what it
    draws the second time is not what was told before; and whatever else the engine answers.
    """
    told = _Told(on_token)
    for num_tries in range(1, _MAX_TRIES + 1):
        await slot.settled()
        operation = await prepare()
        try:
            response = await _draw(slot, operation, told)
        except EngineDied as error:
            slot.declare_dead(error)
            if num_tries == _MAX_TRIES or not slot.is_recovering:
                raise
            continue
        if told.has_diverged:
            raise EngineDied("the engine died while it drew, and drew other tokens when it was asked again")
        return response
    raise AssertionError("a try ends with a response or an error")


async def _draw(slot: EngineSlot, operation: Sample, told: _Told) -> SampleResponse:
    call = slot.submit(operation)
    call.on_token = told.begin()
    try:
        response: SampleResponse = await asyncio.shield(call.answer)
    except asyncio.CancelledError:
        call.on_token = None
        call.answer.add_done_callback(discard)
        slot.tell(CancelSample(ticket=call.ticket))
        raise
    return response


class _Told:
    """The tokens that a caller has, by sequence."""

    def __init__(self, on_token: OnToken | None) -> None:
        self._on_token = on_token
        self._tokens: defaultdict[int, list[int]] = defaultdict(list)
        self.has_diverged = False

    def begin(self) -> OnToken | None:
        """To be told of every token of one try."""
        on_token = self._on_token
        if on_token is None:
            return None
        seen: defaultdict[int, int] = defaultdict(int)

        def tell(drawn: DrawnToken) -> None:
            tokens, position = self._tokens[drawn.index], seen[drawn.index]
            seen[drawn.index] += 1
            if position < len(tokens):
                self.has_diverged |= tokens[position] != drawn.token
            elif not self.has_diverged:
                tokens.append(drawn.token)
                on_token(drawn)

        return tell
