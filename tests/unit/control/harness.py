"""Short words for what the tests of control ask again and again."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from dataclasses import dataclass
from typing import Any

from tinsmith.control.futures import Outcome, Pending
from tinsmith.control.identity import SignedIds
from tinsmith.control.requests import (
    ApplyOptimizer,
    CreateModel,
    DrawSamples,
    ForwardBackward,
    ModelRequest,
    NewSession,
    SampleRequest,
    Submission,
)
from tinsmith.control.service import Control
from tinsmith.runtime.fake import FakeEngine
from tinsmith.types import AdamParams, Datum, LoraConfig, ModelInput, SamplingParams
from tinsmith.types.errors import TinsmithError
from tinsmith.types.operations import TrainItem

TIMEOUT_S = 5.0


class ManualClock:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class CountedIds(SignedIds):
    """Names and seeds that count up; a new process (a new instance) starts at another hundred."""

    _processes = itertools.count(1)

    def __init__(self, key: bytes) -> None:
        number = next(self._processes)
        super().__init__(key, number.to_bytes(4, "big"))
        self._numbers = itertools.count(100 * number)

    def session_id(self) -> str:
        return f"sess-{next(self._numbers)}"

    def checkpoint_id(self) -> str:
        return f"ckpt-{next(self._numbers)}"

    def seed(self) -> int:
        return next(self._numbers)


def datum(first: int = 1, length: int = 3) -> Datum:
    tokens = [first + i for i in range(length)]
    return Datum(ModelInput.from_ints(tokens), {"target_tokens": [t + 1 for t in tokens], "weights": [1.0] * length})


def forward_backward(model_id: str, seq_id: int, *, first: int = 1, length: int = 3, **kwargs: Any) -> ForwardBackward:
    values = {"data": (datum(first, length),), "loss_fn": "cross_entropy"} | kwargs
    return ForwardBackward(model_id=model_id, seq_id=seq_id, **values)


def optim(model_id: str, seq_id: int, **params: float) -> ApplyOptimizer:
    return ApplyOptimizer(model_id=model_id, seq_id=seq_id, params=AdamParams(**params))


def draw(sampler_id: str, seq_id: int = 0, **kwargs: Any) -> DrawSamples:
    params = kwargs.pop("params", SamplingParams(max_tokens=4, seed=1))
    values = {"prompt": ModelInput.from_ints([1, 2, 3]), "num_samples": 1, "params": params} | kwargs
    return DrawSamples(sampling_session_id=sampler_id, seq_id=seq_id, **values)


@dataclass
class Harness:
    control: Control
    engine: FakeEngine
    clock: ManualClock

    async def session(self) -> str:
        return await self.control.create_session(NewSession())

    async def model(self, session_id: str | None = None, n: int = 0, **kwargs: Any) -> str:
        """The id of a new, live model."""
        receipt = await self.create(session_id or await self.session(), n, **kwargs)
        outcome = await self.outcome(receipt)
        assert outcome.error is None, outcome.error
        assert receipt.model_id is not None
        return receipt.model_id

    async def create(self, session_id: str, n: int = 0, **kwargs: Any) -> Submission:
        values = {"base_model": "tinsmith/fake", "lora_config": LoraConfig(rank=4, seed=7)} | kwargs
        return await self.control.create_model(CreateModel(session_id=session_id, model_seq_id=n, **values))

    def submit(self, request: ModelRequest, payload: str | None = None) -> Submission:
        return self.control.submit(request, fingerprint(request if payload is None else payload))

    def sample(self, request: SampleRequest) -> Submission:
        return self.control.submit_sample(request, fingerprint(request))

    async def outcome(self, receipt: Submission) -> Outcome:
        outcome = await self.control.wait_future(receipt.request_id, TIMEOUT_S)
        assert isinstance(outcome, Outcome), outcome
        return outcome

    async def result(self, receipt: Submission) -> Any:
        outcome = await self.outcome(receipt)
        assert outcome.error is None, outcome.error
        return outcome.result

    async def error(self, receipt: Submission) -> TinsmithError:
        outcome = await self.outcome(receipt)
        assert outcome.error is not None, outcome.result
        return outcome.error

    async def is_pending(self, receipt: Submission) -> bool:
        return isinstance(await self.control.wait_future(receipt.request_id, 0), Pending)

    async def settle(self) -> None:
        """Let everything happen that waits for nothing but its turn in the event loop."""
        for _ in range(20):
            await asyncio.sleep(0)

    def batches(self) -> list[list[tuple[str, int]]]:
        """Of the training requests the engine was given together: model and first token of each."""
        return [
            [(item.model_id, item.data[0].model_input.to_ints()[0]) for item in burst if isinstance(item, TrainItem)]
            for burst in self.engine.bursts
            if isinstance(burst[0], TrainItem)
        ]

    def asked(self, operation_type: type) -> list[Any]:
        return [operation for operation in self.engine.operations if type(operation) is operation_type]


def fingerprint(payload: object) -> bytes:
    return hashlib.sha256(repr(payload).encode()).digest()
