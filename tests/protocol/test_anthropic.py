"""Anthropic's own client against `tinsmith serve`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import numpy as np
import pytest

from tests.protocol.conftest import ChatServer
from tests.protocol.taught import CALL, PARAMETERS, TOOL, teach_to_call
from tinsmith import ServiceClient
from tinsmith.types import ModelInput

WHO = [{"role": "user", "content": "Who are you?"}]
LOOK = {"name": TOOL["function"]["name"], "description": "Look.", "input_schema": PARAMETERS}
GREEDY = {"temperature": 0}
"""Newer clients have no argument for it."""


@pytest.fixture(scope="module")
def client(chat_server: ChatServer) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=chat_server.url, api_key="any", max_retries=0, timeout=60) as opened:
        yield opened


@pytest.fixture(scope="module")
def tinker(chat_server: ChatServer) -> Iterator[ServiceClient]:
    service = ServiceClient(base_url=chat_server.url, api_key="tml-local")
    yield service
    service.close()


def test_a_message_is_answered(client: anthropic.Anthropic, chat_server: ChatServer) -> None:
    got = client.messages.create(model=chat_server.plain, max_tokens=20, messages=WHO, extra_body=GREEDY)
    assert [block.text for block in got.content] == ["I am Tiny, a small language model."]
    assert got.stop_reason == "end_turn"
    counted = client.messages.count_tokens(model=chat_server.plain, messages=WHO)
    assert got.usage.input_tokens == counted.input_tokens
    assert got.usage.output_tokens == 10


def test_a_key_may_come_as_a_token_too(chat_server: ChatServer) -> None:
    with anthropic.Anthropic(base_url=chat_server.url, auth_token="any", max_retries=0, timeout=60) as client:
        assert client.messages.create(model=chat_server.plain, max_tokens=1, messages=WHO).stop_reason == "max_tokens"


def test_models_are_listed(client: anthropic.Anthropic, chat_server: ChatServer) -> None:
    assert [model.id for model in client.models.list()][:2] == [chat_server.plain, chat_server.with_tools]
    assert client.models.retrieve(chat_server.plain).display_name == chat_server.plain


def test_a_stream_spells_the_message(client: anthropic.Anthropic, chat_server: ChatServer) -> None:
    ask: dict[str, Any] = {"model": chat_server.plain, "max_tokens": 20, "messages": WHO, "extra_body": GREEDY}
    with client.messages.stream(**ask) as stream:
        pieces = list(stream.text_stream)
        final = stream.get_final_message()
    assert len(pieces) > 5
    assert "".join(pieces) == final.content[0].text == client.messages.create(**ask).content[0].text
    assert (final.stop_reason, final.usage.output_tokens) == ("end_turn", 10)


def test_a_stop_sequence_is_named(client: anthropic.Anthropic, chat_server: ChatServer) -> None:
    got = client.messages.create(
        model=chat_server.plain, max_tokens=20, messages=WHO, stop_sequences=["never", " small"], extra_body=GREEDY
    )
    assert (got.stop_reason, got.stop_sequence, got.content[0].text) == ("stop_sequence", " small", "I am Tiny, a")


def test_an_answer_goes_on_with_the_assistants_words(client: anthropic.Anthropic, chat_server: ChatServer) -> None:
    begun = [*WHO, {"role": "assistant", "content": "I am Tiny, a"}]
    got = client.messages.create(model=chat_server.plain, max_tokens=20, messages=begun, extra_body=GREEDY)
    assert got.content[0].text == " small language model."


def test_tools_go_through_the_template_and_uses_come_back(
    client: anthropic.Anthropic, chat_server: ChatServer, tinker: ServiceClient
) -> None:
    probe = client.messages.create(
        model=chat_server.with_tools, max_tokens=1, messages=WHO, tools=[LOOK], extra_body={"return_token_ids": True}
    )
    model = teach_to_call(tinker, chat_server.with_tools, probe.prompt_token_ids)
    ask: dict[str, Any] = {"model": model, "max_tokens": 60, "messages": WHO, "tools": [LOOK], "extra_body": GREEDY}
    got = client.messages.create(**ask)
    (used,) = got.content
    assert (used.type, used.name, used.input) == ("tool_use", CALL["name"], CALL["arguments"])
    assert got.stop_reason == "tool_use"
    with client.messages.stream(**ask) as stream:
        final = stream.get_final_message()
    assert final.content[0].input == CALL["arguments"]
    result = {"type": "tool_result", "tool_use_id": used.id, "content": "A teapot."}
    history = [*WHO, {"role": "assistant", "content": got.content}, {"role": "user", "content": [result]}]
    assert client.messages.create(**(ask | {"messages": history})).role == "assistant"


def test_token_ids_and_log_probs_come_on_request(
    client: anthropic.Anthropic, chat_server: ChatServer, tinker: ServiceClient
) -> None:
    got = client.messages.create(
        model=chat_server.plain, max_tokens=12, messages=WHO, extra_body={"return_token_ids": True, "seed": 4},
        extra_headers={"X-Conversation-Id": "anthropic"},
    )  # fmt: skip
    sampler = tinker.create_sampling_client(base_model=chat_server.plain).result()
    tokens = got.prompt_token_ids + got.token_ids
    expected = sampler.compute_logprobs(ModelInput.from_ints(tokens)).result()[len(got.prompt_token_ids) :]
    assert np.abs(np.array(got.logprobs) - expected).max() < 1e-3
    (kept,) = chat_server.recorded("anthropic")
    assert (kept.request_id, list(kept.tokens)) == (got.id, got.token_ids)


def test_errors_are_the_clients_own(client: anthropic.Anthropic, chat_server: ChatServer) -> None:
    with pytest.raises(anthropic.BadRequestError, match="thinking"):
        client.messages.create(
            model=chat_server.plain, max_tokens=2000, messages=WHO, thinking={"type": "enabled", "budget_tokens": 1024}
        )
    with pytest.raises(anthropic.NotFoundError, match="claude"):
        client.messages.create(model="claude", max_tokens=1, messages=WHO)
