"""The OpenAI dialect over a fake engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.server.chat_server import HELLO, answer, decoded, events, hermes_folder, post, samples, say, tiny_card
from tests.unit.server.tinker_client import Client, OpenServer
from tinsmith.runtime.fake import FAKE_CARD
from tinsmith.types.errors import ServerError, UserError
from tinsmith.types.operations import CancelSample, Sample

pytestmark = pytest.mark.anyio

CHAT, COMPLETIONS = "chat/completions", "completions"


@pytest.fixture
async def chat(open_server: OpenServer) -> AsyncIterator[Client]:
    async with open_server(card=tiny_card()) as opened:
        yield opened


async def test_a_chat_is_answered(chat: Client) -> None:
    body = {"messages": HELLO, "max_tokens": 5, "seed": 3, "temperature": 0.7, "top_p": 0.9, "top_k": 40}
    got = await answer(chat.http, CHAT, body)
    (choice,) = got["choices"]
    assert got["object"] == "chat.completion"
    assert choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] == "length"
    assert got["usage"] | {"prompt_tokens_details": 0} == {
        "prompt_tokens": len(samples(chat)[0].prompt),
        "completion_tokens": 5,
        "total_tokens": len(samples(chat)[0].prompt) + 5,
        "prompt_tokens_details": 0,
    }
    (drawn,) = samples(chat)
    assert (drawn.seed, drawn.temperature, drawn.top_p, drawn.top_k) == (3, 0.7, 0.9, 40)
    assert drawn.stop_token_ids == (2, 0)
    assert not drawn.stream


async def test_the_same_seed_gives_the_same_text_in_pieces(chat: Client) -> None:
    body = {"messages": HELLO, "max_tokens": 12, "seed": 3, "n": 2, "logprobs": True, "top_logprobs": 2}
    whole = await answer(chat.http, CHAT, body)
    chunks = await events(chat.http, CHAT, body | {"stream_options": {"include_usage": True}})
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == whole["usage"]
    for index, choice in enumerate(whole["choices"]):
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(c["delta"].get("content", "") for c in mine) == choice["message"]["content"]
        assert [c["finish_reason"] for c in mine] == [None] * (len(mine) - 1) + [choice["finish_reason"]]
        scored = [entry for c in mine if c["logprobs"] for entry in c["logprobs"]["content"]]
        assert scored == choice["logprobs"]["content"]
        assert len(scored) == 12
        assert all(len(entry["top_logprobs"]) == 2 for entry in scored)


async def test_token_ids_come_on_request(chat: Client) -> None:
    body = {"messages": HELLO, "max_tokens": 4, "return_token_ids": True, "seed": 1}
    whole = await answer(chat.http, CHAT, body)
    assert whole["prompt_token_ids"] == samples(chat)[0].prompt.tolist()
    chunks = await events(chat.http, CHAT, body)
    assert chunks[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    streamed = [token for chunk in chunks for c in chunk["choices"] for token in c.get("token_ids", [])]
    assert streamed == whole["choices"][0]["token_ids"]
    named = await answer(chat.http, CHAT, body | {"logprobs": True, "return_tokens_as_token_ids": True})
    assert [e["token"] for e in named["choices"][0]["logprobs"]["content"]] == [f"token_id:{t}" for t in streamed]


async def test_a_completion_takes_text_or_token_ids_or_lists_of_them(chat: Client) -> None:
    text = "Hello there"
    ids = [523, 489]
    for prompt in (text, [text], ids, [ids]):
        got = await answer(chat.http, COMPLETIONS, {"prompt": prompt, "max_tokens": 3, "seed": 1})
        assert len(got["choices"]) == 1
        assert samples(chat)[-1].prompt.tolist() == ids
    got = await answer(chat.http, COMPLETIONS, {"prompt": [ids, [5], ids], "n": 2, "max_tokens": 3, "seed": 1})
    assert [choice["index"] for choice in got["choices"]] == list(range(6))
    texts = [choice["text"] for choice in got["choices"]]
    assert texts[:2] == texts[4:]
    assert texts[0] != texts[2]
    chunks = await events(chat.http, COMPLETIONS, {"prompt": [ids, [5], ids], "n": 2, "max_tokens": 3, "seed": 1})
    joined = ["".join(c["text"] for k in chunks for c in k["choices"] if c["index"] == i) for i in range(6)]
    assert joined == texts


async def test_a_prompt_can_be_scored_as_evaluation_harnesses_do(chat: Client) -> None:
    """`echo` with `logprobs`, one token or none; the first token has no log-probability."""
    body = {"prompt": [[5, 7, 11], [523, 489]], "echo": True, "logprobs": 1, "temperature": 0}
    one = await answer(chat.http, COMPLETIONS, body | {"max_tokens": 1})
    none = await answer(chat.http, COMPLETIONS, body | {"max_tokens": 0})
    for ids, scored, bare in zip(body["prompt"], one["choices"], none["choices"], strict=True):
        logprobs = scored["logprobs"]
        assert len(logprobs["tokens"]) == len(ids) + 1
        assert logprobs["token_logprobs"][0] is None
        assert logprobs["top_logprobs"][0] is None
        assert all(lp < 0 for lp in logprobs["token_logprobs"][1:])
        columns = [logprobs[k][1:] for k in ("tokens", "token_logprobs", "top_logprobs")]
        for token, lp, top in zip(*columns, strict=True):
            assert top[token] == lp, "the chosen token is among the likely ones, with the same value"
            assert max(top.values()) >= lp
        assert bare["logprobs"]["token_logprobs"] == logprobs["token_logprobs"][:-1]
        assert bare["text"] == scored["text"][: len(bare["text"])]
        offsets, tokens = bare["logprobs"]["text_offset"], bare["logprobs"]["tokens"]
        assert [bare["text"][at : at + len(t)] for at, t in zip(offsets, tokens, strict=True)] == tokens
    assert none["usage"]["completion_tokens"] == 0
    assert one["choices"][1]["text"].startswith("Hello there")


async def test_a_streamed_echo_begins_with_the_scored_prompt(chat: Client) -> None:
    body = {"prompt": "Hello there", "echo": True, "logprobs": 1, "max_tokens": 2, "seed": 4, "return_token_ids": True}
    whole = (await answer(chat.http, COMPLETIONS, body))["choices"][0]
    chunks = [c for chunk in await events(chat.http, COMPLETIONS, body) for c in chunk["choices"]]
    assert chunks[0]["text"] == "Hello there"
    assert chunks[0]["prompt_token_ids"] == [523, 489]
    assert "".join(c["text"] for c in chunks) == whole["text"]
    for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [value for c in chunks for value in c["logprobs"][key]] == whole["logprobs"][key]


async def test_a_stop_text_ends_the_answer_and_is_not_part_of_it(chat: Client) -> None:
    plain = (await answer(chat.http, COMPLETIONS, {"prompt": "Hi", "max_tokens": 8, "seed": 2}))["choices"][0]["text"]
    # the fake engine stops by letters of its own: only what the text says is tried here
    stop = plain[5:8]
    body = {"prompt": "Hi", "max_tokens": 8, "seed": 2, "stop": [stop, "never"], "ignore_eos": True}
    await answer(chat.http, COMPLETIONS, body)
    assert samples(chat)[-1].stop_strings == (stop, "never")
    assert samples(chat)[-1].stop_token_ids == ()
    await answer(chat.http, COMPLETIONS, {"prompt": "Hi", "max_tokens": 8, "stop": "x", "stop_token_ids": [9]})
    assert samples(chat)[-1].stop_token_ids == (2, 0, 9)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, {"frequency_penalty": 0.5}, "frequency_penalty"),
    (CHAT, {"response_format": {"type": "json_object"}}, "response_format"),
    (CHAT, {"tool_choice": "required"}, "tool_choice"),
    (CHAT, {"reasoning_effort": "high"}, "reasoning_effort"),
    (CHAT, {"logit_bias": {"5": 1}}, "logit_bias"),
    (CHAT, {"no_such_field": 1}, "no_such_field"),
    (CHAT, {"top_logprobs": 2}, "top_logprobs"),
    (CHAT, {"temperature": -1}, "temperature"),
    (CHAT, {"top_p": 0}, "top_p"),
    (CHAT, {"top_k": 5000}, "top_k"),
    (CHAT, {"n": 0}, "n"),
    (CHAT, {"max_tokens": 0}, "max_tokens"),
    (CHAT, {"max_completion_tokens": 100_000}, "max_completion_tokens"),
    (CHAT, {"stop": [""]}, "stop"),
    (CHAT, {"stop": 5}, "stop"),
    (CHAT, {"stop_token_ids": [1536]}, "stop_token_ids"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
    (CHAT, {"messages": [{"role": "user", "content": "x", "audio": {}}]}, "messages[0].audio"),
    (CHAT, {"messages": [*HELLO, {"role": "critic", "content": "x"}]}, "messages[1].role"),
    (CHAT, {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    (CHAT, {"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
    (CHAT, {"model": "tinker://broken"}, "model"),
    (COMPLETIONS, {"best_of": 3}, "best_of"),
    (COMPLETIONS, {"suffix": "after"}, "suffix"),
    (COMPLETIONS, {"prompt": [5, 1536]}, "prompt"),
    (COMPLETIONS, {"prompt": [[5], [-1]]}, "prompt[1]"),
    (COMPLETIONS, {"prompt": []}, "prompt"),
    (COMPLETIONS, {"prompt": "Hi", "max_tokens": 300}, "max_tokens"),
    (COMPLETIONS, {"prompt": [5] * 256}, "prompt"),
    (COMPLETIONS, {"logprobs": 129}, "logprobs"),
]


@pytest.mark.parametrize(("path", "fields", "param"), REFUSED, ids=[f"{p[:4]}-{f}" for p, _, f in REFUSED])
async def test_what_cannot_be_done_is_refused_by_name(
    chat: Client, path: str, fields: dict[str, Any], param: str
) -> None:
    valid = {"messages": HELLO} if path == CHAT else {"prompt": "Hi"}
    for stream in (False, True):
        response = await post(chat.http, path, valid | {"stream": stream} | fields)
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert (error["type"], error["param"]) == ("invalid_request_error", param), error
        assert param.split("[")[0].split(".")[-1] in error["message"]
    assert samples(chat) == []


async def test_half_a_character_reaches_no_engine(chat: Client) -> None:
    """It would be the death of a real one, and of everybody's samples in it."""
    for path, fields in (
        (CHAT, {"messages": HELLO, "stop": ["a\ud800"]}),
        (COMPLETIONS, {"prompt": "Hi", "stop": "\ud800"}),
        ("messages", {"messages": HELLO, "max_tokens": 2, "stop_sequences": ["b", "\udfff"]}),
    ):
        body = json.dumps({"model": chat.engine.card.name, **fields})
        answer = await chat.http.post(f"/v1/{path}", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400, answer.text
        assert "surrogate" in answer.json()["error"]["message"]
    assert samples(chat) == []


async def test_tools_that_are_nested_too_deeply_are_refused(chat: Client) -> None:
    deep: list[Any] = []
    for _ in range(500):
        deep = [deep]
    tool = {"type": "function", "function": {"name": "f", "parameters": {"enum": deep}}}
    response = await post(chat.http, CHAT, {"messages": HELLO, "tools": [tool]})
    assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error")
    assert "nested" in response.json()["error"]["message"]


async def test_options_of_a_stream_need_a_stream(chat: Client) -> None:
    response = await post(chat.http, CHAT, {"messages": HELLO, "stream_options": {"include_usage": True}})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "stream_options")


async def test_what_asks_for_nothing_is_no_error(chat: Client) -> None:
    idle = {
        "user": "me", "metadata": {"a": "b"}, "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {},
        "response_format": {"type": "text"}, "store": False, "service_tier": "auto", "parallel_tool_calls": True,
        "tool_choice": "auto", "tools": None, "stop": None, "seed": None, "functions": None, "anything_else": None,
    }  # fmt: skip
    assert (await answer(chat.http, CHAT, {"messages": HELLO, "max_tokens": 2} | idle))["choices"]


async def test_an_unknown_model_is_named(chat: Client) -> None:
    for model in ("gpt-5", "tinker://sess-1:train:0/sampler_weights/none"):
        response = await post(chat.http, CHAT, {"messages": HELLO, "model": model})
        assert response.status_code == 404
        assert response.json()["error"] | {"message": ""} == {
            "message": "", "type": "invalid_request_error", "param": "model", "code": "model_not_found"
        }  # fmt: skip
        assert model in response.json()["error"]["message"]


async def test_a_context_that_is_too_short_has_its_code(chat: Client) -> None:
    response = await post(chat.http, CHAT, {"messages": HELLO, "max_tokens": 1000})
    assert response.json()["error"]["code"] == "context_length_exceeded"
    got = await answer(chat.http, CHAT, {"messages": HELLO, "ignore_eos": True})
    assert got["usage"]["total_tokens"] == FAKE_CARD.max_context, "without a limit the answer may fill the context"


@pytest.mark.parametrize(("method", "path", "status"), [("POST", "embeddings", 404), ("GET", "completions", 405)])
async def test_what_is_not_there_is_told_in_the_dialect(chat: Client, method: str, path: str, status: int) -> None:
    response = await chat.http.request(method, f"/v1/{path}")
    assert response.status_code == status
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert f"/v1/{path}" in response.json()["error"]["message"]


async def test_a_body_that_is_no_json_is_a_400_in_the_dialect(chat: Client) -> None:
    response = await chat.http.post(
        "/v1/completions", content=b"{nonsense", headers={"content-type": "application/json"}
    )
    assert response.status_code == 400
    assert "JSON" in response.json()["error"]["message"]


async def test_tool_calls_are_parsed_back(open_server: OpenServer, tmp_path: Path) -> None:
    """The fake engine draws no such text, so the answer is put into its mouth."""
    card = tiny_card(hermes_folder(tmp_path / "hermes"))
    async with open_server(card=card) as chat:
        said = 'Let me see.\n<tool_call>\n{"name": "look", "arguments": {"where": "here"}}\n</tool_call><|im_end|>'
        say(chat, said)
        tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
        body = {"messages": HELLO, "tools": [tool]}
        (choice,) = (await answer(chat.http, CHAT, body))["choices"]
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] == "Let me see."
        (call,) = choice["message"]["tool_calls"]
        assert (call["type"], call["function"]["name"]) == ("function", "look")
        assert json.loads(call["function"]["arguments"]) == {"where": "here"}

        chunks = [c for chunk in await events(chat.http, CHAT, body) for c in chunk["choices"]]
        assert "".join(c["delta"].get("content") or "" for c in chunks) == "Let me see."
        (streamed,) = [call for c in chunks for call in c["delta"].get("tool_calls", [])]
        assert streamed | {"id": call["id"]} == {"index": 0, **call}
        assert chunks[-1]["finish_reason"] == "tool_calls"

        unread = (await answer(chat.http, CHAT, body | {"tool_choice": "none"}))["choices"][0]
        assert "<tool_call>" in unread["message"]["content"], "nobody asked for calls"

        history = [
            *HELLO, choice["message"], {"role": "tool", "tool_call_id": call["id"], "content": "A teapot."}
        ]  # fmt: skip
        await answer(chat.http, CHAT, {"messages": history, "tools": [tool]})
        prompt = await decoded(chat, samples(chat)[-1])
        assert '{"name": "look", "arguments": {"where": "here"}}' in prompt
        assert "<|im_start|>tool\nA teapot.<|im_end|>" in prompt


async def test_a_stop_text_in_a_chat_is_cut_in_pieces_too(chat: Client) -> None:
    say(chat, "one two three")
    for body in ({"messages": HELLO, "stop": " three"}, {"messages": HELLO, "stop": ["two three", "zzz"]}):
        whole = (await answer(chat.http, CHAT, body))["choices"][0]
        chunks = [c for chunk in await events(chat.http, CHAT, body) for c in chunk["choices"]]
        expected = "one two" if body["stop"] == " three" else "one "
        assert whole["message"]["content"] == expected
        assert "".join(c["delta"].get("content", "") for c in chunks) == expected
        assert whole["finish_reason"] == chunks[-1]["finish_reason"] == "stop"
    kept = await answer(chat.http, CHAT, {"messages": HELLO, "stop": " three", "include_stop_str_in_output": True})
    assert kept["choices"][0]["message"]["content"] == "one two three"


async def test_an_engine_error_is_an_error_of_the_dialect_also_in_a_stream(chat: Client) -> None:
    for stream in (False, True):
        chat.engine.fail_next(Sample, UserError("the adapter computes logits that are not finite"))
        response = await post(chat.http, CHAT, {"messages": HELLO, "stream": stream})
        assert response.status_code == 400
        assert "not finite" in response.json()["error"]["message"]
        chat.engine.fail_next(Sample, ServerError("sampling failed on the device"))
        response = await post(chat.http, CHAT, {"messages": HELLO, "stream": stream})
        assert response.status_code == 500
        assert response.json()["error"]["type"] == "server_error"
        assert response.headers["x-should-retry"] == "false"


async def test_too_many_samples_are_told_to_wait(open_server: OpenServer) -> None:
    async with open_server(card=tiny_card(), control={"max_pending_samples": 1}) as chat:
        await answer(chat.http, CHAT, {"messages": HELLO, "max_tokens": 1})
        chat.engine.pause()
        first = asyncio.create_task(post(chat.http, CHAT, {"messages": HELLO}))
        await asyncio.sleep(0.05)
        second = await post(chat.http, CHAT, {"messages": HELLO})
        assert second.status_code == 429
        assert second.json()["error"]["code"] == "rate_limit_exceeded"
        assert second.headers["retry-after"] == "1"
        chat.engine.resume()
        assert (await first).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_a_caller_that_leaves_stops_the_drawing(chat: Client, stream: bool) -> None:
    await answer(chat.http, CHAT, {"messages": HELLO, "max_tokens": 1})
    chat.engine.pause()
    body = json.dumps({"model": FAKE_CARD.name, "messages": HELLO, "stream": stream}).encode()
    left, sent = asyncio.Event(), []

    async def receive() -> dict[str, Any]:
        if body and not left.is_set() and not received:
            received.append(True)
            return {"type": "http.request", "body": body}
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    received: list[bool] = []
    scope = {
        "type": "http", "method": "POST", "path": "/v1/chat/completions", "raw_path": b"", "query_string": b"",
        "headers": [(b"host", b"test"), (b"content-type", b"application/json")], "scheme": "http",
        "server": ("test", 80), "client": ("127.0.0.1", 1), "root_path": "", "http_version": "1.1", "asgi": {},
    }  # fmt: skip
    call = asyncio.create_task(chat.app(scope, receive, send))
    for _ in range(100):
        await asyncio.sleep(0.01)
        if len(samples(chat)) == 2:
            break
    left.set()
    await asyncio.wait_for(call, 5)
    assert [o for o in chat.engine.operations if isinstance(o, CancelSample)]
    assert chat.app.state.service.seen_by(None).chat._draws == set()


async def test_a_stopping_server_ends_its_chats(chat: Client) -> None:
    await answer(chat.http, CHAT, {"messages": HELLO, "max_tokens": 1})
    chat.engine.pause()
    waiting = asyncio.create_task(post(chat.http, CHAT, {"messages": HELLO}))
    await asyncio.sleep(0.05)
    chat.app.state.service.drain()
    response = await waiting
    assert response.status_code == 500
    assert "stopping" in response.json()["error"]["message"]


async def test_a_checkpoint_is_a_model_and_its_newest_version_answers(chat: Client) -> None:
    model_id = await chat.model()
    path = f"tinker://{model_id}/sampler_weights/mine"
    answers = []
    for seq_id in (1, 4):
        save = {"model_id": model_id, "seq_id": seq_id, "path": "mine"}
        assert (await chat.result(await chat.post("save_weights_for_sampler", save))).get("path") == path
        got = await answer(chat.http, CHAT, {"model": path, "messages": HELLO, "seed": 1, "max_tokens": 8})
        assert got["model"] == path
        answers.append(got["choices"][0]["message"]["content"])
        if seq_id == 1:
            await chat.result(await chat.train(model_id, 2))
            await chat.result(await chat.post("optim_step", {"model_id": model_id, "seq_id": 3, "adam_params": {}}))
            gone = f"/api/v1/training_runs/{model_id}/checkpoints/sampler_weights/mine"
            assert (await chat.http.delete(gone)).status_code == 204
            assert (await post(chat.http, CHAT, {"model": path, "messages": HELLO})).status_code == 404
    assert answers[0] != answers[1]
    listed = (await chat.http.get("/v1/models")).json()["data"]
    assert [model["id"] for model in listed] == [FAKE_CARD.name, path]
    for model in listed:
        assert (await chat.http.get(f"/v1/models/{model['id']}")).json()["id"] == model["id"]
    missing = await chat.http.get("/v1/models/none")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")


async def test_other_checkpoints_take_no_room_in_the_list_of_models(
    chat: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinsmith.server.openai.models.MOST_CHECKPOINTS", 1)
    model_id = await chat.model()
    for seq_id, route in ((1, "save_weights_for_sampler"), (2, "save_weights")):
        await chat.result(await chat.post(route, {"model_id": model_id, "seq_id": seq_id, "path": "mine"}))
    listed = (await chat.http.get("/v1/models")).json()["data"]
    assert [model["id"] for model in listed] == [FAKE_CARD.name, f"tinker://{model_id}/sampler_weights/mine"]


async def test_the_sampler_of_a_training_script_is_a_model_too(chat: Client) -> None:
    sampler = await chat.sampler()
    got = await answer(chat.http, CHAT, {"model": sampler, "messages": HELLO, "max_tokens": 2})
    assert got["model"] == sampler


async def test_a_session_that_ended_for_want_of_use_is_made_anew(chat: Client) -> None:
    await answer(chat.http, CHAT, {"messages": HELLO, "max_tokens": 1})
    desk = chat.app.state.service.seen_by(None).chat
    first = desk._session_id
    await chat.app.state.service.control.finish_session(first, "interrupted", None)
    await answer(chat.http, CHAT, {"messages": HELLO, "max_tokens": 1})
    assert desk._session_id != first


async def test_a_dialect_can_be_left_out(open_server: OpenServer) -> None:
    async with open_server(card=tiny_card(), dialects=frozenset({"anthropic"})) as chat:
        assert (await post(chat.http, CHAT, {"messages": HELLO})).status_code == 404
        assert (await post(chat.http, "messages", {"messages": HELLO, "max_tokens": 1})).status_code == 200
        assert (await chat.http.get("/v1/models")).status_code == 200
    async with open_server(card=tiny_card(), dialects=frozenset({"tinkerbell"})) as chat:
        assert (await chat.http.get("/v1/models")).status_code == 404
