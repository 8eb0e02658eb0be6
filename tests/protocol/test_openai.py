"""OpenAI's own client against `tinsmith serve`, and what the Tinker API says of the same tokens."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest

from tests.protocol.conftest import ChatServer, running_server
from tests.protocol.taught import CALL, TOOL, teach_to_call
from tinsmith import ServiceClient
from tinsmith.client import SamplingClient
from tinsmith.types import AdamParams, ModelInput

WHO = [{"role": "user", "content": "Who are you?"}]


@pytest.fixture(scope="module")
def client(chat_server: ChatServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{chat_server.url}/v1", api_key="any", max_retries=0, timeout=60) as opened:
        yield opened


@pytest.fixture(scope="module")
def tinker(chat_server: ChatServer) -> Iterator[ServiceClient]:
    service = ServiceClient(base_url=chat_server.url, api_key="tml-local")
    yield service
    service.close()


@pytest.fixture(scope="module")
def base(tinker: ServiceClient, chat_server: ChatServer) -> SamplingClient:
    return tinker.create_sampling_client(base_model=chat_server.plain).result()


@pytest.fixture(scope="module")
def taught(tinker: ServiceClient, chat_server: ChatServer, client: openai.OpenAI) -> str:
    """Path of an adapter that calls a tool."""
    prompt = client.chat.completions.create(
        model=chat_server.with_tools, messages=WHO, tools=[TOOL], max_tokens=1, extra_body={"return_token_ids": True}
    ).prompt_token_ids
    return teach_to_call(tinker, chat_server.with_tools, prompt)


def test_a_chat_is_answered(client: openai.OpenAI, chat_server: ChatServer) -> None:
    got = client.chat.completions.create(model=chat_server.plain, messages=WHO, temperature=0, max_tokens=20)
    assert got.choices[0].message.content == "I am Tiny, a small language model."
    assert got.choices[0].finish_reason == "stop"
    assert got.usage.total_tokens == got.usage.prompt_tokens + got.usage.completion_tokens


def test_models_are_listed(client: openai.OpenAI, chat_server: ChatServer) -> None:
    assert [model.id for model in client.models.list()][:2] == [chat_server.plain, chat_server.with_tools]
    assert client.models.retrieve(chat_server.with_tools).id == chat_server.with_tools


def test_a_stream_comes_as_the_tokens_are_drawn(client: openai.OpenAI, chat_server: ChatServer) -> None:
    start = time.monotonic()
    arrived: list[float] = []
    ids: list[int] = []
    stream = client.chat.completions.create(
        model=chat_server.plain, messages=WHO, max_tokens=300, seed=3, stream=True,
        stream_options={"include_usage": True}, extra_body={"ignore_eos": True, "return_token_ids": True},
    )  # fmt: skip
    with stream:
        for chunk in stream:
            for choice in chunk.choices:
                ids += getattr(choice, "token_ids", [])
                arrived.append(time.monotonic() - start)
            usage = chunk.usage
    assert len(ids) == usage.completion_tokens == 300
    assert arrived[1] < arrived[-1] / 3, "the first token does not wait for the last"
    whole = client.chat.completions.create(
        model=chat_server.plain, messages=WHO, max_tokens=300, seed=3,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )  # fmt: skip
    assert ids == whole.choices[0].token_ids


def test_log_probs_of_an_answer_are_those_the_trainer_would_see(
    client: openai.OpenAI, chat_server: ChatServer, base: SamplingClient
) -> None:
    got = client.chat.completions.create(
        model=chat_server.plain, messages=WHO, max_tokens=30, seed=5, n=2, logprobs=True, top_logprobs=3,
        extra_body={"return_token_ids": True},
    )  # fmt: skip
    for choice in got.choices:
        prompt, tokens = got.prompt_token_ids, choice.token_ids
        expected = base.compute_logprobs(ModelInput.from_ints(prompt + tokens)).result()[len(prompt) :]
        scored = choice.logprobs.content
        assert np.abs(np.array([entry.logprob for entry in scored]) - expected).max() < 1e-3
        for entry in scored:
            best = [top.logprob for top in entry.top_logprobs]
            assert best == sorted(best, reverse=True)
            assert len(best) == 3
        text = b"".join(bytes(entry.bytes) for entry in scored).decode(errors="replace")
        assert text.removesuffix("<|im_end|>").startswith(choice.message.content.replace("\ufffd", "")[:5])


def test_completions_take_token_ids_and_give_them_back(client: openai.OpenAI, chat_server: ChatServer) -> None:
    prompts = [[523, 489], [5, 6, 7]]
    got = client.completions.create(
        model=chat_server.plain, prompt=prompts, max_tokens=6, n=2, seed=1, extra_body={"return_token_ids": True}
    )
    assert [choice.prompt_token_ids for choice in got.choices] == [prompts[0], prompts[0], prompts[1], prompts[1]]
    again = client.completions.create(
        model=chat_server.plain, prompt=prompts[1], max_tokens=6, n=2, seed=1, extra_body={"return_token_ids": True}
    )
    assert [choice.token_ids for choice in again.choices] == [choice.token_ids for choice in got.choices[2:]]


def test_stop_texts_end_answers(client: openai.OpenAI, chat_server: ChatServer) -> None:
    ask: dict[str, Any] = {"model": chat_server.plain, "messages": WHO, "temperature": 0, "max_tokens": 20}
    got = client.chat.completions.create(**ask, stop=["guage", "never"])
    assert got.choices[0].message.content == "I am Tiny, a small lan"
    assert got.choices[0].finish_reason == "stop"
    with client.chat.completions.create(**ask, stop="small", stream=True) as stream:
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "I am Tiny, a "


def test_a_prompt_is_scored_as_evaluation_harnesses_ask(chat_server: ChatServer, base: SamplingClient) -> None:
    """lm-evaluation-harness sends contexts with continuations as token ids and reads the last but one entries."""
    requests = [[523, 489, 300, 301], [5, 6, 7]]
    body = {
        "model": chat_server.plain, "prompt": requests, "temperature": 0, "max_tokens": 1, "logprobs": 1,
        "seed": 1234, "echo": True,
    }  # fmt: skip
    got = httpx2.post(f"{chat_server.url}/v1/completions", json=body, timeout=60).json()
    for tokens, choice in zip(requests, sorted(got["choices"], key=lambda c: c["index"]), strict=True):
        logprobs = choice["logprobs"]
        scored = logprobs["token_logprobs"][1:-1]
        expected = base.compute_logprobs(ModelInput.from_ints(tokens)).result()[1:]
        assert np.abs(np.array(scored) - expected).max() < 1e-3
        greedy = base.sample(
            ModelInput.from_ints(tokens[:-1]), 1, sampling_params(max_tokens=1, temperature=0)
        ).result().sequences[0].tokens[0]  # fmt: skip
        top = logprobs["top_logprobs"][-2]
        assert (logprobs["token_logprobs"][-2] == max(top.values())) == (greedy == tokens[-1])
    none = httpx2.post(f"{chat_server.url}/v1/completions", json=body | {"max_tokens": 0}, timeout=60).json()
    for without, choice in zip(none["choices"], got["choices"], strict=True):
        lone, scored = (c["logprobs"]["token_logprobs"] for c in (without, choice))
        assert lone[0] is scored[0] is None
        assert lone[1:] == pytest.approx(scored[1:-1], abs=1e-4)


def sampling_params(**fields: Any) -> Any:
    from tinsmith.types import SamplingParams

    return SamplingParams(**fields)


def test_recorded_trajectories_can_be_trained_on(
    client: openai.OpenAI, chat_server: ChatServer, tinker: ServiceClient, taught: str
) -> None:
    """The record holds what the trainer computes for the same tokens, and a policy gradient step on it is exact."""
    for turn in range(2):
        client.chat.completions.create(
            model=taught, messages=[{"role": "user", "content": f"Turn {turn}"}], max_tokens=12, n=2,
            extra_headers={"X-Conversation-Id": "episode"},
        )  # fmt: skip
    kept = chat_server.recorded("episode")
    assert len(kept) == 4
    trainer = tinker.create_training_client_from_state(taught.replace("sampler_weights", "weights")).result()
    sampler = tinker.create_sampling_client(model_path=taught).result()
    assert len({one.adapter_digest for one in kept}) == 1
    for one in kept:
        assert one.model == taught
        tokens = [*one.prompt_tokens, *one.tokens]
        expected = sampler.compute_logprobs(ModelInput.from_ints(tokens)).result()[len(one.prompt_tokens) :]
        assert np.abs(np.array(one.logprobs) - expected).max() < 1e-3
    output = trainer.forward_backward([one.datum(1.0) for one in kept], "importance_sampling").result()
    for one, datum in zip(kept, output.loss_fn_outputs, strict=True):
        drawn = datum["logprobs"].to_numpy()[-len(one.tokens) :]
        assert np.abs(drawn - np.array(one.logprobs)).max() < 1e-3
    assert output.loss_sum == pytest.approx(-sum(len(one.tokens) for one in kept), rel=1e-3), "every ratio is 1"
    trainer.optim_step(AdamParams(learning_rate=1e-4)).result()


def test_tools_go_through_the_template_and_calls_come_back(client: openai.OpenAI, taught: str) -> None:
    ask: dict[str, Any] = {"model": taught, "messages": WHO, "tools": [TOOL], "temperature": 0, "max_tokens": 60}
    got = client.chat.completions.create(**ask)
    assert got.choices[0].finish_reason == "tool_calls"
    (call,) = got.choices[0].message.tool_calls
    assert {"name": call.function.name, "arguments": json.loads(call.function.arguments)} == CALL
    with client.chat.completions.create(**ask, stream=True) as stream:
        deltas = [chunk.choices[0] for chunk in stream]
    (streamed,) = [call for delta in deltas for call in delta.delta.tool_calls or []]
    assert json.loads(streamed.function.arguments) == CALL["arguments"]
    assert deltas[-1].finish_reason == "tool_calls"
    history = [*WHO, got.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "A teapot."}]
    assert client.chat.completions.create(**(ask | {"messages": history})).choices[0].message.role == "assistant"


def test_errors_are_the_clients_own(client: openai.OpenAI, chat_server: ChatServer) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=chat_server.plain, messages=WHO, presence_penalty=1)
    assert refused.value.param == "presence_penalty"
    assert "not supported" in refused.value.message
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-5", messages=WHO)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=chat_server.plain, prompt=[5] * 2000, max_tokens=100)
    assert long.value.code == "context_length_exceeded"


def test_a_caller_that_leaves_stops_the_drawing(chat_server: ChatServer) -> None:
    """What is drawn to its end is recorded; what its caller has left is not."""
    body = {"model": chat_server.plain, "messages": WHO, "max_tokens": 400, "ignore_eos": True}
    url = f"{chat_server.url}/v1/chat/completions"
    with httpx2.Client(timeout=30) as http:
        http.post(url, json=body, headers={"X-Conversation-Id": "stayed"}).raise_for_status()
        started = time.monotonic()
        http.post(url, json=body, headers={"X-Conversation-Id": "stayed"}).raise_for_status()
        duration = time.monotonic() - started
        left = {"X-Conversation-Id": "left"}
        with http.stream("POST", url, json=body | {"stream": True}, headers=left) as response:
            next(response.iter_lines())
        with pytest.raises(httpx2.TimeoutException):
            http.post(url, json=body, headers=left, timeout=duration / 5)
        time.sleep(2 * duration + 0.5)
    assert len(chat_server.recorded("stayed")) == 2
    assert chat_server.recorded("left") == []


def test_many_streams_at_once(chat_server: ChatServer) -> None:
    async def one(client: openai.AsyncOpenAI, seed: int) -> str:
        stream = await client.chat.completions.create(
            model=chat_server.plain, messages=WHO, max_tokens=20, seed=seed, stream=True, temperature=3
        )
        async with stream:
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{chat_server.url}/v1", api_key="any", timeout=60) as client:
            return await asyncio.gather(*(one(client, seed % 8) for seed in range(24)))

    texts = asyncio.run(all_of_them())
    assert texts[:8] == texts[8:16] == texts[16:], "company changes nothing"
    assert len(set(texts)) > 1


def test_a_signal_ends_a_server_in_the_middle_of_a_stream(tmp_path: Path) -> None:
    body = {"model": "tinsmith/tiny", "messages": WHO, "max_tokens": 1900, "ignore_eos": True, "stream": True}
    with running_server(tmp_path, "--dtype", "float32") as server, httpx2.Client(timeout=30) as http:
        with http.stream("POST", f"{server.url}/v1/chat/completions", json=body) as response:
            lines = (line for line in response.iter_lines() if line)
            next(lines)
            server.process.send_signal(signal.SIGINT)
            last = list(lines)[-1]
        assert "the server is stopping" in json.loads(last.removeprefix("data: "))["error"]["message"]
        assert server.process.wait(15) == 0
