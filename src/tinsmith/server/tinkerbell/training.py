"""Conversations and rewards to what an engine trains on."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Sequence

import numpy as np

from tinsmith.control.requests import ForwardBackward
from tinsmith.data import Conversation, Message, RenderedConversation, to_datum
from tinsmith.server.errors import brief
from tinsmith.server.tinkerbell.rendering import ModelText, ModelTexts
from tinsmith.server.tinkerbell.rewards import Scored, reward_datum, reward_loss
from tinsmith.server.tinkerbell.schemas import ForwardBody, RewardsBody
from tinsmith.types import Datum
from tinsmith.types.errors import InvalidInput

ScoreBase = Callable[[str, Sequence[int]], Awaitable[np.ndarray]]
"""Base model and tokens to the log-probability of each token; the first has none."""


def check_forward(body: ForwardBody) -> None:
    """What can be told without a tokenizer. Raises `InvalidInput`."""
    given = body.loss_fn_inputs
    if body.loss_fn == "cross_entropy":
        if given is not None:
            raise InvalidInput("loss_fn_inputs is for loss_fn 'importance_sampling'; 'cross_entropy' takes none")
        if body.data is None:
            raise InvalidInput("data is missing: a list of conversations, each a list of {role, content}")
        return
    if given is None:
        raise InvalidInput("loss_fn_inputs is missing; loss_fn 'importance_sampling' needs at least its rewards")
    _check_rewards(body, given)


def _check_rewards(body: ForwardBody, given: RewardsBody) -> None:
    num_samples = len(given.rewards)
    for name in ("data", "prompts", "completions", "logprobs"):
        values = body.data if name == "data" else getattr(given, name)
        if values is not None and len(values) != num_samples:
            where = name if name == "data" else f"loss_fn_inputs.{name}"
            raise InvalidInput(f"{where} has {len(values)} entries, but loss_fn_inputs.rewards has {num_samples}")
    if body.data is None and (given.prompts is None or given.completions is None):
        raise InvalidInput("give the conversations as data, or as loss_fn_inputs.prompts and .completions")
    for index, chat in enumerate(body.data or ()):
        _check_spelled_alike(index, [(message.role, message.content) for message in chat], given)


def _check_spelled_alike(index: int, chat: list[tuple[str, str]], given: RewardsBody) -> None:
    """Prompts and completions beside `data` must say the same: only one of them can be trained."""
    if chat[-1][0] != "assistant":
        raise InvalidInput(
            f"data[{index}] ends with a message of role {chat[-1][0]!r}; a reward is for what the assistant said last"
        )
    asked = next((content for role, content in reversed(chat) if role == "user"), None)
    for name, values, content in (
        ("prompts", given.prompts, asked),
        ("completions", given.completions, chat[-1][1]),
    ):
        if values is not None and values[index] != content:
            raise InvalidInput(
                f"loss_fn_inputs.{name}[{index}] is {brief(values[index])}, but data[{index}] says {brief(content)}"
            )


def conversations_of(body: ForwardBody) -> list[Conversation]:
    """Raises `InvalidInput` for content that is no text."""
    given = body.loss_fn_inputs
    chats: list[list[Message]] = []
    try:
        for chat in body.data or ():
            chats.append([Message(role=message.role, content=message.content) for message in chat])
        if body.data is None and given is not None:
            for prompt, completion in zip(given.prompts or (), given.completions or (), strict=True):
                chats.append([Message(role="user", content=prompt), Message(role="assistant", content=completion)])
    except ValueError as error:
        raise InvalidInput(f"data[{len(chats)}]: {error}") from error
    return [Conversation(messages=tuple(chat), source=f"data[{index}]") for index, chat in enumerate(chats)]


def render(text: ModelText, conversation: Conversation) -> RenderedConversation:
    """What the assistant said is trained; where it said nothing, every token. Raises `RenderError`."""
    has_answer = any(message.role == "assistant" for message in conversation.messages)
    return text.chat.render(conversation, "all_assistant_messages" if has_answer else "all_tokens")


async def prepare(
    body: ForwardBody, model_id: str, base_model: str, texts: ModelTexts, score_base: ScoreBase, *, forward_only: bool
) -> ForwardBackward:
    """The request as control takes it, tokens and all. Raises `InvalidInput`, `Unsupported` or what scoring meets."""
    text = await texts.of(base_model)
    if body.loss_fn_inputs is not None:
        score = functools.partial(score_base, base_model)
        return await _with_rewards(body.loss_fn_inputs, body, model_id, text, score, forward_only=forward_only)

    def work() -> tuple[Datum, ...]:
        rendered = [render(text, conversation) for conversation in conversations_of(body)]
        return tuple(_datum(one) for one in rendered)

    return ForwardBackward(
        model_id=model_id,
        seq_id=0,
        data=await text.run(work),
        loss_fn=body.loss_fn,
        forward_only=forward_only,
    )


def _datum(rendered: RenderedConversation) -> Datum:
    try:
        return to_datum(rendered.tokens, rendered.weights)
    except ValueError as error:
        raise InvalidInput(f"{rendered.source}: {error}") from error


async def _with_rewards(
    given: RewardsBody,
    body: ForwardBody,
    model_id: str,
    text: ModelText,
    score: Callable[[Sequence[int]], Awaitable[np.ndarray]],
    *,
    forward_only: bool,
) -> ForwardBackward:
    rendered = await text.run(
        lambda: [text.chat.render(one, "last_assistant_message") for one in conversations_of(body)]
    )
    scored = [
        Scored(
            rendered=one,
            reward=given.rewards[index],
            drawn_logprobs=None if given.logprobs is None else given.logprobs[index],
            base_logprobs_N=await score(one.tokens) if given.kl_coeff else None,
        )
        for index, one in enumerate(rendered)
    ]
    return ForwardBackward(
        model_id=model_id,
        seq_id=0,
        data=tuple(reward_datum(one) for one in scored),
        loss_fn="custom",
        forward_only=forward_only,
        custom_loss=reward_loss(kl_coeff=given.kl_coeff, has_drawn_logprobs=given.logprobs is not None),
    )
