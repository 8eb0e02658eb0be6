"""The feedback loop: when it trains, on what, and that no feedback is lost or used twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tinsmith.data import ChatTokenizer, DataError
from tinsmith.kitchen import RECIPES, NothingTrained, TrainingConfig, TrainingResult, adapters, run, run_recipe
from tinsmith.kitchen.adapters.files import FolderRegistry, JsonlFeedback
from tinsmith.kitchen.adapters.noop_services import MemoryFeedback
from tinsmith.kitchen.adapters.noop_training import NoopBackend, NoopFailure
from tinsmith.kitchen.ports import Feedback
from tinsmith.kitchen.stages.feedback import Baseline, curate, find_trigger
from tinsmith.kitchen.telemetry import Event


def said(prompt: str, rating: float, correction: str | None = None) -> Feedback:
    return Feedback(prompt=prompt, response=f"{prompt} yes", rating=rating, correction=correction)


def test_ck_44_enough_feedback_or_enough_of_it_bad_is_reason_to_train() -> None:
    def reason(ratings: list[float]) -> str | None:
        entries = [said(str(number), rating) for number, rating in enumerate(ratings)]
        return find_trigger(entries, min_new=5, bad_share_max=0.5, bad_min=3).reason

    assert reason([]) is None
    assert reason([1.0] * 4) is None
    assert reason([1.0] * 5) == "5 new entries"
    assert reason([-1.0] * 2) is None, "too few to count shares"
    assert reason([-1.0, -1.0, 1.0]) == "67% of 3 new entries are bad"
    assert reason([-1.0, -1.0, 1.0, 1.0]) is None, "half is no more than half"


def test_ck_44_corrections_and_good_answers_are_learned_the_newest_of_each_prompt() -> None:
    entries = [said("a", 1.0), said("b", -1.0), said("c", -1.0, "c right"), said("a", 0.2), said("a", 0.9, "a best")]
    assert curate(entries, min_rating=0.5) == [
        {"prompt": "a", "completion": "a best"},
        {"prompt": "c", "completion": "c right"},
    ]


def loop(
    tokenizer: ChatTokenizer, output: Path, feedback: Path, backend: NoopBackend, **settings: Any
) -> TrainingResult:
    config = RECIPES["feedback_loop"].make(
        {"output": output, "data": feedback, "min_new": 4, "batch_size": 2, "epochs": 2, **settings}
    )
    assert isinstance(config, TrainingConfig)
    return run_recipe(RECIPES["feedback_loop"], config, lambda _config, _folder: backend)


def test_ck_44_feedback_written_by_hand_is_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "feedback.jsonl"
    path.write_text(
        '\ufeff{"prompt": "a", "response": "b", "rating": 1}\r\n\n{"prompt": "c", "response": "d", "rating": -1}'
    )
    feedback = JsonlFeedback(path)
    assert [entry.prompt for entry in feedback.read()] == ["a", "c"]
    feedback.log(said("e", 0.5))
    assert [entry.prompt for entry in feedback.read(after=1)] == ["c", "e"]
    assert feedback.count() == 3


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"prompt": "a", ', "feedback.jsonl:2: not JSON"),
        ('{"prompt": "a", "response": "b"}', "feedback.jsonl:2: field 'rating' is missing"),
        (
            '{"prompt": "a", "response": "b", "rating": "good"}',
            "feedback.jsonl:2: rating must be a number from -1 to 1, not 'good'",
        ),
        (
            '{"prompt": "a", "response": "b", "rating": 5}',
            "feedback.jsonl:2: rating must be a number from -1 to 1, not 5",
        ),
        (
            '{"prompt": "a", "response": "b", "rating": 0, "correction": ""}',
            "feedback.jsonl:2: correction is empty; leave it out where there is none",
        ),
        ('{"prompt": 1, "response": "b", "rating": 0}', "feedback.jsonl:2: prompt must be a text, not 1"),
        (
            '{"prompt": "a", "response": "b", "rating": 0, "corection": "c"}',
            "feedback.jsonl:2: unknown key 'corection'; did you mean 'correction'?",
        ),
    ],
)
def test_ck_44_bad_feedback_names_file_and_line(tmp_path: Path, line: str, complaint: str) -> None:
    path = tmp_path / "feedback.jsonl"
    path.write_text('{"prompt": "a", "response": "b", "rating": 1}\n' + line + "\n")
    with pytest.raises(DataError, match=complaint):
        JsonlFeedback(path).read()


def test_ck_44_the_loop_trains_registers_and_forgets_what_it_used(
    tiny_tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    backend, path = NoopBackend(chat_tokenizer=tiny_tokenizer), tmp_path / "feedback.jsonl"
    feedback = JsonlFeedback(path)
    for number in range(4):
        feedback.log(said(str(number), 1.0))
    first = loop(tiny_tokenizer, tmp_path / "runs" / "one", path, backend)
    assert first.artifacts["registered"].version == 1
    assert first.artifacts["registered"].path == first.checkpoint.sampler_path
    assert first.artifacts["baseline"] == Baseline(after=4, model="feedback:1")
    with pytest.raises(NothingTrained, match="nothing was trained: 0 new entries of 4"):
        loop(tiny_tokenizer, tmp_path / "runs" / "two", path, backend)
    assert not (tmp_path / "runs" / "two").exists()
    for number in range(5):
        feedback.log(said(f"new {number}", 1.0))
    third = loop(tiny_tokenizer, tmp_path / "runs" / "three", path, backend)
    assert third.artifacts["baseline"] == Baseline(after=9, model="feedback:2")
    assert [model.version for model in FolderRegistry(tmp_path / "runs").list("feedback")] == [1, 2]
    used = json.loads((tmp_path / "feedback_loop" / "feedback" / "curated-4.json").read_text())
    assert [row["prompt"] for row in used["rows"]] == [f"new {number}" for number in range(5)]


def test_ck_44_13_an_interrupted_loop_goes_on_with_the_feedback_that_it_began_with(
    tiny_tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    def begin(folder: str) -> Path:
        path = tmp_path / folder / "feedback.jsonl"
        for number in range(4):
            JsonlFeedback(path).log(said(str(number), 1.0))
        return path

    path = begin("whole")
    whole = loop(tiny_tokenizer, tmp_path / "a", path, NoopBackend(chat_tokenizer=tiny_tokenizer), save_every=1)
    path = begin("parts")
    mortal = NoopBackend(chat_tokenizer=tiny_tokenizer, fail_after_steps=3)
    with pytest.raises(NoopFailure):
        loop(tiny_tokenizer, tmp_path / "b", path, mortal, save_every=1)
    JsonlFeedback(path).log(said("came in meanwhile", 1.0))
    survivor = NoopBackend(chat_tokenizer=tiny_tokenizer, store=mortal.store)
    parts = loop(tiny_tokenizer, tmp_path / "b", path, survivor, save_every=1, resume=True)
    assert [row.loss for row in parts.rows] == [row.loss for row in whole.rows]
    assert parts.artifacts["baseline"].after == 4, "what came in meanwhile is new"


def test_ck_16_44_the_loop_tells_its_trigger_and_its_model(tiny_tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    seen: list[Event] = []
    given = adapters.noop(chat_tokenizer=tiny_tokenizer)
    given["feedback_client"] = MemoryFeedback([said(str(number), 1.0) for number in range(3)])
    settings = {"output": tmp_path / "run", "min_new": 3, "epochs": 1, "batch_size": 3, "register_as": "mine"}
    result = run("feedback_loop", settings, adapters=given, handlers=[seen.append])
    events = {event.name.removeprefix("crucible_kitchen."): event for event in seen}
    assert dict(events["feedback.trigger"].measurements) == {"new": 3, "bad_share": 0.0, "triggered": 1.0}
    assert events["feedback.trigger"].metadata["reason"] == "3 new entries"
    assert events["model.registered"].metadata["name"] == "mine"
    assert given["model_registry"].get("mine").metadata["recipe"] == "feedback_loop"
    assert result.artifacts["baseline"].model == "mine:1"


def test_ck_40_a_run_registers_its_last_checkpoint_where_the_config_says_so(
    tiny_tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    given = adapters.noop(chat_tokenizer=tiny_tokenizer)
    result = run("sl_basic", {"output": tmp_path / "run", "batch_size": 24, "register_as": "talker"}, adapters=given)
    made = given["model_registry"].get("talker")
    assert (made.version, made.path) == (1, result.artifacts["checkpoint"].sampler_path)
    del given["model_registry"]
    with pytest.raises(Exception, match="register_as='talker' needs an adapter for 'model_registry'"):
        run("sl_basic", {"output": tmp_path / "other", "register_as": "talker"}, adapters=given)
