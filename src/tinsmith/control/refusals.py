"""How a model's requests fail that cannot be done because its adapter cannot be brought back."""

from __future__ import annotations

from dataclasses import dataclass

from tinsmith.control import records
from tinsmith.control.errors import ModelEnded
from tinsmith.control.futures import FutureStore
from tinsmith.control.identity import Clock
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
    clock: Clock

    def fail_waiting(self, model: Model, error: TinsmithError) -> None:
        """What waits in order fails, for this time; a model that does not exist yet never will."""
        if model.status is ModelStatus.CREATING:
            self.futures.fail(model.creation_request_id, error)
            self.training.end_model(model, ModelEnded(f"model {model.model_id!r} could not be created: {error}"))
            return
        failed = []
        while (work := model.queue.head()) is not None:
            model.queue.pop(self.clock.monotonic())
            model.pending_tokens -= work.num_tokens
            self.futures.fail(work.request_id, error)
            self.training.scheduler(slot_of(model)).acquit(work.request_id)
            failed.append(mark_failed("request", work.request_id, error))
        self.samplers.settle_all_of(model.model_id)
        self.journal.note(failed)  # a replay shall not do them either

    def end_lost(self, model: Model, error: TinsmithError) -> None:
        """Nothing can be done for it any more; its record says so."""
        self.training.end_model(model, error)
        model.is_corrupted = True
        self.registry.post(lambda c: records.update_run(c, model.model_id, corrupted=True))
