"""The workflow engine: constructs, order, failure, going on. Ids of the requirements are in the names."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tinsmith.kitchen.context import Context
from tinsmith.kitchen.errors import ConfigError, StageError, ValidationError, WorkflowError
from tinsmith.kitchen.plan import describe, mermaid
from tinsmith.kitchen.recipe import Recipe
from tinsmith.kitchen.running import RunResult, run
from tinsmith.kitchen.stage import Stage
from tinsmith.kitchen.telemetry import Event, attach_telemetry, detach_telemetry
from tinsmith.kitchen.workflow import (
    StageNode,
    Workflow,
    async_loop,
    conditional,
    loop,
    parallel,
    stage,
    stream_loop,
    sub_workflow,
    workflow,
)


def note(text: str) -> Any:
    """A stage that writes a line; `{steps_index}` and the like are filled in from the state."""

    def write(ctx: Context) -> Context:
        return ctx.put(log=(*ctx.get_state("log", ()), text.format(**ctx.state)))

    return write


def log_of(flow: Workflow, config: Mapping[str, Any] | None = None, **more: Any) -> list[str]:
    return list(run(flow, config, **more).context.state.log)


class Failing(Stage):
    def execute(self, ctx: Context) -> Any:
        raise ZeroDivisionError("oh")


def test_ck_04_05_loops_and_conditions_nest_and_take_lambdas() -> None:
    flow = workflow(
        "nested",
        loop("epochs", over=lambda ctx: range(ctx.config.epochs))(
            loop("steps", over=lambda ctx: ctx.config.data)(
                stage("note", note("{epochs_index}.{steps_index}={steps_current}")),
                conditional(lambda ctx: ctx.state.steps_index == 1)(stage("odd", note("odd"))).otherwise(
                    stage("even", note("even"))
                ),
            ),
        ),
        stage("end", note("end")),
    )
    assert log_of(flow, {"epochs": 2, "data": ["a", "b"]}) == [
        "0.0=a", "even", "0.1=b", "odd", "1.0=a", "even", "1.1=b", "odd", "end",
    ]  # fmt: skip
    assert log_of(flow, {"epochs": 0, "data": []}) == ["end"]


def test_ck_06_loop_state_is_restored_after_a_nested_loop_of_the_same_name() -> None:
    flow = workflow(
        "same",
        loop("steps", over=lambda _: "ab")(
            conditional(lambda _: True)(
                loop("inner", over=lambda _: [1])(stage("n", note("{steps_current}{inner_current}"))),
            ),
            sub_workflow(
                "sub", workflow("again", loop("steps", over=lambda _: [7])(stage("n", note("{steps_current}"))))
            ),
            stage("after", note("{steps_current}")),
        ),
    )
    result = run(flow)
    assert result.context.state.log == ("a1", "7", "a", "b1", "7", "b")
    assert "steps_current" not in result.context.state


def test_ck_07_parallel_branches_run_at_once_and_merge_in_their_order() -> None:
    running: list[int] = []
    most: list[int] = []

    async def busy(ctx: Context) -> Context:
        running.append(1)
        most.append(len(running))
        await asyncio.sleep(0.02 / (1 + ctx.path[-1].index))  # type: ignore[operator]
        running.pop()
        return ctx.put(**{f"made_{ctx.path[-1].index}": True}).record_metric("branch", ctx.path[-1].index or 0)

    flow = workflow("p", parallel("both", *(stage("busy", busy) for _ in range(4)), max_concurrency=2))
    result = run(flow)
    assert max(most) == 2
    assert [metric.value for metric in result.metrics] == [0, 1, 2, 3]
    assert all(result.context.state[f"made_{number}"] for number in range(4))


def test_ck_07_blocking_stages_in_parallel_take_threads() -> None:
    flow = workflow("p", parallel("both", *(stage("nap", lambda ctx: time.sleep(0.1)) for _ in range(3))))
    assert run(flow).duration_ms < 280


@pytest.mark.parametrize(("policy", "error"), [("halt", StageError), ("finish", StageError), ("skip", None)])
def test_ck_07_a_failing_branch_follows_the_policy(policy: Any, error: type[Exception] | None) -> None:
    flow = workflow("p", parallel("both", stage("bad", Failing), stage("ok", note("ok")), on_error=policy))
    if error is None:
        assert log_of(flow) == ["ok"]
    else:
        with pytest.raises(error, match=r"stage both\[0\]/bad: oh"):
            run(flow)


def test_ck_07_branches_that_contradict_each_other_are_an_error() -> None:
    flow = workflow("p", parallel("both", stage("a", lambda _: {"x": 1}), stage("b", lambda _: {"x": 2})))
    with pytest.raises(WorkflowError, match="two branches of parallel 'both' put different values under 'x'"):
        run(flow)
    assert run(flow, raises=False).status == "failed"


def test_ck_07_a_stream_loop_fetches_ahead() -> None:
    fetched: list[int] = []

    def source(_: Context) -> Iterator[int]:
        for number in range(6):
            fetched.append(number)
            yield number

    async def body(ctx: Context) -> Context:
        await asyncio.sleep(0.01)
        return ctx.put(ahead=(*ctx.get_state("ahead", ()), len(fetched) - ctx.state.items_index - 1))

    ahead = run(workflow("s", stream_loop("items", over=source, prefetch=2)(stage("b", body)))).context.state.ahead
    assert max(ahead[:3]) in (2, 3)
    assert ahead[-1] == 0


def test_ck_07_a_stream_loop_tells_what_its_source_failed_with() -> None:
    def source(_: Context) -> Iterator[int]:
        yield 1
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        run(workflow("s", stream_loop("items", over=source)(stage("b", note("x")))))


def test_ck_07_an_async_loop_produces_beside_its_body_from_the_newest_context() -> None:
    seen: list[tuple[int, int]] = []

    async def produce(ctx: Context, index: int) -> int:
        seen.append((index, len(ctx.get_state("log", ()))))
        await asyncio.sleep(0)
        return index * 10

    flow = workflow(
        "a",
        async_loop(
            "rollouts", producer=produce, stop_when=lambda ctx: len(ctx.get_state("log", ())) == 8, buffer_size=2
        )(stage("n", note("{rollouts_current}")), stage("rest", _rest)),
    )
    assert log_of(flow) == [str(number * 10) for number in range(8)]
    assert all(0 <= index - known <= 4 for index, known in seen), seen
    assert any(known > 0 for _, known in seen)


async def _rest(ctx: Context) -> None:
    await asyncio.sleep(0.002)


def test_ck_07_retry_skip_and_timeout_of_a_stage() -> None:
    attempts: list[int] = []

    def flaky(ctx: Context) -> None:
        attempts.append(1)
        if len(attempts) < 3:
            raise OSError("not yet")

    async def slow(ctx: Context) -> None:
        await asyncio.sleep(5)

    flow = workflow(
        "r",
        stage("flaky", flaky, retries=2),
        stage("optional", Failing, on_error="skip"),
        stage("late", slow, timeout_s=0.01, on_error="skip"),
        stage("end", note("end")),
    )
    assert log_of(flow) == ["end"]
    assert len(attempts) == 3


class Recorded(Stage):
    """Writes the order of its hooks into a list shared by the test."""

    calls: list[str] = []

    def before(self, ctx: Context) -> None:
        self.calls.append(f"before {ctx.current_stage}")

    async def execute(self, ctx: Context) -> Context:
        self.calls.append(f"execute {ctx.current_stage}")
        return ctx.put(last=ctx.current_stage)

    def after(self, ctx: Context) -> None:
        self.calls.append(f"after {ctx.current_stage}")

    def on_error(self, ctx: Context, error: Exception) -> None:
        self.calls.append(f"on_error {ctx.current_stage} {error}")

    def rollback(self, ctx: Context) -> None:
        self.calls.append(f"rollback {ctx.current_stage}")

    def cleanup(self, ctx: Context) -> None:
        self.calls.append(f"cleanup {ctx.current_stage}")


class RecordedFailing(Recorded):
    async def execute(self, ctx: Context) -> Context:
        raise ZeroDivisionError("oh")


def test_ck_08_11_hooks_cleanup_and_rollback_come_in_order() -> None:
    Recorded.calls = RecordedFailing.calls = calls = []
    flow = workflow(
        "h", stage("one", Recorded), stage("two", Recorded), stage("bad", RecordedFailing), stage("never", Recorded),
        cleanup=[stage("close", note("closed")), stage("bad_close", Failing)],
    )  # fmt: skip
    with pytest.raises(StageError, match="stage bad: oh") as caught:
        run(flow)
    assert calls == [
        "before one", "execute one", "after one", "cleanup one",
        "before two", "execute two", "after two", "cleanup two",
        "before bad", "on_error bad oh", "cleanup bad",
        "rollback two", "rollback one",
    ]  # fmt: skip
    assert any("cleaning up failed: stage bad_close: oh" in text for text in caught.value.__notes__)


class RecordedLate(Recorded):
    async def execute(self, ctx: Context) -> Context:
        await asyncio.sleep(5)
        return ctx


class RecordedUnready(Recorded):
    def before(self, ctx: Context) -> None:
        raise ZeroDivisionError("oh")


@pytest.mark.parametrize(
    ("node", "hooks"),
    [
        (stage("late", RecordedLate, timeout_s=0.01), ["before late", "on_error late ", "cleanup late"]),
        (stage("unready", RecordedUnready), ["on_error unready oh", "cleanup unready"]),
    ],
)
def test_ck_08_a_stage_is_told_its_error_wherever_it_came_from(node: StageNode, hooks: list[str]) -> None:
    Recorded.calls = calls = []
    with pytest.raises(StageError, match=r"^stage (late: TimeoutError|unready: oh)$"):
        run(workflow("e", node))
    assert calls == hooks


class Clumsy(Recorded):
    def rollback(self, ctx: Context) -> None:
        raise OSError("rollback broke")

    def cleanup(self, ctx: Context) -> None:
        raise OSError("cleanup broke")


def test_ck_11_hooks_that_fail_neither_hide_the_error_nor_stop_the_other_hooks() -> None:
    Recorded.calls = calls = []

    class ClumsyRollback(Clumsy):
        def cleanup(self, ctx: Context) -> None:
            """Well."""

    class ClumsyFailing(Clumsy, RecordedFailing):
        pass

    flow = workflow("c", stage("one", Recorded), stage("two", ClumsyRollback), stage("bad", ClumsyFailing))
    with pytest.raises(StageError, match="stage bad: oh") as caught:
        run(flow)
    assert calls[-1] == "rollback one"
    assert caught.value.__notes__ == ["then rolling back two failed: rollback broke"]
    assert caught.value.cause.__notes__ == ["then cleaning up bad failed: cleanup broke"]
    with pytest.raises(StageError, match="stage one: cleanup broke"):
        run(workflow("d", stage("one", Clumsy)))


def test_ck_11_an_error_knows_its_place() -> None:
    flow = workflow(
        "e",
        loop("epochs", over=lambda _: range(2))(
            loop("steps", over=lambda _: range(3))(
                conditional(lambda ctx: ctx.state.epochs_index == 1 and ctx.state.steps_index == 2)(
                    stage("bad", Failing)
                ),
                stage("n", note("n")),
            )
        ),
    )
    with pytest.raises(StageError, match=r"^stage epochs\[1\]/steps\[2\]/bad: oh$") as caught:
        run(flow)
    assert caught.value.indices == {"epochs": 1, "steps": 2}
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    failed = run(flow, raises=False)
    assert (failed.status, type(failed.error)) == ("failed", StageError)


def test_ck_11_a_lambda_that_fails_is_told_with_its_place() -> None:
    flow = workflow("l", loop("epochs", over=lambda ctx: range(ctx.config.epoch))(stage("n", note("n"))))
    with pytest.raises(StageError, match=r"stage epochs.over: config has no 'epoch'; did you mean 'epochs'\?"):
        run(flow, {"epochs": 1})


def test_ck_09_a_context_never_changes() -> None:
    kept: list[Context] = []

    def keep(ctx: Context) -> Context:
        kept.append(ctx)
        return ctx.put_state("x", ctx.get_state("x", 0) + 1).record_metric("x", 1.0)

    run(workflow("k", loop("i", over=lambda _: range(3))(stage("keep", keep))))
    assert [ctx.get_state("x", 0) for ctx in kept] == [0, 1, 2]
    assert [len(list(ctx.metrics)) for ctx in kept] == [0, 1, 2]
    with pytest.raises(WorkflowError, match="no stage before 'i\\[0\\]/keep' has put 'y' into the state"):
        kept[0].get_state("y")
    with pytest.raises(AttributeError):
        kept[0].state = None  # type: ignore[misc, assignment]


class NeedsTraining(Stage):
    needs = ("training_client",)
    options = ("split",)

    def execute(self, ctx: Context) -> None:
        raise AssertionError("must not run")


def test_ck_10_everything_wrong_is_found_before_anything_runs() -> None:
    ran: list[str] = []
    flow = workflow(
        "v",
        stage("first", lambda ctx: ran.append("first")),
        stage("first", NeedsTraining, spilt="train"),
        loop("epochs", over=lambda _: [])(),
        stage("odd", 3),  # type: ignore[arg-type]
    )
    with pytest.raises(ValidationError) as caught:
        run(flow, adapters={"training_clint": object()})
    assert caught.value.problems == (
        "adapter 'training_clint' belongs to no port; did you mean 'training_client'? (the ports are training_client, "
        "sampling_client, environment, dataset_store, blob_store, metrics_store, tokenizer_client, evaluator, "
        "model_registry, hub_client, feedback_client, completer, llm_client, embedding_client, vector_store)",
        "stage 'first' needs an adapter for 'training_client'; did you mean 'training_clint'?",
        "v: 2 nodes are named 'first'; names must be unique in their scope",
        "v/first: unknown option 'spilt'; did you mean 'split'? (it takes split)",
        "v/epochs: the loop has no body",
        "v/odd: 3 is neither a Stage class nor a function of a context",
    )
    assert ran == []


def test_ck_10_an_adapter_that_lacks_methods_is_named() -> None:
    with pytest.raises(ValidationError, match=r"adapter 'training_client' \(object\) lacks close_session, forward"):
        run(workflow("v", stage("s", NeedsTraining)), adapters={"training_client": object()})


def test_ck_10_a_dry_run_shows_the_plan_and_calls_nothing() -> None:
    flow = workflow(
        "dry",
        stage("load", NeedsTraining),
        loop("epochs", over=lambda _: [1])(conditional(lambda _: True, "due")(stage("save", note("x")))),
        parallel("both", stage("a", note("a")), [stage("b", note("b")), stage("c", note("c"))]),
        cleanup=[stage("close", note("x"))],
    )
    adapters = {"training_client": _Everything()}
    result = run(flow, adapters=adapters, dry_run=True)
    assert result.status == "planned"
    assert result.plan.splitlines() == [
        "dry",
        "├── load (training_client)",
        "├── loop epochs",
        "│   └── if due",
        "│       └── save",
        "├── parallel both (all at once)",
        "│   ├── branch 1",
        "│   │   └── a",
        "│   └── branch 2",
        "│       ├── b",
        "│       └── c",
        "└── always: close",
    ]
    assert result.plan == describe(flow)
    chart = mermaid(flow)
    assert chart.startswith("flowchart TD\n")
    assert 'subgraph n2["loop epochs"]' in chart
    assert "n1 --> n2" in chart


class _Everything:
    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


class Save(Stage):
    commits = True

    def execute(self, ctx: Context) -> Context:
        ctx.config.saved.append({"cursor": ctx.cursor, "log": list(ctx.state.log)})
        return ctx


def resumable() -> Workflow:
    return workflow(
        "resumable",
        stage("setup", lambda ctx: {"log": tuple((ctx.metadata.resumed or {}).get("log", ()))}),
        loop("epochs", over=lambda _: range(3))(
            stage("begin", note("epoch {epochs_index}")),
            loop("steps", over=lambda _: iter("abc"))(
                stage("train", _random_note),
                conditional(lambda ctx: ctx.state.steps_index != 1)(stage("save", Save)),
            ),
            stage("close", note("closed {epochs_index}")),
        ),
        stage("end", note("end")),
    )


def _random_note(ctx: Context) -> Context:
    text = f"{ctx.state.steps_current} {ctx.rng().random():.6f} {ctx.draw_seed('sample')}"
    return ctx.put(log=(*ctx.state.log, text))


def test_ck_13_a_run_goes_on_exactly_where_any_checkpoint_was_made() -> None:
    saved: list[dict[str, Any]] = []
    whole = log_of(resumable(), {"seed": 3, "saved": saved})
    assert len(saved) == 6
    for record in list(saved):
        assert log_of(resumable(), {"seed": 3, "saved": []}, resume_from=record) == whole
    assert log_of(resumable(), {"seed": 4, "saved": []}) != whole


def test_ck_13_a_checkpoint_of_another_workflow_is_refused() -> None:
    record = {"cursor": {"epochs": 0, "epochs/batches": 1}, "log": []}
    flow = workflow("other", loop("rounds", over=lambda _: [1])(stage("n", note("n"))))
    with pytest.raises(WorkflowError, match="which this workflow does not have"):
        run(flow, resume_from=record)


def test_ck_13_a_run_goes_on_inside_an_async_loop() -> None:
    flow = workflow(
        "a",
        stage("setup", lambda ctx: {"log": tuple((ctx.metadata.resumed or {}).get("log", ()))}),
        async_loop("rounds", producer=lambda ctx, index: index, stop_when=lambda ctx: len(ctx.state.log) >= 9)(
            loop("steps", over=lambda _: iter("abc"))(stage("train", _random_note), stage("save", Save)),
        ),
    )
    saved: list[Any] = []
    whole = log_of(flow, {"saved": saved})
    for record in list(saved):
        assert log_of(flow, {"saved": []}, resume_from=record) == whole


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ([stage("save", Save), stage("n", note("n"))], "m/steps/save stores a checkpoint, so it must be the last"),
        (
            [sub_workflow("s", workflow("i", stage("save", Save))), stage("n", note("n"))],
            "m/steps/s stores a checkpoint, so it must be the last",
        ),
        (
            [sub_workflow("s", workflow("i", stage("save", Save), stage("n", note("n"))))],
            "m/steps/s/save stores a checkpoint, so it must be the last",
        ),
        (
            [parallel("both", loop("inner", over=lambda _: [1])(stage("save", Save)), stage("n", note("n")))],
            "m/steps/both stores a checkpoint in a branch, which would not tell how far the others are",
        ),
    ],
)
def test_a_checkpoint_in_the_middle_of_an_iteration_is_refused(body: list[Any], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        run(workflow("m", loop("steps", over=lambda _: [1])(*body)))


def test_a_checkpoint_at_the_end_of_an_iteration_may_be_a_sub_workflow_s() -> None:
    inner = workflow("i", stage("save", Save), cleanup=[stage("n", note("n"))])
    saved: list[Any] = []
    flow = workflow(
        "m", stage("setup", lambda _: {"log": ()}), loop("steps", over=lambda _: [1])(sub_workflow("s", inner))
    )
    run(flow, {"saved": saved})
    assert [record["cursor"] for record in saved] == [{"steps": 0}]


def test_ck_14_15_events_are_emitted_and_can_be_listened_to_and_silenced(tmp_path: Path) -> None:
    flow = workflow("t", stage("one", note("x")), stage("two", Failing))
    seen: list[Event] = []
    number = attach_telemetry("jsonl", path=tmp_path / "deep" / "events.jsonl")
    other = attach_telemetry(seen.append)
    try:
        assert run(flow, raises=False).status == "failed"
        assert run(flow, raises=False, telemetry=False).status == "failed"
    finally:
        detach_telemetry(number)
        detach_telemetry(other)
    names = [event.name.removeprefix("crucible_kitchen.") for event in seen]
    assert names == [
        "workflow.run.start", "stage.run.start", "stage.run.stop", "stage.run.start", "stage.run.exception",
        "workflow.run.exception",
    ]  # fmt: skip
    assert all("duration_s" in event.measurements for event in seen if not event.name.endswith("start"))
    rows = [json.loads(line) for line in (tmp_path / "deep" / "events.jsonl").read_text().splitlines()]
    assert [row["event"] for row in rows] == [event.name for event in seen]
    assert rows[4]["error"] == "ZeroDivisionError: oh"
    with pytest.raises(ConfigError, match=r"telemetry 'jsonn' is none of console, jsonl, .*did you mean 'jsonl'"):
        attach_telemetry("jsonn")
    with pytest.raises(ConfigError, match="cannot be attached"):
        attach_telemetry("jsonl")


def test_ck_14_the_console_prints_a_line_per_event(capsys: pytest.CaptureFixture[str]) -> None:
    number = attach_telemetry("console")
    try:
        run(workflow("t", stage("one", note("x"))))
    finally:
        detach_telemetry(number)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in lines] == ["workflow.run.start", "workflow.run.stop"]


class Greet(Recipe):
    name = "greet"
    description = "Says hello"
    workflow = workflow("greet", loop("times", over=lambda ctx: range(ctx.config.times))(stage("n", note("hello"))))
    defaults = {"times": 2}
    default_config = {"times": 9, "tone": "warm"}

    @classmethod
    def validate_config(cls, config: Any) -> None:
        if config.times > 5:
            raise ConfigError(f"times={config.times} is too many")


def test_ck_01_03_a_recipe_class_runs_with_its_defaults_and_checks() -> None:
    result: RunResult = run(Greet, {"tone": "dry"})
    assert (result.status, result.context.config.tone) == ("completed", "dry")
    assert result.context.state.log == ("hello", "hello")
    assert result.duration_ms > 0
    with pytest.raises(ConfigError, match="times=6 is too many"):
        run(Greet, {"times": 6})
    with pytest.raises(ConfigError, match=r"unknown recipe 'supervise'; the recipes are .*did you mean 'supervised'"):
        run("supervise")


def test_a_run_works_inside_a_running_event_loop() -> None:
    async def inside() -> RunResult:
        return run(Greet)

    assert asyncio.run(inside()).status == "completed"


def test_ck_19_a_failing_cleanup_alone_is_an_error() -> None:
    with pytest.raises(StageError, match="stage close: oh"):
        run(workflow("c", stage("n", note("n")), cleanup=[stage("close", Failing)]))
