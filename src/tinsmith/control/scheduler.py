"""Whose turn it is: requests of many models become batches for one engine.

Projects take turns by their shares of the tokens (`types.shares`), and so do the models of a project. The model that is
next decides what is done: if it waits to train, waiting training requests ride along in the same batch, in the order of
shares, as far as the token budget goes; if it waits for an optimizer step, all models that do are stepped together.
An engine is never idle while any request can go. A batch is left emptier than the requests allow only where what would
fit belongs to a project that is ahead of its share, and what would not fit to one that is behind.

How long a request waits: the first one of a project that had none waiting goes into the next batch that is put
together, so it waits for the operations that the engine has, `MAX_OUTSTANDING` at most, and for one turn of each other
project that came as it did. A project of weight w that always has some waiting is served again before the others, of
weight W together, were given W / w times its own largest turn, and two turns each. A turn is at most
`max_batch_tokens`, or one larger request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import TypeAlias

from tinsmith.control.engines import EngineSlot
from tinsmith.control.identity import Clock
from tinsmith.control.models import Model, ModelStatus, Work
from tinsmith.control.quotas import Quotas
from tinsmith.types.shares import Payer, Shares

MAX_OUTSTANDING = 2
"""Operations an engine has at a time: one it works on, one so that it never waits for us."""
OPERATION_TOKENS = 64
"""What an optimizer step, a save or a load counts for."""

Turn: TypeAlias = list[tuple[Model, Work]]
OnAnswered: TypeAlias = Callable[[Model, Work], None]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model whose next request may go."""

    model_id: str
    train_tokens: tuple[int, ...] = ()
    """Tokens of the consecutive training requests at the head of its queue; empty if the head is something else."""
    is_step: bool = False
    """Whether the head is an optimizer step."""
    project: str = ""
    weight: float = 1.0

    @property
    def payer(self) -> Payer:
        return Payer(self.project, self.model_id, self.weight)


def pick(
    candidates: Sequence[Candidate], max_tokens: int, shares: Shares | None = None, *, alone: bool = False
) -> dict[str, int]:
    """How many requests to take from which model, the first one's first; they are charged to `shares`.

    Either one operation of the model that is next; or the optimizer steps of all that wait for one; or a batch of
    training requests: the next one whatever its size, then by shares as many as fit into `max_tokens`. `alone` takes
    one request only. Among equals the first candidate is next.
    """
    if not candidates:
        return {}
    shares = Shares() if shares is None else shares
    shares.compete(c.payer for c in candidates)
    first = _next(candidates, shares)
    if first.train_tokens:
        return _batch(first, candidates, -1 if alone else max_tokens, shares)
    served = [c for c in candidates if c.is_step and c is not first] if first.is_step and not alone else []
    for candidate in (first, *served):
        shares.charge(candidate.payer, OPERATION_TOKENS)
    return {candidate.model_id: 1 for candidate in (first, *served)}


def _batch(first: Candidate, candidates: Sequence[Candidate], max_tokens: int, shares: Shares) -> dict[str, int]:
    taken = {first.model_id: 1}
    budget = max_tokens - first.train_tokens[0]
    shares.charge(first.payer, first.train_tokens[0])
    training = [c for c in candidates if c.train_tokens]
    line = [(shares.rank(c.payer), index) for index, c in enumerate(training)]
    heapify(line)
    too_large: list[Payer] = []
    while line:
        rank, index = heappop(line)
        following = training[index]
        if (now := shares.rank(following.payer)) != rank:  # its project was given something since
            heappush(line, (now, index))
            continue
        size = _next_size(following, taken)
        if size is None:
            continue
        if size > budget:
            too_large.append(following.payer)
            continue
        if not shares.may_pass(following.payer, size, too_large):
            break
        taken[following.model_id] = taken.get(following.model_id, 0) + 1
        budget -= size
        shares.charge(following.payer, size)
        heappush(line, (shares.rank(following.payer), index))
    return taken


def _next_size(candidate: Candidate, taken: dict[str, int]) -> int | None:
    count = taken.get(candidate.model_id, 0)
    return candidate.train_tokens[count] if count < len(candidate.train_tokens) else None


def _next(candidates: Sequence[Candidate], shares: Shares) -> Candidate:
    return min(candidates, key=lambda c: shares.rank(c.payer))


class Scheduler:
    """Keeps one engine busy.

    `execute` is given a turn and answers its futures, telling of each as it goes; it never raises.
    """

    def __init__(
        self,
        slot: EngineSlot,
        execute: Callable[[Turn, OnAnswered], Awaitable[None]],
        *,
        clock: Clock,
        max_batch_tokens: int,
        payer_of: Callable[[Model], Payer],
        quotas: Quotas,
    ) -> None:
        self._slot = slot
        self._execute = execute
        self._clock = clock
        self._max_batch_tokens = max_batch_tokens
        self._payer_of = payer_of
        self._quotas = quotas
        self._alarm: asyncio.TimerHandle | None = None
        self._shares = Shares()
        self._models: dict[str, Model] = {}
        self._running: set[asyncio.Task[None]] = set()
        self._is_woken = False
        self.is_held = False
        """Whether all turns wait."""
        self.suspects: set[str] = set()
        """Requests that may have killed the engine: while there are any, one request goes at a time."""
        self.take_snapshot: Callable[[Model], None] = lambda model: None
        """Order a snapshot of a model; called when nothing of it runs."""
        self.before_turn: Callable[[], None] = lambda: None
        """Called before every look for a turn."""
        self.admit: Callable[[Model], bool] = lambda model: True
        """Asked of a model whose turn could be next, the longest unserved first: whether its adapter is in the engine.
        If not, it will be, and `wake` follows."""

    def add(self, model: Model) -> None:
        self._models[model.model_id] = model

    def remove(self, model: Model) -> None:
        self._models.pop(model.model_id, None)
        self.suspects.difference_update(model.journaled.values())
        self.wake()  # it may have left room for others

    def wake(self) -> None:
        """Look for work soon; what arrives in the same iteration of the loop can share a batch."""
        if not self._is_woken:
            self._is_woken = True
            asyncio.get_running_loop().call_soon(self._fill)

    async def drain(self) -> None:
        """Wait for the operations that the engine has."""
        while self._running:
            await asyncio.wait(self._running)

    def _fill(self) -> None:
        self._is_woken = False
        most = 1 if self.suspects else MAX_OUTSTANDING
        while self._slot.dead is None and not self.is_held and len(self._running) < most:
            turn = self._next_turn()
            if not turn:
                return
            task = asyncio.create_task(self._run(turn))
            self._running.add(task)
            task.add_done_callback(self._running.discard)
            task.add_done_callback(lambda _: self.wake())

    def _next_turn(self) -> Turn:
        self.before_turn()
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        for model in self._models.values():
            if model.snapshot_due and not model.running and not model.behind_barrier:
                self.take_snapshot(model)
        candidates = [c for model in self._models.values() if (c := self._candidate(model)) is not None]
        counts = pick(candidates, self._max_batch_tokens, self._shares, alone=bool(self.suspects))
        turn: Turn = []
        for model_id, count in counts.items():
            model = self._models.pop(model_id)
            self._models[model_id] = model  # served: last in the rotation
            for _ in range(count):
                work = model.queue.pop(self._clock.monotonic())
                model.pending_tokens -= work.num_tokens
                if not work.is_paid:
                    self._quotas.spend(model.session_id, work.num_tokens)
                model.running.add(work.request_id)
                model.behind_barrier = work.is_barrier
                turn.append((model, work))
        return turn

    def _candidate(self, model: Model) -> Candidate | None:
        self._skip_void(model)
        head = model.queue.head()
        if head is None or not head.is_ready or model.behind_barrier or model.status is ModelStatus.ENDED:
            return None
        if model.snapshot_due:
            return None
        if head.is_barrier and model.running:
            return None
        if self._is_over_quota(model, head) or not self.admit(model):
            return None
        payer = self._payer_of(model)
        room = self._quotas.room(model.session_id)
        tokens = _train_tokens(model, self._max_batch_tokens, room) if head.is_training else ()
        return Candidate(model.model_id, tokens, head.is_step, payer.project, payer.weight)

    def _skip_void(self, model: Model) -> None:
        while (head := model.queue.head()) is not None and head.is_void and head.is_durable:
            model.queue.pop(self._clock.monotonic())
            model.pending_tokens -= head.num_tokens
            self.acquit(head.request_id)

    def acquit(self, request_id: str) -> None:
        """It failed without the engine: it is no suspect any more."""
        self.suspects.discard(request_id)

    def _is_over_quota(self, model: Model, head: Work) -> bool:
        pause = self._quotas.pause(model.session_id) if head.is_training and not head.is_paid else None
        model.over_quota = None if pause is None else pause.reason
        if pause is None:
            return False
        loop = asyncio.get_running_loop()
        if self._alarm is None or self._alarm.when() > loop.time() + pause.seconds:
            if self._alarm is not None:
                self._alarm.cancel()
            self._alarm = loop.call_later(pause.seconds, self.wake)
        return True

    async def _run(self, turn: Turn) -> None:
        try:
            await self._execute(turn, self._answered)
        finally:
            for model, work in turn:
                self._answered(model, work)

    def _answered(self, model: Model, work: Work) -> None:
        if work.request_id not in model.running:
            return
        self.suspects.discard(work.request_id)
        model.running.remove(work.request_id)
        model.used_at = self._clock.monotonic()
        if work.is_barrier:
            model.behind_barrier = False
        self.wake()


def _train_tokens(model: Model, max_tokens: int, room: float) -> tuple[int, ...]:
    """Sizes of the training requests at the head, about as many as could fit; the last may go beyond the quota."""
    sizes: list[int] = []
    total = unpaid = 0
    for work in model.queue.run():
        is_over = total > max_tokens or (unpaid >= room and not work.is_paid)
        if not (work.is_ready and work.is_training) or work.is_void or is_over:
            break
        sizes.append(work.num_tokens)
        total += work.num_tokens
        unpaid += 0 if work.is_paid else work.num_tokens
    return tuple(sizes)
