"""Readiness by looking: pulses, probes, the disk; and the end of an engine that hangs."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.control.harness import ManualClock
from tinsmith.control.engines import EngineBook
from tinsmith.control.health import ROUND_S, Health
from tinsmith.control.settings import HealthSettings
from tinsmith.runtime.fake import FAKE_CARD, FakeEngine
from tinsmith.types.errors import ServerError
from tinsmith.types.operations import Sample
from tinsmith.types.pulse import PHASES, Pulse

pytestmark = pytest.mark.anyio

PULSE = Pulse(
    number=1,
    slice_s=0.0,
    num_slices=0,
    phase_s=dict.fromkeys(PHASES, 0.0),
    tokens_trained=0,
    tokens_prefilled=0,
    tokens_sampled=0,
    num_training_passes=0,
    num_decode_passes=0,
    num_decode_rows=0,
    training_pass_tokens_max=2048,
    decode_batch_max=256,
    num_running=0,
    num_waiting=0,
    num_adapters=0,
    num_snapshots=0,
    cache_blocks=100,
    cache_blocks_free=100,
    rss_bytes=0,
    device_bytes=0,
)


class Patient(FakeEngine):
    """A fake engine whose pulse the test writes."""

    def __init__(self, name: str = "tinsmith/fake") -> None:
        super().__init__(replace(FAKE_CARD, name=name))
        self.pulse: Pulse | None = PULSE
        self.num_kills = 0

    def kill(self) -> None:
        self.num_kills += 1

    def beat(self, **changes: int | float) -> None:
        assert self.pulse is not None
        self.pulse = replace(self.pulse, **{"number": self.pulse.number + 1, **changes})

    @property
    def num_probes(self) -> int:
        return sum(isinstance(operation, Sample) for operation in self.operations)


class Ward:
    def __init__(self, folder: Path, engines: list[Patient], **settings: float) -> None:
        self.clock = ManualClock()
        self.engines = engines
        self.fail_disk: OSError | None = None
        self.book = EngineBook(engines)
        self.health = Health(
            engines=self.book,
            settings=HealthSettings.model_validate({"is_on": True, "min_free_bytes": 0, **settings}),
            data_dir=folder,
            clock=self.clock,
            write_canary=self._write,
        )

    def _write(self, path: Path) -> None:
        if self.fail_disk is not None:
            raise self.fail_disk

    async def pass_time(self, seconds: float, *, beating: bool = True) -> None:
        for _ in range(round(seconds / ROUND_S)):
            self.clock.advance(ROUND_S)
            for engine in self.engines if beating else ():
                engine.beat()
            self.health.look()
            await asyncio.sleep(0)
            await asyncio.sleep(0)


async def opened(folder: Path, *, names: tuple[str, ...] = ("one",), **settings: float) -> Ward:
    ward = Ward(folder, [Patient(name) for name in names], **settings)
    await ward.book.start()
    await ward.pass_time(1.0)
    return ward


async def test_a_server_is_ready_once_every_engine_has_drawn_a_token(tmp_path: Path) -> None:
    ward = Ward(tmp_path, [Patient("one"), Patient("two")])
    await ward.book.start()
    ward.engines[1].pause()
    await ward.pass_time(1.0)
    assert ward.health.reason() == "the engine of 'two' has not produced a token yet"
    ward.engines[1].resume()
    await ward.pass_time(1.0)
    assert ward.health.reason() is None


async def test_an_idle_engine_draws_one_token_at_times_and_a_busy_one_none(tmp_path: Path) -> None:
    ward = await opened(tmp_path, probe_interval_s=10.0)
    (engine,) = ward.engines
    assert engine.num_probes == 1
    await ward.pass_time(30.0)
    assert engine.num_probes == 4
    for number in range(60):
        engine.beat(num_slices=number + 1, tokens_trained=100 * number)
        await ward.pass_time(0.5, beating=False)
    assert engine.num_probes == 4
    assert ward.health.reason() is None


async def test_a_probe_that_fails_turns_readiness_off_until_one_succeeds(tmp_path: Path) -> None:
    ward = await opened(tmp_path, probe_interval_s=5.0)
    ward.engines[0].fail_next(Sample, ServerError("out of memory"))
    await ward.pass_time(5.0)
    assert ward.health.reason() == "the engine of 'one' could not draw a token: out of memory"
    await ward.pass_time(5.0)
    assert ward.health.reason() is None


async def test_an_engine_that_answers_nothing_is_not_ready_though_its_pulse_goes_on(tmp_path: Path) -> None:
    ward = await opened(tmp_path, probe_interval_s=5.0, token_within_s=20.0)
    ward.engines[0].pause()
    await ward.pass_time(20.0)
    assert ward.health.reason() is None
    await ward.pass_time(1.0)
    assert ward.health.reason() == "the engine of 'one' has produced no token for 21 s"
    ward.engines[0].resume()
    await ward.pass_time(1.0)
    assert ward.health.reason() is None


async def test_silence_turns_readiness_off_and_the_next_pulse_on_again(tmp_path: Path) -> None:
    ward = await opened(tmp_path, silent_after_s=4.0)
    await ward.pass_time(4.0, beating=False)
    assert ward.health.reason() is None
    await ward.pass_time(1.0, beating=False)
    reason = ward.health.reason()
    assert reason == "the engine of 'one' has shown no sign of life for 5 s; is its process stopped?"
    await ward.pass_time(0.5)
    assert ward.health.reason() is None
    assert ward.engines[0].num_kills == 0


async def test_an_engine_that_stays_silent_is_killed_once(tmp_path: Path) -> None:
    ward = await opened(tmp_path, names=("one", "two"), hung_after_s=30.0)
    for _ in range(100):
        ward.engines[1].beat()
        await ward.pass_time(0.5, beating=False)
    assert [engine.num_kills for engine in ward.engines] == [1, 0]
    assert ward.health.reason() == "the engine of 'one' hung and is being ended"


async def test_a_server_that_was_stopped_itself_takes_no_engine_for_hung(tmp_path: Path) -> None:
    ward = await opened(tmp_path, hung_after_s=30.0)
    ward.clock.advance(3600.0)
    await ward.pass_time(1.0, beating=False)
    assert ward.engines[0].num_kills == 0


async def test_a_slice_of_work_may_be_long_but_not_endless(tmp_path: Path) -> None:
    ward = await opened(tmp_path, slow_after_s=120.0, stuck_after_s=600.0)
    (engine,) = ward.engines
    engine.beat(slice_s=119.0)
    await ward.pass_time(0.5)
    assert ward.health.reason() is None
    engine.beat(slice_s=130.0)
    await ward.pass_time(0.5)
    assert ward.health.reason() == "the engine of 'one' has been in one slice of work for 130 s"
    assert engine.num_kills == 0
    engine.beat(slice_s=601.0)
    await ward.pass_time(0.5)
    assert engine.num_kills == 1


async def test_a_disk_that_cannot_be_written_turns_readiness_off(tmp_path: Path) -> None:
    ward = await opened(tmp_path)
    ward.fail_disk = OSError(5, "Input/output error")
    await ward.health.try_disk()
    assert ward.health.reason() == f"the data folder {str(tmp_path)!r} cannot be written: Input/output error"
    ward.fail_disk = None
    await ward.health.try_disk()
    assert ward.health.reason() is None
    assert ward.health.disk.fsync_s is not None


async def test_a_disk_without_room_is_full_before_writes_fail(tmp_path: Path) -> None:
    ward = await opened(tmp_path, min_free_bytes=2**60)
    await ward.health.try_disk()
    assert "is full" in str(ward.health.reason())


async def test_nothing_is_watched_unless_it_is_asked_for(tmp_path: Path) -> None:
    ward = Ward(tmp_path, [Patient()], is_on=False)
    await ward.book.start()
    await ward.health.start()
    assert ward.health.reason() is None
    assert ward.engines[0].num_probes == 0
    await ward.health.close()
