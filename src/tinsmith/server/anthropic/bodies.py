"""Bodies of the Anthropic dialect. What asks for something this server does not do is refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from tinsmith.server.chat.fields import ANY


class Body(BaseModel):
    """Fields beyond the declared ones are kept apart in `model_extra`, to be refused if they ask for anything."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, protected_namespaces=())


class BlockBody(Body):
    """A block of content; which fields it has depends on its type."""

    type: str
    text: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: str | list[dict[str, Any]] | None = None
    is_error: bool | None = None

    NEUTRAL: ClassVar[Mapping[str, Sequence[Any]]] = {"cache_control": ANY, "citations": ([],), "caller": ANY}


class MessageBody(Body):
    role: Literal["user", "assistant"]
    content: str | list[BlockBody]


class ToolBody(Body):
    name: str = Field(min_length=1)
    input_schema: dict[str, Any] | None = None
    description: str | None = None
    type: str | None = None

    NEUTRAL: ClassVar[Mapping[str, Sequence[Any]]] = {
        "cache_control": ANY,
        "eager_input_streaming": ANY,
        "strict": (False,),
        "defer_loading": (False,),
        "input_examples": ([],),
        "allowed_callers": (["direct"],),
    }


class ToolChoiceBody(Body):
    type: Literal["auto", "none"]
    disable_parallel_tool_use: Literal[False] | None = None


class PromptBody(Body):
    """What a prompt is made of."""

    model: str = Field(min_length=1)
    """A base model, a `tinker://` path, or the id of a sampling session."""
    messages: list[MessageBody] = Field(min_length=1)
    """If the last one is the assistant's, the answer goes on with it."""
    system: str | list[BlockBody] | None = None
    tools: list[ToolBody] | None = None
    tool_choice: ToolChoiceBody | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    """Extension: handed to the chat template, as `enable_thinking`."""

    NEUTRAL: ClassVar[Mapping[str, Sequence[Any]]] = {
        "cache_control": ANY,
        "thinking": ({"type": "disabled"},),
        "output_config": ({},),
        "speed": ("standard",),
        "user_profile_id": ANY,
        "workspace_id": ANY,
    }
    INSTEAD: ClassVar[Mapping[str, str]] = {
        "thinking": "give chat_template_kwargs what the model's template reads",
    }


class MessagesBody(PromptBody):
    max_tokens: Annotated[int, Field(ge=1)]
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: Annotated[FiniteFloat, Field(ge=0)] | None = None
    top_p: Annotated[FiniteFloat, Field(gt=0, le=1)] | None = None
    top_k: int | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    """Extension: the same seed draws the same tokens."""
    return_token_ids: bool | None = None
    """Extension: add `prompt_token_ids`, `token_ids` and their `logprobs` to the message."""

    NEUTRAL: ClassVar[Mapping[str, Sequence[Any]]] = {
        **PromptBody.NEUTRAL,
        "metadata": ANY,
        "service_tier": ("auto", "standard_only"),
        "inference_geo": (),
        "container": (),
        "mcp_servers": ([],),
        "context_management": (),
        "diagnostics": (),
        "betas": ([],),
    }
