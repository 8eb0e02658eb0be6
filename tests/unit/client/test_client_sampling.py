"""Samples, scores, backpressure, and clients in other processes."""

from __future__ import annotations

import asyncio
import http.server
import json
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx2
import numpy as np
import pytest

from tests.unit.client.fake_tinker import FAST, FakeTinker, answer, no_connection, status
from tinsmith import types
from tinsmith.client import (
    APIConnectionError,
    APIResponseValidationError,
    ConfigurationError,
    InternalServerError,
    RequestFailedError,
    RetryConfig,
    SamplingClient,
    ServiceClient,
    TinkerError,
    TrainingClient,
)
from tinsmith.client.sampling import CLONE_BLOCK
from tinsmith.client.tokenizer import tokenizer_source
from tinsmith.models import tiny_folder

PROMPT = types.ModelInput.from_ints([5, 6, 7])
PARAMS = types.SamplingParams(max_tokens=3, temperature=0.5, stop=["\n"])


def test_a_sample_has_tokens_logprobs_reasons_and_ids(sampling: SamplingClient, server: FakeTinker) -> None:
    response = sampling.sample(prompt=PROMPT, num_samples=2, sampling_params=PARAMS).result(5)
    assert [(s.tokens, s.logprobs, s.stop_reason, s.sequence_id) for s in response.sequences] == [
        ([1, 2, 3], [-0.5] * 3, "length", "s:sample:0:0:0"),
        ([1, 2, 3], [-0.5] * 3, "length", "s:sample:0:0:1"),
    ]
    assert response.prompt_logprobs is None
    assert server.of("asample")[0].body == {
        "sampling_session_id": "s:sample:0",
        "seq_id": 0,
        "num_samples": 2,
        "prompt": {"chunks": [{"tokens": [5, 6, 7], "type": "encoded_text"}]},
        "sampling_params": {"max_tokens": 3, "stop": ["\n"], "temperature": 0.5, "top_k": -1, "top_p": 1.0},
        "prompt_logprobs": False,
        "topk_prompt_logprobs": 0,
        "topk_sample_logprobs": 0,
        "prompt_alt_tokens_k": 0,
        "record_stability_info": False,
        "type": "sample",
    }
    assert server.of("asample")[0].headers["x-tinker-sampling-backpressure"] == "1"


def test_scoring_a_prompt_gives_one_number_per_token_and_none_for_the_first(
    sampling: SamplingClient, server: FakeTinker
) -> None:
    assert sampling.compute_logprobs(PROMPT).result(5) == [None, -0.25, -0.25]
    body = server.of("asample")[0].body
    assert (body["num_samples"], body["sampling_params"]["max_tokens"], body["prompt_logprobs"]) == (1, 1, True)


def test_many_samples_take_distinct_numbers(sampling: SamplingClient, server: FakeTinker) -> None:
    for future in [sampling.sample(PROMPT, 1, PARAMS) for _ in range(100)]:
        future.result(5)
    assert sorted(server.submitted()) == list(range(100))


def test_target_logprobs_travel_as_an_integer_matrix(sampling: SamplingClient, server: FakeTinker) -> None:
    sampling.sample(PROMPT, 1, PARAMS, target_prompt_logprobs=np.array([[1], [2]])).result(5)
    assert server.of("asample")[0].body["target_prompt_logprobs"] == {
        "data": [1, 2], "dtype": "int64", "shape": [2, 1]
    }  # fmt: skip
    with pytest.raises(ValueError, match="must be int64 of shape"):
        sampling.sample(PROMPT, 1, PARAMS, target_prompt_logprobs=np.array([1.0])).result(5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": [1, 2]}, "prompt must be a ModelInput, not list"),
        ({"num_samples": 0}, "num_samples must be at least 1, not 0"),
        ({"num_samples": None}, "num_samples must be at least 1, not None"),
        ({"num_samples": True}, "num_samples must be a whole number, not True"),
        ({"num_samples": "2"}, "num_samples must be a whole number, not '2'"),
        ({"topk_sample_logprobs": 1.5}, r"topk_sample_logprobs must be a whole number, not 1\.5"),
        ({"sampling_params": {"max_tokens": 1}}, "sampling_params must be a SamplingParams, not dict"),
        ({"prompt_logprobs_last_n": 1}, "needs include_prompt_logprobs"),
        ({"sampling_params": types.SamplingParams(temperature=float("inf"))}, r"sampling_params\.temperature = inf"),
    ],
)
def test_bad_arguments_fail_before_anything_is_sent(
    sampling: SamplingClient, server: FakeTinker, arguments: dict[str, object], message: str
) -> None:
    given = {"prompt": PROMPT, "num_samples": 1, "sampling_params": PARAMS, **arguments}
    with pytest.raises(ValueError, match=message):
        sampling.sample(**given).result(5)  # type: ignore[arg-type]
    assert server.seen == []


def test_whole_numbers_may_be_numpys(sampling: SamplingClient, server: FakeTinker) -> None:
    sampling.sample(PROMPT, np.int64(2), PARAMS, topk_sample_logprobs=np.int32(3)).result(5)  # type: ignore[arg-type]
    body = server.of("asample")[0].body
    assert (body["num_samples"], body["topk_sample_logprobs"]) == (2, 3)


def test_a_full_server_is_offered_the_same_number_again(sampling: SamplingClient, server: FakeTinker) -> None:
    server.script("asample", status(429), status(429))
    sampling.sample(PROMPT, 1, PARAMS).result(5)
    assert server.submitted() == [0, 0, 0]


def test_a_failed_sample_is_tried_again_under_a_new_number(sampling: SamplingClient, server: FakeTinker) -> None:
    """Once the retries of the submit itself are used up."""
    server.always["asample"] = no_connection()
    sampling._retry = RetryConfig(retry_delay_base=0.01)
    future = sampling.sample(PROMPT, 1, PARAMS)
    with pytest.raises(TimeoutError):
        future.result(0.8)
    server.always.clear()
    future.result(5)
    numbers = server.submitted()
    assert numbers[0] == 0
    assert max(numbers) >= 1


def test_retries_can_be_switched_off_and_end_without_progress(sampling: SamplingClient, server: FakeTinker) -> None:
    server.always["asample"] = status(503)
    sampling._retry = RetryConfig(enable_retry_logic=False)
    with pytest.raises(InternalServerError):
        sampling.sample(PROMPT, 1, PARAMS).result(5)
    sampling._retry = RetryConfig(progress_timeout=0.1, retry_delay_base=0.01)
    with pytest.raises(InternalServerError):
        sampling.sample(PROMPT, 1, PARAMS).result(5)


def test_failures_of_the_request_itself_are_not_tried_again(sampling: SamplingClient, server: FakeTinker) -> None:
    server.results["s:sample:0:0"] = {"error": "prompt too long", "category": "user"}
    with pytest.raises(RequestFailedError, match="prompt too long"):
        sampling.sample(PROMPT, 1, PARAMS).result(5)
    assert server.submitted() == [0]


def test_an_acknowledgement_without_sequence_ids_is_a_validation_error(
    sampling: SamplingClient, server: FakeTinker
) -> None:
    async def forget_ids(fake: FakeTinker, seen: object) -> httpx2.Response:
        response = await fake.usual(seen)  # type: ignore[arg-type]
        return httpx2.Response(200, json={"request_id": response.json()["request_id"]})

    server.script("asample", forget_ids)
    with pytest.raises(APIResponseValidationError, match="without sample_sequence_ids"):
        sampling.sample(PROMPT, 1, PARAMS).result(5)


def test_alternatives_that_were_asked_for_and_did_not_come_are_an_error(sampling: SamplingClient) -> None:
    with pytest.raises(TinkerError, match="no prompt_alt_tokens"):
        sampling.sample(PROMPT, 1, PARAMS, prompt_alt_tokens_k=2).result(5)


def test_samples_under_way_are_limited(service: ServiceClient, server: FakeTinker) -> None:
    sampling = service.create_sampling_client(base_model="m", retry_config=RetryConfig(max_connections=3)).result(5)
    under_way, most = 0, 0

    async def count(_: FakeTinker, __: object) -> None:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.005)
        under_way -= 1

    server.always["asample"] = count
    for future in [sampling.sample(PROMPT, 1, PARAMS) for _ in range(20)]:
        future.result(5)
    assert most == 3


def test_retry_settings_are_checked_and_jitter_stays_in_its_bounds() -> None:
    with pytest.raises(ValueError, match="max_connections must be positive, not 0"):
        RetryConfig(max_connections=0)
    delays = [RetryConfig().delay(3) for _ in range(200)]
    assert 3.0 <= min(delays) < max(delays) <= 5.0
    assert max(RetryConfig().delay(99) for _ in range(50)) <= 12.5


# ---- where samplers come from ----


def test_a_sampler_of_a_checkpoint_asks_for_its_base_model(service: ServiceClient, server: FakeTinker) -> None:
    path = "tinker://s:train:0/sampler_weights/a"
    sampling = service.create_sampling_client(path).result(5)
    assert sampling.get_base_model() == "tinsmith/tiny"
    assert server.of("create_sampling_session")[0].body == {
        "session_id": "s", "sampling_session_seq_id": 0, "model_path": path, "type": "create_sampling_session"
    }  # fmt: skip
    assert len(server.of("samplers/s:sample:0")) == 1
    both = service.create_sampling_client(path, "other").result(5)
    assert both.get_base_model() == "other"
    assert server.of("create_sampling_session")[1].body["base_model"] == "other"
    with pytest.raises(ValueError, match="needs a model_path or a base_model"):
        service.create_sampling_client()
    with pytest.raises(ValueError, match="not a checkpoint path"):
        service.create_sampling_client("a/b").result(5)


def test_a_sampler_of_the_current_weights_needs_no_further_call(training: TrainingClient, server: FakeTinker) -> None:
    training.optim_step(types.AdamParams())
    sampling = training.save_weights_and_get_sampling_client("ignored").result(5)
    assert server.of("save_weights_for_sampler")[0].body == {
        "sampling_session_seq_id": 0, "kind": "snapshot", "model_id": "s:train:0", "seq_id": 2,
        "type": "save_weights_for_sampler",
    }  # fmt: skip
    assert sampling.get_base_model() == "tinsmith/tiny"
    assert sampling.get_tokenizer().decode(sampling.get_tokenizer().encode("hello")) == "hello"
    assert [seen.path for seen in server.seen if seen.path not in ("retrieve_future", "optim_step")] == [
        "save_weights_for_sampler"
    ]


def test_a_tokenizer_the_server_names_wins_and_is_asked_for_once(
    service: ServiceClient, server: FakeTinker, tmp_path: Path
) -> None:
    folder = tmp_path / "a" / "b"
    shutil.copytree(tiny_folder(), folder)
    reply = {"sampler_id": "s:sample:0", "base_model": "my/alias", "tokenizer_id": str(folder)}
    server.always["samplers/s:sample:0"] = answer(reply)
    sampling = service.create_sampling_client(base_model="my/alias").result(5)
    assert sampling.get_tokenizer() is sampling.get_tokenizer()
    assert sampling.get_tokenizer().name_or_path == str(folder)
    assert len(server.of("samplers/s:sample:0")) == 1


@pytest.mark.parametrize(
    ("tokenizer_id", "base_model", "source"),
    [
        (None, "tinsmith/tiny", str(tiny_folder())),
        (None, "Qwen/Qwen3-8B:long", "Qwen/Qwen3-8B"),
        (None, "meta-llama/Llama-3.2-1B", "thinkingmachineslabinc/meta-llama-3-instruct-tokenizer"),
        ("meta-llama/Llama-3.2-1B", "x", "meta-llama/Llama-3.2-1B"),
        ("Qwen/Qwen3-8B", "alias", "Qwen/Qwen3-8B"),
    ],
)
def test_tokenizers_are_found_where_they_are(tokenizer_id: str | None, base_model: str, source: str) -> None:
    assert tokenizer_source(tokenizer_id, base_model) == source


# ---- other processes ----


@pytest.fixture
def address(server: FakeTinker) -> Iterator[str]:
    """The fake server on a real port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["content-length"] or 0))
            path = self.path.partition("/api/v1/")[2]
            response = asyncio.run(server.handle(path, httpx2.Headers(dict(self.headers)), content))
            self.send_response(response.status_code)
            self.send_header("content-type", response.headers.get("content-type", "application/json"))
            self.send_header("content-length", str(len(response.content)))
            self.end_headers()
            self.wfile.write(response.content)

        def log_message(self, *_: object) -> None:
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()
    thread.join()


def test_an_unpickled_client_samples_on_the_same_session_with_numbers_of_its_own(
    address: str, server: FakeTinker
) -> None:
    with ServiceClient(base_url=address, api_key="tml-k", timing=FAST) as service:
        sampling = service.create_sampling_client(base_model="tinsmith/tiny").result(5)
        sampling.sample(PROMPT, 1, PARAMS).result(5)
        server.rewind()
        clone = pickle.loads(pickle.dumps(sampling))
        clone.sample(PROMPT, 1, PARAMS).result(5)
        clone.sample(PROMPT, 1, PARAMS).result(5)
        first, second = server.submitted()
        assert CLONE_BLOCK <= first < CLONE_BLOCK**2
        assert (first % CLONE_BLOCK, second) == (0, first + 1)
        assert clone.get_base_model() == "tinsmith/tiny"
        assert [seen.path for seen in server.seen[:1]] == ["asample"]
        assert server.of("asample")[0].headers["x-api-key"] == "tml-k"
        clone._connection.close("success", None).result(5)
    assert len(server.of("sessions/s/finish")) == 1


def test_a_clone_asks_for_its_block_of_numbers_where_the_server_gives_them(address: str, server: FakeTinker) -> None:
    server.flags = {"sample_join_sampling_session": True}
    with ServiceClient(base_url=address, timing=FAST) as service:
        sampling = service.create_sampling_client(base_model="tinsmith/tiny").result(5)
        handle = sampling.get_sampler_handle()
        clone = SamplingClient.from_sampler_handle(handle)
        futures = [clone.sample(PROMPT, 1, PARAMS) for _ in range(3)]
        assert len([future.result(5) for future in futures]) == 3
        assert sorted(server.submitted()) == [7 * CLONE_BLOCK + i for i in range(3)]
        assert len(server.of("join_sampling_session")) == 1
        clone._connection.close("success", None).result(5)


def test_a_handle_holds_no_key_and_nonsense_is_refused(address: str) -> None:
    import base64

    with ServiceClient(base_url=address, api_key="tml-hidden", timing=FAST) as service:
        handle = service.create_sampling_client(base_model="m").result(5).get_sampler_handle()
    assert "tml-hidden" not in base64.urlsafe_b64decode(handle).decode()
    assert json.loads(base64.urlsafe_b64decode(handle))["sampling_session_id"] == "s:sample:0"
    for nonsense in ("", "????", base64.urlsafe_b64encode(b"[1]").decode(), base64.urlsafe_b64encode(b"{}").decode()):
        with pytest.raises(ValueError, match="not a sampler handle"):
            SamplingClient.from_sampler_handle(nonsense)


def test_a_pickled_client_works_in_another_process(address: str, server: FakeTinker) -> None:
    program = """
import pickle, sys
from tinsmith import types
client = pickle.loads(sys.stdin.buffer.read())
prompt, params = types.ModelInput.from_ints([1]), types.SamplingParams(max_tokens=3)
print(client.sample(prompt, 1, params).result(5).sequences[0].tokens)
"""
    with ServiceClient(base_url=address, timing=FAST) as service:
        state = pickle.dumps(service.create_sampling_client(base_model="m"))
        done = subprocess.run([sys.executable, "-c", program], input=state, capture_output=True, timeout=30, check=True)
    assert done.stdout.decode().strip() == "[1, 2, 3]"


def test_a_client_of_an_embedded_server_refuses_to_work_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    server = FakeTinker()
    with ServiceClient(base_url="local:", timing=FAST, transport=server) as service:
        state = pickle.dumps(service.create_sampling_client(base_model="m").result(5))
    monkeypatch.setattr("os.getpid", lambda: -1)
    with pytest.raises(ConfigurationError, match="embedded in process") as refusal:
        pickle.loads(state)
    assert "tinsmith serve" in str(refusal.value)


def test_connection_errors_name_the_address_and_not_the_key() -> None:
    with ServiceClient(base_url="http://127.0.0.1:9", api_key="tml-hidden", timing=FAST) as service:
        with pytest.raises(APIConnectionError, match=r"http://127\.0\.0\.1:9") as failure:
            service.create_sampling_client(base_model="m").result(5)
    assert "tml-hidden" not in repr(failure.value.request.headers)
