"""The Anthropic dialect over a fake engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.server.chat_server import HELLO, answer, decoded, events, hermes_folder, post, samples, say, tiny_card
from tests.unit.server.tinker_client import Client, OpenServer
from tinsmith.control.errors import NotTaken
from tinsmith.types.errors import ServerError
from tinsmith.types.operations import Sample

pytestmark = pytest.mark.anyio

ASK: dict[str, Any] = {"messages": HELLO, "max_tokens": 6}
LOOK = {"name": "look", "description": "Look there.", "input_schema": {"type": "object"}}


@pytest.fixture
async def chat(open_server: OpenServer) -> AsyncIterator[Client]:
    async with open_server(card=tiny_card()) as opened:
        yield opened


async def test_a_message_is_answered(chat: Client) -> None:
    body = {"system": [{"type": "text", "text": "Be brief."}], "temperature": 0.5, "top_p": 0.9, "top_k": 7, "seed": 1}
    got = await answer(chat.http, "messages", ASK | body)
    (block,) = got["content"]
    assert (got["type"], got["role"], block["type"]) == ("message", "assistant", "text")
    assert (got["stop_reason"], got["stop_sequence"]) == ("max_tokens", None)
    (drawn,) = samples(chat)
    assert got["usage"] == {"input_tokens": len(drawn.prompt), "output_tokens": 6}
    assert (drawn.temperature, drawn.top_p, drawn.top_k, drawn.seed) == (0.5, 0.9, 7, 1)
    assert await decoded(chat, drawn) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )
    counted = await answer(chat.http, "messages/count_tokens", {"messages": HELLO, "system": "Be brief."})
    assert counted == {"input_tokens": len(drawn.prompt)}


async def test_the_events_of_a_stream_spell_the_message(chat: Client) -> None:
    body = ASK | {"seed": 1, "return_token_ids": True}
    whole = await answer(chat.http, "messages", body)
    told = await events(chat.http, "messages", body)
    kinds = [event["type"] for event in told]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    assert "".join(event["delta"]["text"] for event in told[2:-3]) == whole["content"][0]["text"]
    assert told[0]["message"]["usage"] == {"input_tokens": whole["usage"]["input_tokens"], "output_tokens": 0}
    assert told[-2]["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert told[-2]["usage"] == whole["usage"]
    assert told[-2]["token_ids"] == whole["token_ids"]
    assert told[-2]["logprobs"] == whole["logprobs"]
    assert len(whole["logprobs"]) == 6


async def test_why_an_answer_ended(chat: Client) -> None:
    say(chat, "one two three<|im_end|>")
    assert (await answer(chat.http, "messages", ASK))["stop_reason"] == "end_turn"
    say(chat, "one two three")
    body = ASK | {"stop_sequences": ["zzz", " three"]}
    whole = await answer(chat.http, "messages", body)
    assert (whole["stop_reason"], whole["stop_sequence"]) == ("stop_sequence", " three")
    assert whole["content"][0]["text"] == "one two"
    told = await events(chat.http, "messages", body)
    assert told[-2]["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": " three"}
    assert "".join(e["delta"]["text"] for e in told if e["type"] == "content_block_delta") == "one two"


async def test_an_answer_goes_on_with_the_assistants_last_words(chat: Client) -> None:
    await answer(chat.http, "messages", ASK | {"messages": [*HELLO, {"role": "assistant", "content": "I am"}]})
    assert (await decoded(chat, samples(chat)[-1])).endswith("<|im_start|>assistant\nI am")


async def test_tools_go_there_and_back(open_server: OpenServer, tmp_path: Path) -> None:
    async with open_server(card=tiny_card(hermes_folder(tmp_path / "hermes"), max_context=1024)) as chat:
        say(chat, 'I look.\n<tool_call>\n{"name": "look", "arguments": {"where": "here"}}\n</tool_call><|im_end|>')
        whole = await answer(chat.http, "messages", ASK | {"tools": [LOOK], "max_tokens": 50})
        said, used = whole["content"]
        assert said == {"type": "text", "text": "I look."}
        assert used | {"id": ""} == {"type": "tool_use", "id": "", "name": "look", "input": {"where": "here"}}
        assert whole["stop_reason"] == "tool_use"

        told = await events(chat.http, "messages", ASK | {"tools": [LOOK], "max_tokens": 50})
        starts = [event["content_block"] for event in told if event["type"] == "content_block_start"]
        assert [(block["type"], block.get("name"), block.get("input")) for block in starts] == [
            ("text", None, None),
            ("tool_use", "look", {}),
        ]
        (given,) = [e["delta"]["partial_json"] for e in told if e.get("delta", {}).get("type") == "input_json_delta"]
        assert given == '{"where": "here"}'
        assert [e["index"] for e in told if e["type"] == "content_block_stop"] == [0, 1]
        assert told[-2]["delta"]["stop_reason"] == "tool_use"

        result = {"type": "tool_result", "tool_use_id": used["id"], "content": [{"type": "text", "text": "A teapot."}]}
        history = [
            *HELLO,
            {"role": "assistant", "content": whole["content"]},
            {"role": "user", "content": [result, {"type": "text", "text": "And now?", "cache_control": {}}]},
        ]
        await answer(chat.http, "messages", {"messages": history, "tools": [LOOK], "max_tokens": 50})
        prompt = await decoded(chat, samples(chat)[-1])
        assert '{"name": "look", "arguments": {"where": "here"}}' in prompt
        assert "<|im_start|>tool\nA teapot.<|im_end|>\n<|im_start|>user\nAnd now?<|im_end|>" in prompt
        failed = [*history[:2], {"role": "user", "content": [result | {"is_error": True, "content": "broke"}]}]
        await answer(chat.http, "messages", {"messages": failed, "tools": [LOOK], "max_tokens": 50})
        assert "<|im_start|>tool\nError: broke<|im_end|>" in await decoded(chat, samples(chat)[-1])


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": None}, "max_tokens"),
    ({"max_tokens": 100_000}, "max_tokens"),
    ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, "thinking"),
    ({"tool_choice": {"type": "any"}}, "tool_choice.type"),
    ({"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}, "tool_choice.disable_parallel_tool_use"),
    ({"tools": [LOOK]}, "tools"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
    ({"tools": [LOOK | {"strict": True}]}, "tools[0].strict"),
    ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
    ({"nonsense": 1}, "nonsense"),
    ({"temperature": -0.1}, "temperature"),
    ({"top_k": -5}, "top_k"),
    ({"stop_sequences": [""]}, "stop_sequences"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "system", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0].source"),
    ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "messages[0].content[0].tool_use_id"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=[param for _, param in REFUSED])
async def test_what_cannot_be_done_is_refused_by_name(chat: Client, fields: dict[str, Any], param: str) -> None:
    response = await post(chat.http, "messages", ASK | fields)
    assert response.status_code == 400, response.text
    assert response.json()["type"] == "error"
    error = response.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert samples(chat) == []


async def test_errors_have_the_names_that_clients_know(chat: Client) -> None:
    unknown = await post(chat.http, "messages", ASK | {"model": "claude"})
    assert (unknown.status_code, unknown.json()["error"]["type"]) == (404, "not_found_error")
    for stream in (False, True):
        chat.engine.fail_next(Sample, ServerError("sampling failed on the device"))
        broken = await post(chat.http, "messages", ASK | {"stream": stream})
        assert (broken.status_code, broken.json()["error"]["type"]) == (500, "api_error")
        chat.engine.fail_next(Sample, NotTaken("the disk is full"))
        full = await post(chat.http, "messages", ASK | {"stream": stream})
        assert (full.status_code, full.json()["error"]["type"]) == (507, "api_error")
    for path in ("messages/batches", "files", "models/claude"):
        missing = await chat.http.get(f"/v1/{path}", headers={"anthropic-version": "2023-06-01"})
        assert (missing.status_code, missing.json()["error"]["type"]) == (404, "not_found_error")
        assert path.split("/")[-1] in missing.json()["error"]["message"]


async def test_an_overloaded_server_says_so(open_server: OpenServer) -> None:
    async with open_server(card=tiny_card(), control={"max_pending_samples": 1}) as chat:
        chat.app.state.service.control._sampling._num_attended = 1
        response = await post(chat.http, "messages", ASK)
        assert (response.status_code, response.json()["error"]["type"]) == (529, "overloaded_error")
