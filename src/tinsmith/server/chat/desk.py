"""The desk of the chat dialects: finds the weights that a model name means, draws from them, keeps the record."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace

import numpy as np

from tinsmith.control.errors import SessionEnded
from tinsmith.control.guarded import GuardedControl
from tinsmith.control.requests import NewSession
from tinsmith.server.bodies import Codecs
from tinsmith.server.chat.asks import Ask, Target
from tinsmith.server.chat.fields import BadField
from tinsmith.server.chat.recorder import Recorder, Visit
from tinsmith.server.chat.tokens import ModelText, load_model_text
from tinsmith.server.errors import brief
from tinsmith.types.errors import InvalidInput, NotFound, ServerError
from tinsmith.types.operations import BaseModelCard
from tinsmith.types.results import DrawnToken, SampledSequence, SampleResponse

CHECKPOINT_SCHEME = "tinker://"


class ChatTexts:
    """Tokenizers and templates of the base models, for all desks of a server: loaded once each, off the event loop."""

    def __init__(self, codecs: Codecs) -> None:
        self.started_at = time.time()
        self._codecs = codecs
        self._loads: dict[str, asyncio.Task[ModelText]] = {}

    async def of(self, card: BaseModelCard) -> ModelText:
        task = self._loads.get(card.name)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = asyncio.create_task(self._codecs.offload(lambda: load_model_text(card)))
            self._loads[card.name] = task
        return await asyncio.shield(task)


class ChatDesk:
    """One per caller. Its samplers live in a session of its own, made anew when it has ended for want of use."""

    def __init__(self, control: GuardedControl, codecs: Codecs, texts: ChatTexts, recorder: Recorder | None) -> None:
        self.started_at = texts.started_at
        self._control = control
        self._codecs = codecs
        self._recorder = recorder
        self._texts = texts
        self._session_id: str | None = None
        self._samplers: dict[str, str] = {}
        """Sampler ids by base model or checkpoint version, in this session."""
        self._numbers = itertools.count()
        self._opening = asyncio.Lock()
        self._draws: set[asyncio.Task[SampleResponse]] = set()
        self._is_draining = False

    # ---- who answers ----

    async def target(self, model: str) -> Target:
        """`model`: a base model, a `tinker://` path (its newest version), or the id of a sampling session.

        Raises `BadField` if there is no such thing, `Unsupported` if it has no tokenizer.
        """
        try:
            if model.startswith(CHECKPOINT_SCHEME):
                row = await self._control.library.find_checkpoint(model)
                card, key = self._card(row.base_model), row.checkpoint_id
                sampler_id = await self._sampler(key, None, row.address)
            elif (base := self._find_card(model)) is not None:
                card = base
                sampler_id = await self._sampler(card.name, card.name, None)
            else:
                card = self._card(self._control.own_sampler(model).base_model)
                sampler_id = model
            digest = self._control.sampler_digest(sampler_id)
        except NotFound as error:
            raise BadField("model", self._unknown(model), code="model_not_found") from error
        except InvalidInput as error:
            raise BadField("model", f"model: {error.message}") from error
        return Target(model=model, sampler_id=sampler_id, digest=digest, card=card, text=await self._texts.of(card))

    def _find_card(self, name: str) -> BaseModelCard | None:
        cards = {card.name: card for card in self._control.base_models()}
        return cards.get(name) or cards.get(name.partition(":")[0])

    def _card(self, name: str) -> BaseModelCard:
        card = self._find_card(name)
        if card is None:
            raise NotFound(f"base model {name!r} is not served")
        return card

    def _unknown(self, model: str) -> str:
        names = ", ".join(card.name for card in self._control.base_models())
        return f"there is no model {brief(model)}; this server has {names}, and any tinker:// path of theirs"

    async def _sampler(self, key: str, base_model: str | None, path: str | None) -> str:
        async with self._opening:
            session_id = await self._live_session()
            if key not in self._samplers:
                self._samplers[key] = await self._control.create_sampling_session(
                    session_id, next(self._numbers), base_model, path
                )
            return self._samplers[key]

    async def _live_session(self) -> str:
        if self._session_id is not None:
            try:
                self._control.heartbeat(self._session_id)
            except SessionEnded:
                self._session_id = None
        if self._session_id is None:
            session = NewSession(tags=("chat",), display_name="requests in the OpenAI and Anthropic dialects")
            self._session_id = await self._control.create_session(session)
            self._samplers.clear()
        return self._session_id

    # ---- drawing ----

    async def draw(
        self, target: Target, ask: Ask, visit: Visit, on_token: Callable[[DrawnToken], None] | None = None
    ) -> SampleResponse:
        """The whole answer, recorded if this server records. Cancelling the wait stops the drawing."""
        response = await self._attend(target, ask, on_token if ask.max_tokens else None)
        if not ask.max_tokens:
            return replace(response, sequences=[_nothing_drawn() for _ in range(ask.num_samples)])
        if self._recorder is not None:
            await self._recorder.write(target, ask, visit, response)
        return response

    async def draw_all(self, target: Target, asks: Sequence[Ask], visit: Visit) -> list[SampleResponse]:
        """As `draw`, for several prompts; the first error stops them all."""
        tasks = [asyncio.create_task(self.draw(target, ask, visit)) for ask in asks]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _attend(self, target: Target, ask: Ask, on_token: Callable[[DrawnToken], None] | None) -> SampleResponse:
        if self._is_draining:
            raise ServerError("the server is stopping")
        task = asyncio.create_task(self._control.draw_samples(ask.request(target), on_token))
        self._draws.add(task)
        try:
            await asyncio.wait({task})
        finally:
            self._draws.discard(task)
            task.cancel()
        if task.cancelled():
            raise ServerError("the server is stopping")
        return task.result()

    async def stream(
        self, target: Target, asks: Sequence[Ask], visit: Visit
    ) -> AsyncIterator[tuple[int, DrawnToken | SampleResponse]]:
        """Tokens of all asks as they are drawn, each with its ask's number; then each ask's whole response.

        Closing the iterator stops the drawing.
        """
        queue: asyncio.Queue[tuple[int, DrawnToken] | tuple[int, asyncio.Task[SampleResponse]]] = asyncio.Queue()
        tasks = []
        for number, ask in enumerate(asks):
            told = _numbered(queue, number)
            task = asyncio.create_task(self.draw(target, ask, visit, told))
            task.add_done_callback(told)
            tasks.append(task)
        num_open = len(tasks)
        try:
            while num_open:
                number, item = await queue.get()
                if isinstance(item, DrawnToken):
                    yield number, item
                else:
                    num_open -= 1
                    yield number, item.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def drain(self) -> None:
        """End what is being drawn: the server stops."""
        self._is_draining = True
        for task in self._draws:
            task.cancel()


def _numbered(
    queue: asyncio.Queue[tuple[int, DrawnToken] | tuple[int, asyncio.Task[SampleResponse]]], number: int
) -> Callable[[DrawnToken | asyncio.Task[SampleResponse]], None]:
    def put(item: DrawnToken | asyncio.Task[SampleResponse]) -> None:
        queue.put_nowait((number, item))  # type: ignore[arg-type]

    return put


def _nothing_drawn() -> SampledSequence:
    return SampledSequence(stop_reason="length", tokens_np=np.zeros(0, np.int64), logprobs_np=np.zeros(0, np.float32))
