"""A server over a fake engine whose tokenizer is the shipped model's, and small words for the chat dialects."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import numpy as np

from tests.unit.server.tinker_client import Client
from tinsmith.models import tiny_folder
from tinsmith.runtime.fake import FAKE_CARD
from tinsmith.server.chat.tokens import load_model_text
from tinsmith.types.operations import Sample
from tinsmith.types.results import SampledSequence, SampleResponse

VOCAB = 1536
HELLO = [{"role": "user", "content": "Hello"}]
HERMES_TEMPLATE = """
{%- if tools %}<|im_start|>system
Call tools as <tool_call>{"name": ..., "arguments": ...}</tool_call>.
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content }}
{%- for call in message.tool_calls or [] %}
<tool_call>
{{ {"name": call.function.name, "arguments": call.function.arguments} | tojson }}
</tool_call>
{%- endfor %}{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""


def tiny_card(source: Path | None = None, **fields: Any) -> Any:
    values = {"source": str(source or tiny_folder()), "vocab_size": VOCAB, "eos_token_ids": (2, 0)} | fields
    return replace(FAKE_CARD, **values)


def hermes_folder(folder: Path) -> Path:
    """The shipped model's files with a chat template that knows tools."""
    folder.mkdir()
    for file in tiny_folder().iterdir():
        if file.name != "chat_template.jinja":
            (folder / file.name).symlink_to(file)
    (folder / "chat_template.jinja").write_text(HERMES_TEMPLATE)
    return folder


async def post(http: httpx2.AsyncClient, path: str, body: dict[str, Any], **headers: str) -> httpx2.Response:
    return await http.post(f"/v1/{path}", json={"model": FAKE_CARD.name} | body, headers=headers)


async def answer(http: httpx2.AsyncClient, path: str, body: dict[str, Any], **headers: str) -> dict[str, Any]:
    response = await post(http, path, body, **headers)
    assert response.status_code == 200, response.text
    result: dict[str, Any] = response.json()
    return result


async def events(http: httpx2.AsyncClient, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The data of all server-sent events but the closing `[DONE]`."""
    response = await post(http, path, body | {"stream": True})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    data = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    if path != "messages":
        assert data.pop() == "[DONE]"
    return [json.loads(line) for line in data]


def samples(client: Client) -> list[Sample]:
    """What the engine was asked to draw, in order."""
    return [operation for operation in client.engine.operations if isinstance(operation, Sample)]


def say(client: Client, text: str) -> None:
    """Every later sample of the fake engine is this text."""
    tokens = load_model_text(tiny_card()).encode(text)
    sequence = SampledSequence(
        stop_reason="stop", tokens_np=np.asarray(tokens), logprobs_np=np.full(len(tokens), -0.5, np.float32)
    )
    client.engine._handlers[Sample] = lambda operation: SampleResponse([sequence] * operation.num_samples)


async def decoded(client: Client, operation: Sample) -> str:
    """The prompt as the model reads it."""
    target = await client.app.state.service.seen_by(None).chat.target(FAKE_CARD.name)
    return target.text.decode_with_special(operation.prompt.tolist())
