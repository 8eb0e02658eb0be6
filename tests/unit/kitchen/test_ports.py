"""What every training backend of the kitchen can do: rows 13 and 15 of the requirements."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tinsmith.kitchen.adapters.noop_training import NoopBackend
from tinsmith.kitchen.adapters.tinker_training import open_backend
from tinsmith.kitchen.ports import SessionSpec, TrainingBackend, adam_params
from tinsmith.models import TINY
from tinsmith.types import AdamParams


def test_row_13_a_bare_number_is_a_learning_rate(backend: NoopBackend) -> None:
    assert adam_params(0.01) == AdamParams(learning_rate=0.01)
    assert adam_params(AdamParams(beta1=0.5)) == AdamParams(beta1=0.5)
    session = backend.start_session(SessionSpec(model="tinsmith/tiny", lora_rank=4, seed=1))
    session.optim_step(0.01).result()
    session.optim_step(AdamParams(learning_rate=0.02)).result()
    assert [params.learning_rate for params in backend.adam_params] == [0.01, 0.02]


async def read_in_every_way(backend: TrainingBackend) -> None:
    session = await asyncio.to_thread(backend.start_session, SessionSpec(model="tinsmith/tiny", lora_rank=4, seed=1))
    stepped = session.optim_step(0.01)
    assert (await stepped).metrics == (await stepped.result_async(60)).metrics == stepped.result(60).metrics
    saved = await asyncio.to_thread(session.save, "once")
    assert (await saved) == (await saved.result_async(60)) == await asyncio.to_thread(saved.result)


def test_row_15_a_pending_operation_can_be_read_from_a_thread_and_awaited(backend: NoopBackend) -> None:
    asyncio.run(read_in_every_way(backend))


def test_row_15_the_same_holds_over_an_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINSMITH_DATA_DIR", str(tmp_path))
    backend = open_backend(base_url="local:", model=TINY)
    try:
        asyncio.run(read_in_every_way(backend))
    finally:
        backend.close()
