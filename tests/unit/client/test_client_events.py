"""What a client tells about itself: events to sinks of the user's, and to the server only if asked to."""

from __future__ import annotations

import concurrent.futures
import csv
import gc
import io
import json
import sqlite3
import threading
import warnings
from pathlib import Path

import pytest
from pyarrow import parquet

from tests.unit.client.fake_tinker import FAST, FakeTinker, status
from tinsmith.client import ConfigurationError, ServiceClient
from tinsmith.client.events import Events
from tinsmith.client.telemetry import chosen_sinks
from tinsmith.observe.event_sinks import (
    ConsoleEvents,
    JsonlEvents,
    SqliteEvents,
    export_events,
    open_sinks,
    read_events,
)
from tinsmith.types import AdamParams, Datum, ModelInput, SamplingParams
from tinsmith.types.events import Event

DATA = [Datum(ModelInput.from_ints([1, 2]), {"target_tokens": [2, 3], "weights": [1.0, 1.0]})]


class Kept:
    def __init__(self) -> None:
        self.events: list[Event] = []

    def write(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None:
        return None

    def named(self, name: str) -> list[Event]:
        return [event for event in self.events if event.name == name]


def run_a_little(server: FakeTinker, *sinks: object) -> None:
    with ServiceClient(
        base_url="http://fake.test",
        api_key="tml-secret",
        timing=FAST,
        transport=server,
        telemetry=list(sinks),  # type: ignore[arg-type]
    ) as service:
        training = service.create_lora_training_client("m").result(5)
        training.forward_backward(DATA, "cross_entropy").result(5)
        server.script("optim_step", status(503))
        training.optim_step(AdamParams(learning_rate=0.25)).result(5)
        server.script("save_weights", status(400))
        assert training.save_state("x").exception(5) is not None
        sampler = service.create_sampling_client(base_model="m").result(5)
        sampler.sample(ModelInput.from_ints([1, 2]), 2, SamplingParams(max_tokens=3)).result(5)


def test_every_operation_is_an_event_with_what_research_asks_for() -> None:
    kept = Kept()
    run_a_little(FakeTinker(), kept)
    finished = {event.fields["operation"]: event.fields for event in kept.named("operation.finished")}
    assert set(finished) == {"forward_backward", "optim_step", "sample"}
    passed = finished["forward_backward"]
    assert passed["run_id"] == "s:train:0"
    assert (passed["seq_id"], passed["datums"], passed["tokens"], passed["loss_fn"]) == (1, 1, 2, "cross_entropy")
    assert passed["loss_sum"] == pytest.approx(0.7)
    assert passed["wall_s"] >= passed["turn_s"] + passed["submit_s"] + passed["server_s"] - 1e-6
    assert finished["optim_step"]["learning_rate"] == 0.25
    assert (finished["sample"]["sampled_tokens"], finished["sample"]["prompt_tokens"]) == (6, 2)
    (failed,) = kept.named("operation.failed")
    assert (failed.fields["operation"], failed.fields["status"], failed.fields["category"]) == (
        "save_weights", 400, "user"
    )  # fmt: skip
    assert kept.named("http.retry")[0].fields["status"] == 503
    assert [event.name for event in kept.events if event.name.startswith("session.")] == [
        "session.created", "session.finished"
    ]  # fmt: skip
    assert "tml-secret" not in json.dumps([event.as_row() for event in kept.events])


def test_a_sample_taken_back_before_it_begins_leaves_no_warning() -> None:
    with (
        warnings.catch_warnings(record=True) as caught,
        ServiceClient(
            base_url="http://fake.test", api_key="tml-k", timing=FAST, transport=FakeTinker(), telemetry=[Kept()]
        ) as service,
    ):
        warnings.simplefilter("always")
        sampler = service.create_sampling_client(base_model="m").result(5)
        going_on = threading.Event()
        service.holder.loop.call(lambda: going_on.wait(5))
        sampling = sampler.sample(ModelInput.from_ints([1, 2]), 1, SamplingParams(max_tokens=3))
        sampling.cancel()
        going_on.set()
        with pytest.raises(concurrent.futures.CancelledError):
            sampling.result(5)
        gc.collect()
    assert [str(one.message) for one in caught if "never awaited" in str(one.message)] == []


def test_a_sink_that_fails_stops_nothing_and_the_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Kept):
        def write(self, event: Event) -> None:
            raise OSError("disk full")

    kept = Kept()
    run_a_little(FakeTinker(), Broken(), kept)
    assert len(kept.named("operation.finished")) == 3
    assert caplog.text.count("disk full") == 1


def test_without_sinks_nothing_is_told() -> None:
    events = Events()
    assert not events
    events.emit("x", a=1)


def test_events_go_to_files_and_out_again_as_tables(tmp_path: Path) -> None:
    jsonl, base = tmp_path / "logs" / "a.jsonl", tmp_path / "a.db"
    sinks = [JsonlEvents(jsonl), SqliteEvents(base)]
    run_a_little(FakeTinker(), *sinks)
    for sink in sinks:
        sink.close()
        sink.close()
    rows = read_events(jsonl)
    assert rows == read_events(base)
    assert len(read_events(base, name="operation.finished")) == 3
    with sqlite3.connect(base) as table:
        (rate,) = table.execute("SELECT learning_rate FROM events WHERE operation='optim_step'").fetchone()
    table.close()
    assert rate == 0.25
    assert export_events(base, tmp_path / "a.csv", run_id="s:train:0") == len(read_events(jsonl, run_id="s:train:0"))
    with (tmp_path / "a.csv").open() as file:
        read = list(csv.DictReader(file))
    assert {row["run_id"] for row in read} == {"s:train:0"}
    assert "0.25" in {row["learning_rate"] for row in read}


def test_files_that_nobody_closes_are_closed_without_a_warning(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResourceWarning)
        sinks = open_sinks(f"jsonl:{tmp_path / 'a.jsonl'},sqlite:{tmp_path / 'a.db'}")
        for sink in sinks:
            sink.write(Event(name="x", time=1.0))
        del sinks, sink
        gc.collect()
    assert [str(one.message) for one in caught if "a.jsonl" in str(one.message)] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.db", "a.jsonl"]


def test_parquet_has_numbers_where_there_are_numbers(tmp_path: Path) -> None:
    sink = JsonlEvents(tmp_path / "a.jsonl")
    run_a_little(FakeTinker(), sink)
    sink.close()
    count = export_events(tmp_path / "a.jsonl", tmp_path / "a.parquet")
    table = parquet.read_table(tmp_path / "a.parquet")
    assert table.num_rows == count
    assert 0.25 in table.column("learning_rate").to_pylist()
    assert 2 in table.column("tokens").to_pylist()


def test_other_files_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        read_events(tmp_path / "none.jsonl")
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ValueError, match="no file of events"):
        read_events(tmp_path / "a.txt")
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"must end in \.csv or \.parquet"):
        export_events(tmp_path / "a.jsonl", tmp_path / "a.xlsx")


def test_the_console_leaves_single_requests_out() -> None:
    stream = io.StringIO()
    run_a_little(FakeTinker(), ConsoleEvents(stream))
    assert "operation.finished operation=optim_step" in stream.getvalue()
    assert "http.request" not in stream.getvalue()


def test_one_switch_turns_everything_off_and_one_turns_it_on(tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl"
    assert chosen_sinks((), {}) == ()
    assert chosen_sinks([Kept()], {"TINSMITH_TELEMETRY": "off"}) == ()
    (sink,) = chosen_sinks((), {"TINSMITH_TELEMETRY": f"jsonl:{path}"})
    sink.close()
    assert path.exists()
    with pytest.raises(ConfigurationError, match="'smoke' is no kind of sink"):
        chosen_sinks("smoke", {})
    with pytest.raises(ValueError, match="takes a path"):
        open_sinks("jsonl")


def test_sinks_that_cannot_be_are_named(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("no database, and longer than the head of one " * 9)
    with pytest.raises(ConfigurationError, match=r"text\.db' cannot be written: file is not a database"):
        chosen_sinks(f"sqlite:{tmp_path / 'text.db'}", {})
    with pytest.raises(ConfigurationError, match=r"cannot be written: .*Is a directory"):
        chosen_sinks(f"jsonl:{tmp_path}", {})
    with pytest.raises(ConfigurationError, match=r"must be a text or a list of sinks, not .*Kept"):
        chosen_sinks(Kept(), {})  # type: ignore[arg-type]


@pytest.mark.parametrize(("switch", "reports"), [(None, 0), ("0", 0), ("1", 1)])
def test_the_server_is_told_only_if_the_user_says_so(
    switch: str | None, reports: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TINKER_TELEMETRY", raising=False)
    if switch is not None:
        monkeypatch.setenv("TINKER_TELEMETRY", switch)
    server = FakeTinker()
    run_a_little(server)
    batches = [seen.body for seen in server.of("telemetry")]
    assert len({batch["session_id"] for batch in batches}) == reports
    if reports:
        events = [event for batch in batches for event in batch["events"]]
        assert [event["event_session_index"] for event in events][: len(batches[0]["events"])] == list(
            range(len(batches[0]["events"]))
        )
        assert (events[0]["event"], batches[0]["events"][-1]["event"]) == ("SESSION_START", "SESSION_END")
        assert "tml-secret" not in json.dumps(batches)
