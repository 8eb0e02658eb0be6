"""Policies, choosing checkpoints, the executor's rules, the monitor."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.client.fake_tinker import status
from tests.unit.recovery.conftest import Kept, RecoverableTinker
from tinsmith.client import ServiceClient, TrainingClient
from tinsmith.recovery import (
    CheckpointPolicy,
    RecordedCheckpoint,
    RecoveryExecutor,
    RecoveryFailed,
    RecoveryMonitor,
    RecoveryPolicy,
    Trigger,
    WatchedRun,
    select_checkpoint,
)
from tinsmith.types import Checkpoint, TrainingRun

ON = RecoveryPolicy(enabled=True, jitter=0.0)


def checkpoint(step: int, loss: float | None = None, run: str = "r") -> RecordedCheckpoint:
    metrics = {} if loss is None else {"loss": loss}
    return RecordedCheckpoint(path=f"tinker://{run}/weights/c{step}", step=step, metrics=metrics, time=float(step))


# ---- values ----


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_attempts": 0},
        {"backoff_ms": -1},
        {"poll_interval_ms": 1.5},
        {"jitter": 1.0},
        {"checkpoint_strategy": "newest"},
        {"checkpoint_strategy": ("specific",)},
        {"checkpoint_strategy": ("specific", "runs/last")},
        {"triggers": {"nan"}},
        {"stall_ms": 0},
    ],
)
def test_a_policy_names_the_field_that_cannot_work(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RecoveryPolicy(**wrong)


def test_the_defaults_are_those_of_the_roadmap() -> None:
    policy = RecoveryPolicy()
    assert (policy.enabled, policy.max_attempts, policy.backoff_ms, policy.max_backoff_ms) == (False, 3, 5000, 60_000)
    assert (policy.checkpoint_strategy, policy.restore_optimizer, policy.poll_interval_ms) == ("latest", True, 30_000)


def test_waits_double_up_to_their_limit() -> None:
    assert [ON.backoff_s(n) for n in range(6)] == [5.0, 10.0, 20.0, 40.0, 60.0, 60.0]


@pytest.mark.parametrize(
    ("policy", "due"),
    [
        (CheckpointPolicy(save_every=4), [4, 8]),
        (CheckpointPolicy(strategy="all"), [1, 2, 3, 4, 5, 6, 7, 8, 9]),
        (CheckpointPolicy(strategy="epoch", steps_per_epoch=3), [3, 6, 9]),
        (CheckpointPolicy(strategy="last"), []),
        (CheckpointPolicy(strategy="best"), []),
    ],
)
def test_each_strategy_saves_when_it_says(policy: CheckpointPolicy, due: list[int]) -> None:
    assert [step for step in range(1, 10) if policy.is_due(step)] == due


@pytest.mark.parametrize(
    "wrong",
    [
        {"save_every": 0},
        {"save_every": 2.5},
        {"keep_last": 0},
        {"keep_last": "3"},
        {"strategy": "epoch"},
        {"strategy": "often"},
        {"steps_per_epoch": 0},
        {"best_mode": "minimum"},
    ],
)
def test_a_checkpoint_policy_names_what_cannot_work(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        CheckpointPolicy(**wrong)


def test_what_is_recorded_comes_back_from_the_metadata() -> None:
    written = RecordedCheckpoint(
        path="tinker://r/weights/a",
        step=7,
        metrics={"loss": 0.1},
        run_name="n",
        parent="tinker://r/weights/b",
        time=3.0,
    )
    listed = Checkpoint.model_validate(
        {
            "checkpoint_id": "weights/a",
            "checkpoint_type": "training",
            "time": "1970-01-01T00:00:03Z",
            "tinker_path": written.path,
            "user_metadata": {**written.as_metadata(), "mine": "x"},
        }
    )
    assert RecordedCheckpoint.of(listed) == written
    assert RecordedCheckpoint.of(listed.model_copy(update={"user_metadata": None})).step is None


@given(st.dictionaries(st.text(), st.one_of(st.none(), st.booleans(), st.text(), st.integers())))
def test_corrupted_is_always_a_truth_value(extra: dict[str, Any]) -> None:
    told = {
        "training_run_id": "r",
        "base_model": "m",
        "model_owner": "o",
        "is_lora": True,
        "last_request_time": "2026-01-01T00:00:00Z",
    }
    run = TrainingRun.model_validate({**extra, **told, "corrupted": extra.get("corrupted") is True or None})
    assert isinstance(run.corrupted, bool)
    assert run.last_checkpoint is None or isinstance(run.last_checkpoint, Checkpoint)


# ---- choosing ----


def test_latest_is_what_was_saved_last() -> None:
    assert select_checkpoint([checkpoint(5), checkpoint(20), checkpoint(10)], "latest") == (checkpoint(20), "latest")


@pytest.mark.parametrize("word", ["best_loss", "best"])
def test_best_goes_by_the_recorded_loss_and_skips_what_is_no_number(word: Any) -> None:
    known = [checkpoint(5, 0.5), checkpoint(10, 0.2), checkpoint(15, float("nan")), checkpoint(20)]
    assert select_checkpoint(known, word) == (checkpoint(10, 0.2), "best_loss")


def test_best_without_losses_is_the_latest_and_says_so() -> None:
    assert select_checkpoint([checkpoint(5), checkpoint(6)], "best_loss") == (
        checkpoint(6),
        "latest_for_want_of_losses",
    )


def test_a_specific_one_need_not_be_listed_but_must_be_a_path() -> None:
    taken, _ = select_checkpoint([], ("specific", "tinker://other/weights/x"))
    assert taken is not None
    assert taken.path == "tinker://other/weights/x"
    with pytest.raises(ValueError, match="not a checkpoint path"):
        select_checkpoint([], ("specific", "x"))


def test_from_nothing_nothing_is_chosen() -> None:
    assert select_checkpoint([], "latest") == (None, "none")


# ---- the executor ----


class Waits:
    def __init__(self) -> None:
        self.seconds: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)


def saved_run(service: ServiceClient, steps: int = 2) -> tuple[WatchedRun, TrainingClient]:
    client = service.create_lora_training_client("m").result(5)
    for step in range(steps):
        metadata = {"tinsmith.step": str(step), "tinsmith.metric.loss": repr(1.0 / (step + 1))}
        client.save_state(f"c{step}", user_metadata=metadata).result(5)
    return WatchedRun(run_id=client.model_id, service=service), client


def executed(work: Callable[[], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        return await work()

    return asyncio.run(main())


def recover(policy: RecoveryPolicy, run: WatchedRun, kept: Kept, waits: Waits | None = None, **more: Any) -> Any:
    async def work() -> Any:
        executor = RecoveryExecutor(policy, run.service.holder.link.events, sleep=waits or Waits())
        return await executor.recover(run, more.get("trigger", Trigger.CORRUPTED), "a test")

    return executed(work)


def test_a_recovery_tells_its_steps_in_order_and_calls_back(
    service: ServiceClient, server: RecoverableTinker, kept: Kept
) -> None:
    told: list[Any] = []

    async def on_recovery(old: str, client: TrainingClient, taken: RecordedCheckpoint) -> None:
        told.append((old, client.model_id, taken.step))

    run, _ = saved_run(service)
    recovered = recover(RecoveryPolicy(enabled=True, on_recovery=on_recovery), run, kept)
    assert kept.recovery() == ["started", "checkpoint_selected", "client_created", "completed"]
    assert told == [("s1:train:0", "s1:train:1", 1)]
    assert recovered.run_id == "s1:train:1"
    load = server.of("load_weights")[0].body
    assert (load["optimizer"], load["path"]) == (True, "tinker://s1:train:0/weights/c1")
    assert load["user_metadata"] == {"tinsmith.recovered_from": "s1:train:0"}


@pytest.mark.parametrize("restore", [True, False])
def test_the_optimizer_is_restored_or_not_as_the_policy_says(
    service: ServiceClient, server: RecoverableTinker, kept: Kept, restore: bool
) -> None:
    run, _ = saved_run(service)
    recover(RecoveryPolicy(enabled=True, restore_optimizer=restore), run, kept)
    assert server.of("load_weights")[0].body["optimizer"] is restore


@pytest.mark.parametrize(
    ("trigger", "session"), [(Trigger.CORRUPTED, "s1"), (Trigger.DEAD_SESSION, "s2"), (Trigger.STALLED, "s2")]
)
def test_a_new_session_is_opened_where_the_old_one_may_be_the_trouble(
    service: ServiceClient, kept: Kept, trigger: Trigger, session: str
) -> None:
    run, _ = saved_run(service)
    recovered = recover(ON, run, kept, trigger=trigger)
    assert recovered.run_id.partition(":")[0] == session
    if session == "s2":
        recovered.run.service.close().result(5)


def test_waits_double_and_none_follows_the_last_failure(
    service: ServiceClient, server: RecoverableTinker, kept: Kept
) -> None:
    failed: list[Any] = []
    run, _ = saved_run(service)
    server.always["load_weights"] = status(503)
    policy = RecoveryPolicy(enabled=True, jitter=0.0, on_failure=lambda run_id, reason: failed.append((run_id, reason)))
    waits = Waits()
    with pytest.raises(RecoveryFailed, match="503") as failure:
        recover(policy, run, kept, waits)
    assert waits.seconds == [5.0, 10.0]
    assert failure.value.reason == "max_attempts_exceeded"
    assert failed == [("s1:train:0", "max_attempts_exceeded")]
    assert kept.recovery()[-2:] == ["exhausted", "failed"]
    assert "503" in kept.of("recovery.failed")[0].fields["last_error"]


def test_without_a_checkpoint_there_is_one_attempt(service: ServiceClient, kept: Kept) -> None:
    run, _ = saved_run(service, steps=0)
    waits = Waits()
    with pytest.raises(RecoveryFailed) as failure:
        recover(ON, run, kept, waits)
    assert (failure.value.reason, waits.seconds) == ("no_checkpoint", [])
    assert kept.recovery() == ["started", "failed"]


def test_a_mistake_is_not_repeated_once_a_new_session_refuses_it_too(
    service: ServiceClient, server: RecoverableTinker, kept: Kept
) -> None:
    run, _ = saved_run(service)
    policy = RecoveryPolicy(enabled=True, checkpoint_strategy=("specific", "tinker://gone/weights/x"))
    with pytest.raises(RecoveryFailed) as failure:
        recover(policy, run, kept)
    assert failure.value.reason == "user_error"
    assert len(server.of("load_weights")) == 2


def test_a_policy_that_is_off_recovers_nothing(service: ServiceClient, kept: Kept) -> None:
    run, _ = saved_run(service)
    with pytest.raises(RecoveryFailed, match="recovery_disabled"):
        recover(RecoveryPolicy(), run, kept)


def test_one_run_is_recovered_once_at_a_time_and_others_beside_it(
    service: ServiceClient, server: RecoverableTinker, kept: Kept
) -> None:
    runs = [saved_run(service)[0] for _ in range(3)]

    async def work() -> list[Any]:
        executor = RecoveryExecutor(ON, service.holder.link.events)
        asked = [runs[0], runs[0], runs[1], runs[2]]
        return await asyncio.gather(
            *(executor.recover(run, Trigger.CORRUPTED) for run in asked), return_exceptions=True
        )

    outcomes = executed(work)
    assert [getattr(one, "reason", "recovered") for one in outcomes] == [
        "recovered", "already_pending", "recovered", "recovered"
    ]  # fmt: skip


def test_a_callback_that_fails_is_told_and_changes_nothing(
    service: ServiceClient, kept: Kept, caplog: pytest.LogCaptureFixture
) -> None:
    def on_recovery(*_: object) -> None:
        raise KeyError("oops")

    run, _ = saved_run(service)
    assert recover(RecoveryPolicy(enabled=True, on_recovery=on_recovery), run, kept).run_id == "s1:train:1"
    assert kept.recovery()[-1] == "callback_failed"
    assert "oops" in caplog.text


# ---- the monitor ----


def test_a_corrupted_run_is_found_handed_on_once_and_its_heir_is_watched(
    service: ServiceClient, server: RecoverableTinker, kept: Kept
) -> None:
    run, _ = saved_run(service)
    policy = RecoveryPolicy(enabled=True, poll_interval_ms=10)

    async def work() -> list[str]:
        events = service.holder.link.events
        monitor = RecoveryMonitor.start(policy, RecoveryExecutor(policy, events), events)
        monitor.monitor_run(run)
        await asyncio.sleep(0.05)
        assert kept.recovery() == []
        server.corrupted.add(run.run_id)
        for _ in range(100):
            await asyncio.sleep(0.02)
            if monitor.watched == ["s1:train:1"]:
                break
        watched = monitor.watched
        await asyncio.sleep(0.05)
        monitor.stop_monitoring("s1:train:1")
        monitor.stop_monitoring("s1:train:1")
        assert monitor.watched == []
        return watched

    assert executed(work) == ["s1:train:1"]
    assert kept.recovery() == ["detected", "started", "checkpoint_selected", "client_created", "completed"]


def test_polls_that_fail_are_counted_and_trigger_nothing(
    service: ServiceClient, server: RecoverableTinker, kept: Kept
) -> None:
    run, _ = saved_run(service)
    policy = RecoveryPolicy(enabled=True, poll_interval_ms=10)
    for path in ("session_heartbeat", f"training_runs/{run.run_id}"):
        server.always[path] = status(500, None, **{"x-should-retry": "false"})

    async def handle(*_: object) -> None:
        raise AssertionError("nothing was found")

    async def work() -> int:
        monitor = RecoveryMonitor(policy, handle, service.holder.link.events)
        monitor.monitor_run(run)
        await asyncio.sleep(0.3)
        monitor.stop()
        return monitor.poll_errors.get(run.run_id, 0)

    assert executed(work) >= 1
    assert set(kept.recovery()) == {"poll_error"}


def test_a_monitor_that_is_off_says_so(service: ServiceClient) -> None:
    run, _ = saved_run(service)

    async def work() -> None:
        RecoveryMonitor(RecoveryPolicy(), RecoveryExecutor(RecoveryPolicy())).monitor_run(run)

    with pytest.raises(RecoveryFailed, match="recovery_disabled"):
        executed(work)
