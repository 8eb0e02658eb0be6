"""One suite per port of the kitchen, over all its adapters."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinsmith.data import DataError
from tinsmith.kitchen import adapters
from tinsmith.kitchen.adapters.datasets import FileDatasets, HubDatasets, MemoryDatasets
from tinsmith.kitchen.adapters.evaluators import ExactMatch
from tinsmith.kitchen.adapters.files import FolderBlobs, FolderRegistry, JsonlFeedback, JsonlMetrics
from tinsmith.kitchen.adapters.noop_services import (
    MemoryBlobs,
    MemoryFeedback,
    MemoryHub,
    MemoryMetrics,
    MemoryRegistry,
)
from tinsmith.kitchen.adapters.sets import PRESETS, resolve_preset
from tinsmith.kitchen.adapters.stores import ObjectBlobs, SqliteMetrics
from tinsmith.kitchen.adapters.tinker_training import open_backend
from tinsmith.kitchen.errors import ConfigError
from tinsmith.kitchen.ports import (
    PORTS,
    BlobStore,
    DatasetStore,
    EvalExample,
    Feedback,
    FeedbackClient,
    LossGradient,
    MetricRow,
    MetricsStore,
    ModelRegistry,
    SessionSpec,
    TrainingBackend,
)
from tinsmith.kitchen.validation import missing_methods
from tinsmith.models import TINY
from tinsmith.types import Datum, ModelInput, SamplingParams, TensorData
from tinsmith.types.errors import InvalidInput, NotFound

ROWS = [{"prompt": f"p{number}", "completion": f"c{number}"} for number in range(5)]


def test_ck_17_noop_has_an_adapter_for_every_port_that_keeps_its_promise() -> None:
    found = adapters.noop()
    assert found.keys() == PORTS.keys()
    assert {port: missing_methods(port, adapter) for port, adapter in found.items()} == {key: [] for key in PORTS}


# -- training and sampling --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["noop", "local"])
def backend(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainingBackend]:
    if request.param == "noop":
        yield adapters.noop()["training_client"]
        return
    opened = open_backend(base_url="local:", model=TINY, store=tmp_path_factory.mktemp("store"))
    yield opened
    opened.close()


SPEC = SessionSpec(model=TINY, lora_rank=4, seed=3)
TOKENS = [10, 20, 30, 40, 50, 60]


def datum(tokens: list[int], weight: float = 1.0) -> Datum:
    return Datum(
        model_input=ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": TensorData.from_numpy(np.asarray(tokens[1:], dtype=np.int64)),
            "weights": TensorData.from_numpy(np.full(len(tokens) - 1, weight, dtype=np.float32)),
        },
    )


def test_ck_20_the_loss_falls_and_a_checkpoint_goes_on_where_it_was_made(backend: TrainingBackend) -> None:
    session = backend.start_session(SPEC)

    def step(session: Any) -> float:
        passed = backend.forward_backward(session, [datum(TOKENS)])
        backend.optim_step(session, 0.01).result()
        return passed.result().loss_sum

    losses = [step(session) for _ in range(3)]
    assert losses == sorted(losses, reverse=True)
    saved = backend.save_checkpoint(session, "here").result()
    assert saved.state.startswith("tinker://")
    further = step(session)
    resumed = backend.load_checkpoint(SPEC, saved.state)
    assert step(resumed) == pytest.approx(further, rel=1e-4)
    backend.close_session(resumed)


def test_ck_20_a_loss_of_ones_own_is_told_and_trained(backend: TrainingBackend) -> None:
    session = backend.start_session(SPEC)

    def twice(data: Any, logprobs: Any) -> LossGradient:
        total = -2.0 * float(sum(values.sum() for values in logprobs))
        gradients = [np.full(values.shape, -2.0, dtype=np.float32) for values in logprobs]
        return LossGradient(loss=total, gradients=gradients, metrics={"own": 7.0})

    before = backend.forward(session, [datum(TOKENS)]).result()
    output = backend.forward_backward_custom(session, [datum(TOKENS)], twice).result()
    assert output.loss_sum == pytest.approx(-2 * float(before.logprobs[0].to_numpy().sum()), rel=1e-4)
    assert output.metrics["own"] == 7.0
    backend.optim_step(session, 0.01).result()
    after = backend.forward(session, [datum(TOKENS)]).result()
    assert after.logprobs[0].to_numpy().sum() > before.logprobs[0].to_numpy().sum()


def test_ck_23_a_sampler_scores_as_training_does_and_repeats_its_seed(backend: TrainingBackend) -> None:
    session = backend.start_session(SPEC)
    backend.forward_backward(session, [datum(TOKENS)])
    backend.optim_step(session, 0.01).result()
    sampler = backend.sampler(session)
    scored = backend.compute_logprobs(sampler, TOKENS).result()
    assert scored[0] is None
    trained = backend.forward(session, [datum(TOKENS)]).result().logprobs[0].to_numpy()
    assert np.asarray(scored[1:], dtype=np.float64) == pytest.approx(trained, abs=1e-3)
    params = SamplingParams(max_tokens=4, seed=11, temperature=1.0)
    first, again = (backend.sample(sampler, TOKENS, params, 3).result().sequences for _ in range(2))
    assert [sequence.tokens for sequence in first] == [sequence.tokens for sequence in again]
    assert all(len(sequence.tokens) == len(sequence.logprobs or ()) for sequence in first)
    backend.close_sampler(sampler)


def test_ck_20_23_the_port_itself_hands_on_to_sessions_and_samplers(backend: TrainingBackend) -> None:
    session = backend.start_session(SPEC)
    assert backend.run_id(session) == session.run_id
    assert backend.get_tokenizer(session)("tin")["input_ids"] == session.tokenizer("tin")["input_ids"]
    sampler = backend.open_sampler(TINY)
    params = SamplingParams(max_tokens=4, seed=5)
    drawn = backend.sample(sampler, TOKENS, params, 2).result()
    assert [s.tokens for s in drawn.sequences] == [
        s.tokens for s in sampler.sample(TOKENS, params, num_samples=2).result().sequences
    ]
    scores = backend.compute_logprobs(sampler, TOKENS).result()
    assert scores[0] is None
    assert scores[1:] == pytest.approx(sampler.compute_logprobs(TOKENS).result()[1:], abs=1e-5)
    backend.close_sampler(sampler)
    backend.close_session(session)


def test_ck_23_the_likeliest_tokens_of_every_position(backend: TrainingBackend) -> None:
    sampler = backend.open_sampler(TINY)
    first, *rows = sampler.topk_logprobs(TOKENS, 5).result()
    assert first is None
    assert [len(row or ()) for row in rows] == [5] * (len(TOKENS) - 1)
    scores = sampler.compute_logprobs(TOKENS).result()[1:]
    for row, token, score in zip(rows, TOKENS[1:], scores, strict=True):
        assert row is not None
        logprobs = [logprob for _, logprob in row]
        assert logprobs == sorted(logprobs, reverse=True)
        assert sum(math.exp(logprob) for logprob in logprobs) <= 1 + 1e-4
        assert dict(row).get(token, score) == pytest.approx(score, abs=1e-4)


def test_ck_20_a_missing_checkpoint_is_an_error(backend: TrainingBackend) -> None:
    with pytest.raises(Exception, match="none"):
        backend.load_checkpoint(SPEC, "tinker://none:train:0/weights/none")


# -- datasets ---------------------------------------------------------------------------------------------------------


def _jsonl(folder: Path) -> tuple[DatasetStore, str]:
    import json

    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return FileDatasets(), str(folder / "rows.jsonl")


def _parquet(folder: Path) -> tuple[DatasetStore, str]:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "rows.parquet")
    return FileDatasets(), str(folder / "rows.parquet")


def _folder(folder: Path) -> tuple[DatasetStore, str]:
    inner = folder / "rows"
    inner.mkdir()
    _jsonl(inner)
    return FileDatasets(), str(inner)


def _memory(folder: Path) -> tuple[DatasetStore, str]:
    return MemoryDatasets({"rows": ROWS}), "rows"


@pytest.mark.parametrize("make", [_jsonl, _parquet, _folder, _memory])
def test_ck_21_datasets_are_read_sliced_and_shuffled(
    make: Callable[[Path], tuple[DatasetStore, str]], tmp_path: Path
) -> None:
    store, name = make(tmp_path)
    dataset = store.load_dataset(name)
    assert dataset.to_list() == ROWS
    assert len(dataset.sha256) == 64
    assert dataset.skip(1).take(2).to_list() == ROWS[1:3]
    assert dataset.select([4, 0]).to_list() == [ROWS[4], ROWS[0]]
    assert dataset.take(99).to_list() == ROWS
    shuffled = dataset.shuffle(1).to_list()
    assert sorted(row["prompt"] for row in shuffled) == [row["prompt"] for row in ROWS]
    assert shuffled == dataset.shuffle(1).to_list() != dataset.shuffle(2).to_list()
    with pytest.raises(DataError, match="has no split 'nowhere'"):
        dataset.get_split("nowhere")
    with pytest.raises(DataError, match="index 5 is outside the 5 records"):
        dataset.select([5])
    with pytest.raises(DataError, match="missing"):
        store.load_dataset(str(tmp_path / "missing.jsonl"))


def test_ck_21_a_folders_files_are_its_splits_and_texts_are_records(tmp_path: Path) -> None:
    _jsonl(tmp_path)
    (tmp_path / "rows.jsonl").rename(tmp_path / "train.jsonl")
    (tmp_path / "test.jsonl").write_text('{"prompt": "t", "completion": "u"}\n')
    dataset = FileDatasets().load_dataset(str(tmp_path))
    assert dataset.get_split("train").to_list() == ROWS
    assert len(dataset.get_split("test")) == 1
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("tin")
    assert FileDatasets().load_dataset(str(texts)).to_list() == [{"text": "tin", "path": "a.txt"}]
    with pytest.raises(DataError, match=r"neither .jsonl, .parquet nor .txt"):
        FileDatasets().load_dataset(str(Path(str(tmp_path / "empty")).mkdir() or tmp_path / "empty"))


def test_ck_34_a_data_set_of_the_hub_may_have_columns_without_values(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "data").mkdir()
    answer = {"role": "assistant", "content": "b", "name": None}
    rows = [{"messages": [{"role": "user", "content": "a", "name": "Al"}, answer], "system": None}]
    (tmp_path / "data" / "train.jsonl").write_text(json.dumps(rows[0]) + "\n")
    store = HubDatasets({"cache_dir": str(tmp_path / "cache")})
    dataset = store.load_dataset(str(tmp_path / "data"))
    messages = [rows[0]["messages"][0], {"role": "assistant", "content": "b"}]
    assert dataset.to_list() == dataset.get_split("train").to_list() == [{"messages": messages}]


# -- blobs, metrics, registry, feedback, hub, evaluator ---------------------------------------------------------------


BLOBS: dict[str, Callable[[Path], BlobStore]] = {
    "memory": lambda folder: MemoryBlobs(),
    "folder": FolderBlobs,
    "objects": lambda folder: ObjectBlobs.at("memory:///"),
}


@pytest.mark.parametrize("kind", BLOBS)
def test_ck_22_blobs_are_written_whole_and_read_back(kind: str, tmp_path: Path) -> None:
    store = BLOBS[kind](tmp_path)
    data = hashlib.sha256(b"x").digest() * 100
    store.write("a/b", b"old")
    store.write("a/b", data)
    assert store.exists("a/b")
    assert not store.exists("a/c")
    assert store.read("a/b") == data
    assert b"".join(store.stream("a/b", chunk_size=7)) == data
    for read in (store.read, store.stream):
        with pytest.raises(NotFound, match="no blob 'a/c'"):
            read("a/c")


def test_ck_22_a_blob_key_cannot_leave_its_folder(tmp_path: Path) -> None:
    for key in ("../x", "/x", ""):
        with pytest.raises(InvalidInput, match="must be of the form a/b/c"):
            FolderBlobs(tmp_path / "blobs").write(key, b"")
        with pytest.raises(InvalidInput, match="must be of the form a/b/c"):
            BLOBS["objects"](tmp_path).write(key, b"")
    with pytest.raises(ConfigError, match="'tin://x' is no address of object storage"):
        ObjectBlobs.at("tin://x")


METRICS: dict[str, Callable[[Path], MetricsStore]] = {
    "memory": lambda folder: MemoryMetrics(),
    "jsonl": lambda folder: JsonlMetrics(folder / "m" / "metrics.jsonl"),
    "sqlite": lambda folder: SqliteMetrics(folder / "m" / "metrics.sqlite3"),
}


@pytest.mark.parametrize("kind", METRICS)
def test_ck_24_metrics_come_back_in_order(kind: str, tmp_path: Path) -> None:
    store = METRICS[kind](tmp_path)
    rows = [
        MetricRow(run_id=run, metric=metric, value=0.5, step=step, timestamp=1.0, metadata={"a": 1})
        for step, (run, metric) in enumerate([("r", "loss"), ("s", "loss"), ("r", "reward"), ("r", "loss")])
    ]
    for row in rows:
        store.record(row)
    store.flush()
    assert store.read("r") == [rows[0], rows[2], rows[3]]
    assert store.read("r", "loss") == [rows[0], rows[3]]
    assert store.read("t") == []


@pytest.mark.parametrize("kind", ["memory", "folder"])
def test_ck_24_models_have_versions_and_ancestors(kind: str, tmp_path: Path) -> None:
    registry: ModelRegistry = MemoryRegistry() if kind == "memory" else FolderRegistry(tmp_path / "models")
    base = registry.register("base", "tinker://a", metadata={"loss": 0.1})
    child = registry.register("child", "tinker://b", parent="base:1")
    newer = registry.register("child", "tinker://c", parent="child:1")
    assert (base.version, child.version, newer.version) == (1, 1, 2)
    assert registry.get("child") == newer
    assert registry.get("child", 1) == child
    assert [model.path for model in registry.lineage("child")] == ["tinker://c", "tinker://b", "tinker://a"]
    assert registry.list("child") == [child, newer]
    if kind == "folder":
        assert FolderRegistry(tmp_path / "models").list() == [base, child, newer]
    for wrong in (lambda: registry.get("none"), lambda: registry.register("x", "y", parent="none:1")):
        with pytest.raises(NotFound, match="no model 'none'"):
            wrong()


@pytest.mark.parametrize("kind", ["memory", "jsonl"])
def test_ck_25_feedback_is_kept_in_order(kind: str, tmp_path: Path) -> None:
    client: FeedbackClient = MemoryFeedback() if kind == "memory" else JsonlFeedback(tmp_path / "f.jsonl")
    entries = [Feedback(prompt="p", response=str(number), rating=1.0, correction=None) for number in range(3)]
    for entry in entries:
        client.log(entry)
    assert client.read() == entries
    assert client.read(after=2) == entries[2:]
    assert client.count() == 3


def test_ck_24_a_hub_gives_back_what_was_uploaded(tmp_path: Path) -> None:
    hub = MemoryHub(folder=tmp_path)
    hub.upload("me/model", "b.txt", b"two")
    hub.upload("me/model", "a.txt", b"one")
    assert hub.list_files("me/model") == ["a.txt", "b.txt"]
    assert hub.download("me/model", "a.txt").read_bytes() == b"one"
    assert (hub.snapshot("me/model") / "b.txt").read_bytes() == b"two"
    with pytest.raises(NotFound, match="no file 'c' in 'me/model'"):
        hub.download("me/model", "c")


def test_ck_54_exact_match_scores_and_reports() -> None:
    examples = [EvalExample(prediction=" 5\n", target="5"), EvalExample(prediction="6", target="5")]
    result = ExactMatch().evaluate(examples)
    assert (result.score, result.scores) == (0.5, (1.0, 0.0))
    assert "| exact_match | 50.0% | 1/2 |" in ExactMatch().generate_report(result)
    with pytest.raises(InvalidInput, match="no examples"):
        ExactMatch().evaluate([])


def test_ck_24_25_the_small_ports_of_noop() -> None:
    found = adapters.noop()
    assert found["tokenizer_client"].get_tokenizer("any/model")("tin")["input_ids"]
    assert found["completer"].complete("one two") == "two"
    assert found["llm_client"].chat([{"role": "user", "content": "say"}]) == "say"
    one, same, other = found["embedding_client"].embed(["tin", "tin", "lead"])
    assert one == same != other
    assert math.hypot(*one) == pytest.approx(1.0)
    vectors = found["vector_store"]
    vectors.add([("tin", one), ("lead", other)])
    assert vectors.search(one, limit=1) == [("tin", pytest.approx(1.0))]


# -- presets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_ck_33_a_preset_without_configuration_refuses_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    preset = PRESETS[name]
    monkeypatch.delenv(preset.url_variable, raising=False)
    monkeypatch.delenv(preset.key_variable, raising=False)
    assert preset.tested
    assert preset.untested
    with pytest.raises(ConfigError, match=f"preset '{name}' is not configured"):
        adapters.tinker(preset=name)
    assert resolve_preset(name, base_url="http://127.0.0.1:1", api_key="k") == ("http://127.0.0.1:1", "k")


def test_ck_33_an_unknown_preset_is_named() -> None:
    with pytest.raises(ConfigError, match=r"preset 'modall' is none of .*did you mean 'modal'"):
        adapters.tinker(preset="modall")
    with pytest.raises(ConfigError, match="needs base_url or preset"):
        adapters.tinker()
