"""What the dialect can be asked to do: each operation starts its work and gives a receipt, in the order of arrival."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from tinsmith.control.guarded import GuardedControl
from tinsmith.control.requests import ApplyOptimizer, LoadState, ModelRequest, SaveForSampler, SaveState, Submission
from tinsmith.server.bodies import fingerprint
from tinsmith.server.settings import TinkerbellSettings
from tinsmith.server.tinkerbell import schemas, training
from tinsmith.server.tinkerbell.adapters import BASE, AdapterBook
from tinsmith.server.tinkerbell.making import forward_recipe, sample_recipe
from tinsmith.server.tinkerbell.memory import Adapter, Memory, Owner
from tinsmith.server.tinkerbell.rendering import ModelTexts
from tinsmith.server.tinkerbell.results import Asked
from tinsmith.server.tinkerbell.sampling import Drawing
from tinsmith.types.errors import InvalidInput
from tinsmith.types.params import AdamParams

_SCHEME = "tinker://"


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    request_id: str
    model: str
    created: bool = False
    made: asyncio.Future[None] | None = None
    """Ends once the adapter it is about is on disk."""


class Operations:
    """Every method raises `TinsmithError` if nothing was started; what goes wrong later fails the future."""

    def __init__(
        self, control: GuardedControl, settings: TinkerbellSettings, texts: ModelTexts, memory: Memory
    ) -> None:
        self._control = control
        self.texts = texts
        self.book = AdapterBook(control, settings, memory)
        self._drawing = Drawing(control, self.texts)

    @property
    def backend(self) -> str:
        """What computes, and on which kind of device."""
        return f"tinsmith-{self._control.base_models()[0].device}"

    async def durable(self, receipt: Receipt) -> None:
        """Returns once the request, and its adapter, would survive a power failure; tell nobody of it before.

        Raises `StorageError` if it was not taken.
        """
        if receipt.made is not None:
            await asyncio.shield(receipt.made)
        await self._control.durable(Submission(request_id=receipt.request_id))

    # ---- adapters ----

    async def add_lora(self, owner: Owner, body: schemas.AddLoraBody) -> Receipt:
        adapter, receipt = await self.book.create(owner, body)
        if adapter is not None:
            self.texts.warm(adapter.base_model)
        made = None if adapter is None else adapter.made
        return Receipt(request_id=receipt.request_id, model=receipt.model_id or "", made=made)

    async def remove_lora(self, owner: Owner, body: schemas.AdapterBody) -> Receipt:
        adapter = self.book.find(owner, body.model_id)
        receipt, forgotten = self.book.remove(owner, adapter, Asked(model=adapter.name))
        return Receipt(request_id=receipt.request_id, model=adapter.name, made=forgotten)

    # ---- training ----

    async def forward(self, owner: Owner, body: schemas.ForwardBody) -> Receipt:
        return await self._forward(owner, body, forward_only=True)

    async def forward_backward(self, owner: Owner, body: schemas.ForwardBody) -> Receipt:
        return await self._forward(owner, body, forward_only=False)

    async def _forward(self, owner: Owner, body: schemas.ForwardBody, *, forward_only: bool) -> Receipt:
        training.check_forward(body)
        adapter, created = await self.book.find_or_create(owner, body.model_id)
        given = body.loss_fn_inputs
        asked = Asked(model=adapter.name, created=created, kl_coeff=None if given is None else given.kl_coeff)
        recipe = forward_recipe(owner, adapter, body, forward_only=forward_only)
        receipt = self._control.submit_deferred(adapter.model_id, recipe, context=asked)
        return Receipt(request_id=receipt.request_id, model=adapter.name, created=created, made=adapter.made)

    async def optim_step(self, owner: Owner, body: schemas.StepBody) -> Receipt:
        adapter, created = await self.book.find_or_create(owner, body.model_id)
        params = AdamParams(**{name: getattr(body.adam_params, name) for name in AdamParams.model_fields})
        adapter.version += 1
        return self._submit(adapter, ApplyOptimizer(model_id=adapter.model_id, seq_id=0, params=params), created)

    # ---- weights ----

    async def save_weights(self, owner: Owner, body: schemas.SaveBody) -> Receipt:
        adapter = self.book.find(owner, body.model_id)
        save = SaveState(
            model_id=adapter.model_id, seq_id=0, name=body.path, overwrite=True, ttl_seconds=body.ttl_seconds
        )
        return self._submit(adapter, save)

    async def save_weights_for_sampler(self, owner: Owner, body: schemas.SaveBody) -> Receipt:
        adapter = self.book.find(owner, body.model_id)
        save = SaveForSampler(model_id=adapter.model_id, seq_id=0, name=body.path, ttl_seconds=body.ttl_seconds)
        return self._submit(adapter, save)

    async def load_weights(self, owner: Owner, body: schemas.LoadBody) -> Receipt:
        adapter, created = await self.book.find_or_create(owner, body.model_id)
        path = body.path if _SCHEME in body.path else f"{_SCHEME}{adapter.model_id}/weights/{body.path}"
        adapter.version += 1
        load = LoadState(model_id=adapter.model_id, seq_id=0, path=path, optimizer=body.optimizer)
        return self._submit(adapter, load, created)

    # ---- sampling ----

    async def sample(self, owner: Owner, body: schemas.PromptsBody) -> Receipt:
        self._control.permit("sample")
        if (body.model_id is None) == (body.base_model is None):
            raise InvalidInput("give either model_id (an adapter, a base model or a tinker:// path) or base_model")
        name = body.model_id or body.base_model or ""
        bases = (BASE, *(card.name for card in self._control.base_models()))
        if body.model_id is None or name in bases:
            base_model = self.book.base_model(name)
            return self._draw(owner, body, base_model, await self._drawing.fixed_sampler(owner, base_model=base_model))
        if name.startswith(_SCHEME):
            return self._draw(owner, body, name, await self._drawing.fixed_sampler(owner, path=name))
        adapter, created = await self.book.find_or_create(owner, name)
        publication = self._drawing.publish(owner, adapter)
        recipe = sample_recipe(owner, publication.sampler_id, body, name=adapter.name, publication=publication)
        request_id = self._control.start_job(
            "Sample",
            recipe,
            session_id=owner.session_id,
            subject=adapter.model_id,
            context=Asked(model=adapter.name, created=created),
        )
        return Receipt(request_id=request_id, model=adapter.name, created=created, made=adapter.made)

    def _draw(self, owner: Owner, body: schemas.PromptsBody, name: str, sampler_id: str) -> Receipt:
        request_id = self._control.start_job(
            "Sample",
            sample_recipe(owner, sampler_id, body),
            session_id=owner.session_id,
            subject=sampler_id,
            context=Asked(model=name),
        )
        return Receipt(request_id=request_id, model=name)

    # ---- common ----

    def _submit(self, adapter: Adapter, request: ModelRequest, created: bool = False) -> Receipt:
        receipt: Submission = self._control.submit(
            request, fingerprint("tinkerbell", b""), context=Asked(model=adapter.name, created=created)
        )
        return Receipt(request_id=receipt.request_id, model=adapter.name, created=created, made=adapter.made)
