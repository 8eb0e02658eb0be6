"""The loop: the right step, the right data, and an end to what cannot be helped."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from tests.unit.client.fake_tinker import no_connection, status, until
from tests.unit.recovery.conftest import Kept, RecoverableTinker
from tinsmith.client import APIConnectionError, ServiceClient
from tinsmith.recovery import CheckpointPolicy, Job, JobStatus, Recovery, RecoveryFailed, RecoveryPolicy, Step, Trigger
from tinsmith.recovery.work import run_job
from tinsmith.types import AdamParams

ON = RecoveryPolicy(enabled=True, backoff_ms=10, jitter=0.0, poll_interval_ms=60_000)


def start(service: ServiceClient, policy: RecoveryPolicy = ON, **checkpoints: Any) -> Recovery:
    return Recovery.start(
        service, policy=policy, checkpoints=CheckpointPolicy(**{"save_every": 3, **checkpoints}), base_model="m"
    )


def train(step: Step[float]) -> None:
    """The batch is the learning rate, so the fake server's state tells which batches are in the weights."""
    step.client.optim_step(AdamParams(learning_rate=step.batch)).result(5)
    step.report(loss=10.0 - step.number)


def data(position: int) -> float:
    return float(position)


def test_an_undisturbed_run_takes_every_step_once(service: ServiceClient, server: RecoverableTinker) -> None:
    with start(service) as recovery:
        for step in recovery.steps(7, data):
            with step:
                train(step)
        assert recovery.done == 7
        assert server.state[recovery.run_id] == [0, 1, 2, 3, 4, 5, 6]
        assert [one.step for one in recovery.checkpoints] == [0, 3, 6, 7]


@pytest.mark.parametrize("trouble", ["corrupted", "gone", "dead_sessions"])
def test_a_run_in_trouble_goes_on_after_its_checkpoint(
    service: ServiceClient, server: RecoverableTinker, trouble: str
) -> None:
    troubled = False
    with start(service) as recovery:
        for step in recovery.steps(8, data):
            with step:
                if step.number == 5 and not troubled:
                    troubled = True
                    getattr(server, trouble).add(recovery.run_id if trouble != "dead_sessions" else "s1")
                train(step)
        assert server.state[recovery.run_id] == [0, 1, 2, 3, 4, 5, 6, 7]
        (change,) = recovery.lineage
    assert change.trigger == {
        "corrupted": Trigger.CORRUPTED, "gone": Trigger.LOST_MODEL, "dead_sessions": Trigger.DEAD_SESSION
    }[trouble]  # fmt: skip
    assert (change.at_step, change.checkpoint.step) == (4, 3)


def test_a_loss_that_is_no_number_goes_back_too(service: ServiceClient, server: RecoverableTinker) -> None:
    losses = iter([1.0, 1.0, 1.0, float("nan"), 1.0, 1.0])
    with start(service) as recovery:
        for step in recovery.steps(5, data):
            with step:
                step.client.optim_step(AdamParams(learning_rate=step.batch)).result(5)
                step.report(loss=next(losses))
        assert server.state[recovery.run_id] == [0, 1, 2, 3, 4]
        assert [change.trigger for change in recovery.lineage] == [Trigger.NAN_LOSS]


def test_a_step_that_fails_again_and_again_ends_the_run(service: ServiceClient, kept: Kept) -> None:
    with start(service) as recovery:
        with pytest.raises(RecoveryFailed, match="step 2 has failed 4 times") as failure:
            run_with_nan_at(recovery, 2)
    assert failure.value.reason == "max_attempts_exceeded"
    assert kept.recovery().count("completed") == 3


def run_with_nan_at(recovery: Recovery, number: int) -> None:
    for step in recovery.steps(5, data):
        with step:
            train(step)
            step.report(loss=float("nan") if step.number == number else 1.0)


def test_the_users_own_errors_pass_through(service: ServiceClient, kept: Kept) -> None:
    with start(service) as recovery:
        with pytest.raises(ZeroDivisionError):
            divide_in(recovery)
        assert recovery.done == 0
    assert kept.recovery() == []


def divide_in(recovery: Recovery) -> None:
    for step in recovery.steps(2):
        with step:
            _ = 1 / 0


@pytest.mark.parametrize("policy", [RecoveryPolicy(), RecoveryPolicy(enabled=True, triggers=frozenset())])
def test_what_the_policy_does_not_name_passes_through(
    service: ServiceClient, server: RecoverableTinker, policy: RecoveryPolicy
) -> None:
    with start(service, policy) as recovery:
        server.corrupted.add(recovery.run_id)
        with pytest.raises(Exception, match="refuses"):
            run_all(recovery)
        assert recovery.lineage == []


def run_all(recovery: Recovery, num_steps: int = 4) -> None:
    for step in recovery.steps(num_steps, data):
        with step:
            train(step)


def test_a_stalled_step_is_ended_and_taken_again(service: ServiceClient, server: RecoverableTinker) -> None:
    gate = threading.Event()
    policy = RecoveryPolicy(enabled=True, backoff_ms=10, poll_interval_ms=60_000, stall_ms=300)
    with start(service, policy) as recovery:
        for step in recovery.steps(4, data):
            with step:
                if step.number == 2 and not recovery.lineage:
                    server.script("retrieve_future", until(gate))
                train(step)
        gate.set()
        assert [change.trigger for change in recovery.lineage] == [Trigger.STALLED]
        assert server.state[recovery.run_id] == [0, 1, 2, 3]


def test_a_lost_connection_is_waited_for_and_then_recovered_from(
    service: ServiceClient, server: RecoverableTinker
) -> None:
    with start(service) as recovery:
        for step in recovery.steps(4, data):
            with step:
                if step.number == 2 and not recovery.lineage:
                    server.script("optim_step", *[no_connection()] * 60)
                    with pytest.raises(APIConnectionError) as failure:
                        train(step)
                    server.scripts["optim_step"].clear()
                    raise failure.value
                train(step)
        assert [change.trigger for change in recovery.lineage] == [Trigger.LOST_CONNECTION]
        assert server.state[recovery.run_id] == [0, 1, 2, 3]


def test_a_checkpoint_that_fails_is_a_failure_of_its_own(service: ServiceClient, server: RecoverableTinker) -> None:
    with start(service) as recovery:
        for step in recovery.steps(6, data):
            with step:
                train(step)
                if step.number == 3 and not recovery.lineage:
                    server.script("save_weights", status(503, None, **{"x-should-retry": "false"}))
        assert [(change.trigger, change.checkpoint.step) for change in recovery.lineage] == [
            (Trigger.SERVER_FAILURE, 0)
        ]
        assert server.state[recovery.run_id] == [0, 1, 2, 3, 4, 5]


def test_only_the_newest_and_the_best_checkpoints_stay(service: ServiceClient, server: RecoverableTinker) -> None:
    losses = [5.0, 1.0, 4.0, 3.0, 2.0, 2.5]
    with start(service, strategy="all", keep_last=2) as recovery:
        for step in recovery.steps(6, data):
            with step:
                train(step)
                step.report(loss=losses[step.index])
        assert [one.step for one in recovery.checkpoints] == [2, 5, 6]
    assert sorted(path.rpartition("-")[2] for path in server.stored) == ["00000002", "00000005", "00000006"]


def test_best_loss_goes_back_to_the_best_and_trains_on_from_there(
    service: ServiceClient, server: RecoverableTinker
) -> None:
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.0, 5: 2.0}
    policy = RecoveryPolicy(enabled=True, checkpoint_strategy="best_loss", backoff_ms=10, poll_interval_ms=60_000)
    with start(service, policy, strategy="all") as recovery:
        for step in recovery.steps(5, data):
            with step:
                if step.number == 5 and not recovery.lineage:
                    server.corrupted.add(recovery.run_id)
                train(step)
                step.report(loss=losses[step.number])
        (change,) = recovery.lineage
        assert (change.at_step, change.checkpoint.step, change.checkpoint.loss) == (4, 2, 1.0)
        assert server.state[recovery.run_id] == [0, 1, 2, 3, 4]


def test_a_second_trouble_before_a_checkpoint_goes_back_to_the_ancestors(
    service: ServiceClient, server: RecoverableTinker
) -> None:
    with start(service) as recovery:
        for step in recovery.steps(5, data):
            with step:
                if step.number == 5 and len(recovery.lineage) < 2:
                    server.corrupted.add(recovery.run_id)
                train(step)
        assert [change.checkpoint.step for change in recovery.lineage] == [3, 3]
        assert server.state[recovery.run_id] == [0, 1, 2, 3, 4]


def test_the_same_loop_with_async_with(service: ServiceClient, server: RecoverableTinker) -> None:
    async def main(recovery: Recovery) -> None:
        async for step in recovery.steps_async(6, data):
            async with step:
                if step.number == 5 and not recovery.lineage:
                    server.corrupted.add(recovery.run_id)
                await step.client.optim_step(AdamParams(learning_rate=step.batch))
                step.report(loss=1.0)

    with start(service) as recovery:
        asyncio.run(main(recovery))
        assert server.state[recovery.run_id] == [0, 1, 2, 3, 4, 5]
        assert len(recovery.lineage) == 1


def test_a_monitor_beside_the_loop_ends_a_step_that_looked_well(
    service: ServiceClient, server: RecoverableTinker, kept: Kept
) -> None:
    policy = RecoveryPolicy(enabled=True, backoff_ms=10, poll_interval_ms=20)
    with start(service, policy) as recovery:
        for step in recovery.steps(4, data):
            with step:
                train(step)
                if step.number == 2 and not recovery.lineage:
                    server.corrupted.add(recovery.run_id)
                    wait_for_detection(kept)
        assert server.state[recovery.run_id] == [0, 1, 2, 3]
        assert len(recovery.lineage) == 1
    assert kept.recovery().count("detected") == 1


def wait_for_detection(kept: Kept) -> None:
    for _ in range(200):
        if "detected" in kept.recovery():
            break
        threading.Event().wait(0.01)
    threading.Event().wait(0.05)


def test_what_is_to_end_the_program_ends_the_loop_whatever_was_noticed(
    service: ServiceClient, server: RecoverableTinker, kept: Kept
) -> None:
    policy = RecoveryPolicy(enabled=True, backoff_ms=10, poll_interval_ms=20)
    with start(service, policy) as recovery:
        with pytest.raises(KeyboardInterrupt):
            interrupt_once_noticed(recovery, server, kept)
        assert recovery.lineage == []


def interrupt_once_noticed(recovery: Recovery, server: RecoverableTinker, kept: Kept) -> None:
    for step in recovery.steps(4, data):
        with step:
            server.corrupted.add(recovery.run_id)
            wait_for_detection(kept)
            raise KeyboardInterrupt


def specific(path: str) -> RecoveryPolicy:
    return RecoveryPolicy(
        enabled=True, checkpoint_strategy=("specific", path), backoff_ms=10, jitter=0.0, poll_interval_ms=60_000
    )


def test_a_named_checkpoint_is_resumed_and_recovered_from_after_its_own_step(
    service: ServiceClient, server: RecoverableTinker
) -> None:
    with start(service) as first:
        run_all(first, 7)
        path = first.checkpoints[1].path
    with Recovery.resume(service, name="another", policy=specific(path), base_model="m") as recovery:
        assert recovery.done == 3
        for step in recovery.steps(5, data):
            with step:
                if step.number == 5 and not recovery.lineage:
                    server.corrupted.add(recovery.run_id)
                train(step)
        assert [change.checkpoint.step for change in recovery.lineage] == [3]
        assert server.state[recovery.run_id] == [0, 1, 2, 3, 4]


def test_a_checkpoint_without_a_step_is_not_resumed_from(service: ServiceClient) -> None:
    training = service.create_lora_training_client("m").result(5)
    path = training.save_state("by-hand").result(5).path
    with pytest.raises(RecoveryFailed, match="does not say after which step"):
        Recovery.resume(service, name="mine", policy=specific(path), base_model="m")


def test_a_finished_run_can_be_resumed_and_extended(service: ServiceClient, server: RecoverableTinker) -> None:
    for target in (4, 4, 6):
        with Recovery.resume(service, name="mine", policy=ON, base_model="m") as recovery:
            run_all(recovery, target)
            assert server.state[recovery.run_id] == [float(n) for n in range(target)]


def test_a_branch_that_a_recovery_went_back_from_is_not_resumed(
    service: ServiceClient, server: RecoverableTinker
) -> None:
    best = RecoveryPolicy(enabled=True, backoff_ms=10, checkpoint_strategy="best_loss", poll_interval_ms=60_000)
    with start(service, best, save_every=1) as recovery:
        for step in recovery.steps(5, data):
            with step:
                if step.number == 5:
                    server.corrupted.add(recovery.run_id)
                train_worse_after_the_first(step)
            if step.number == 2 and recovery.lineage:
                break
        assert [change.checkpoint.step for change in recovery.lineage] == [1]
        alive, name = recovery.run_id, recovery.name
    with Recovery.resume(service, name=name, policy=ON, base_model="m") as resumed:
        assert resumed.done == 2
        assert resumed.checkpoints[0].run_id == alive


def train_worse_after_the_first(step: Step[float]) -> None:
    step.client.optim_step(AdamParams(learning_rate=step.batch)).result(5)
    step.report(loss=float(step.number))


def test_data_may_be_a_sequence_that_starts_again(service: ServiceClient, server: RecoverableTinker) -> None:
    with start(service) as recovery:
        for step in recovery.steps(5, [7.0, 8.0]):
            with step:
                train(step)
        assert server.state[recovery.run_id] == [7, 8, 7, 8, 7]


# ---- jobs ----


def test_a_job_runs_under_the_policies_it_orders(service: ServiceClient, server: RecoverableTinker) -> None:
    order = {
        "kind": "training_step",
        "payload": {"base_model": "m", "num_steps": 4, "checkpoint_policy": {"strategy": "steps", "save_every": 2}},
        "constraints": {"retry_policy": {"max_attempts": 2, "backoff_type": "exponential", "backoff_ms": 10}},
    }
    job = Job.of(order)
    assert job.recovery_policy().max_attempts == 2

    def body(step: Step[None]) -> None:
        if step.number == 3 and step.client.model_id == "s1:train:0":
            server.corrupted.add("s1:train:0")
        step.client.optim_step(AdamParams(learning_rate=float(step.index))).result(5)
        step.report(loss=1.0)

    result = run_job(job, service, body)
    assert result.status is JobStatus.SUCCEEDED
    assert result.status.is_final
    assert result.run_ids == ("s1:train:0", "s1:train:1")
    assert server.state["s1:train:1"] == [0, 1, 2, 3]
    assert result.checkpoint == "tinker://s1:train:1/weights/recovery-00000004"


def test_a_job_that_cannot_be_done_says_why(service: ServiceClient, server: RecoverableTinker) -> None:
    def body(step: Step[None]) -> None:
        step.report(loss=float("inf"))

    job = Job.of({"payload": {"base_model": "m"}, "retry_policy": {"backoff_ms": 1}})
    result = run_job(job, service, body)
    assert result.status is JobStatus.FAILED
    assert result.error is not None
    assert result.error["type"] == "recovery_failed"


def test_unknown_fields_of_a_job_are_errors() -> None:
    with pytest.raises(ValueError, match="bse_model"):
        Job.of({"payload": {"bse_model": "m"}})
