"""How a model's requests fail that cannot be done because its adapter cannot be brought back."""

from __future__ import annotations

from dataclasses import dataclass

from tinsmith.control import records
from tinsmith.control.errors import ModelEnded
from tinsmith.control.futures import FutureStore
from tinsmith.control.journal import Journal
from tinsmith.control.ledger import mark_failed
from tinsmith.control.models import Model, ModelStatus, slot_of
from tinsmith.control.registry import Registry
from tinsmith.control.samplers import SamplerBook
from tinsmith.control.training import Training
from tinsmith.types.errors import TinsmithError


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusals:
    training: Training
    futures: FutureStore
    journal: Journal
    registry: Registry
    samplers: SamplerBook

    def fail_waiting(self, model: Model, error: TinsmithError) -> None:
        """What waits in order fails, for this time; a model that does not exist yet never will. What was answered and
        is done again stays in the queue: without it the model would be another."""
        if model.status is ModelStatus.CREATING and self._is_open(model.creation_request_id):
            self.futures.fail(model.creation_request_id, error)
            self.training.end_model(model, ModelEnded(f"model {model.model_id!r} could not be created: {error}"))
            return
        failed = []
        for work in model.queue.run():
            if work.is_void or not self._is_open(work.request_id):
                continue
            work.is_void = True
            self.futures.fail(work.request_id, error)
            self.training.scheduler(slot_of(model)).acquit(work.request_id)
            failed.append(mark_failed("request", work.request_id, error))
        self.samplers.settle_all_of(model.model_id)
        self.journal.note(failed)  # a replay shall not do them either

    def _is_open(self, request_id: str) -> bool:
        return self.futures.knows(request_id) and self.futures.ended(request_id) is None

    def end_lost(self, model: Model, error: TinsmithError) -> None:
        """Nothing can be done for it any more; its record says so."""
        self.training.end_model(model, error)
        model.is_corrupted = True
        self.registry.post(lambda c: records.update_run(c, model.model_id, corrupted=True))
