"""Bodies of the OpenAI dialect. What asks for something this server does not do is refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from tinsmith.server.chat.asks import MOST_SAMPLES, MOST_TOP_LOGPROBS
from tinsmith.server.chat.fields import ANY

Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Count = Annotated[int, Field(ge=1, le=MOST_SAMPLES)]
Length = Annotated[int, Field(ge=0)]
PositiveLength = Annotated[int, Field(ge=1)]
Temperature = Annotated[FiniteFloat, Field(ge=0)]
TopP = Annotated[FiniteFloat, Field(gt=0, le=1)]
NumTop = Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)]


class Body(BaseModel):
    """Fields beyond the declared ones are kept apart in `model_extra`, to be refused if they ask for anything."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, protected_namespaces=())


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool = False


class SamplingBody(Body):
    """What both kinds of completion take. Fields from `top_k` on are extensions, named as vLLM names them."""

    model: str = Field(min_length=1)
    """A base model, a `tinker://` path, or the id of a sampling session."""
    n: Count | None = None
    seed: Seed | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: int | None = None
    """Keep this many most likely tokens; -1 or 0 keeps all."""
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    """Only `stop` and `stop_token_ids` end the text."""
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    """Leave special tokens out of the text (the default)."""
    return_token_ids: bool | None = None
    """Add `token_ids` to each choice, and `prompt_token_ids`."""
    return_tokens_as_token_ids: bool | None = None
    """Write the tokens of `logprobs` as `token_id:17`."""

    NEUTRAL: ClassVar[Mapping[str, Sequence[Any]]] = {
        "user": ANY,
        "frequency_penalty": (0, 0.0),
        "presence_penalty": (0, 0.0),
        "repetition_penalty": (1, 1.0),
        "length_penalty": (1, 1.0),
        "min_p": (0, 0.0),
        "min_tokens": (0,),
        "logit_bias": ({},),
        "use_beam_search": (False,),
        "best_of": (1,),
        "spaces_between_special_tokens": (True,),
    }

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())


class CompletionBody(SamplingBody):
    prompt: str | list[str] | list[int] | list[list[int]]
    """Text, token ids, or a list of either."""
    max_tokens: Length | None = None
    """16 if left out; 0 with `echo` only scores the prompt."""
    echo: bool | None = None
    logprobs: NumTop | None = None
    """Likely tokens to name beside each token; 0 gives log-probabilities alone."""
    add_special_tokens: bool | None = None
    """Begin a text prompt with the tokenizer's own first tokens (the default)."""

    NEUTRAL: ClassVar[Mapping[str, Sequence[Any]]] = {**SamplingBody.NEUTRAL, "suffix": ("",)}


class ContentPart(Body):
    type: str
    text: str | None = None


class CalledFunction(Body):
    name: str = Field(min_length=1)
    arguments: str
    """A JSON object."""


class ToolCallBody(Body):
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class MessageBody(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCallBody] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    """Handed to the chat template, as some read it."""


class FunctionBody(Body):
    name: str = Field(min_length=1)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolBody(Body):
    type: Literal["function"]
    function: FunctionBody


class ChatBody(SamplingBody):
    messages: list[MessageBody] = Field(min_length=1)
    max_tokens: PositiveLength | None = None
    max_completion_tokens: PositiveLength | None = None
    """As `max_tokens`, its older name. With neither the answer may fill the context."""
    logprobs: bool | None = None
    top_logprobs: NumTop | None = None
    tools: list[ToolBody] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    """Handed to the chat template, as `enable_thinking`."""
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    """Go on with the last message instead of beginning a new one."""

    NEUTRAL: ClassVar[Mapping[str, Sequence[Any]]] = {
        **SamplingBody.NEUTRAL,
        "metadata": ANY,
        "safety_identifier": ANY,
        "prompt_cache_key": ANY,
        "prompt_cache_retention": ANY,
        "service_tier": ("auto", "default"),
        "store": (False,),
        "parallel_tool_calls": (True,),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "reasoning_effort": (),
        "verbosity": (),
        "web_search_options": (),
        "functions": (),
        "function_call": (),
        "moderation": (),
    }
    INSTEAD: ClassVar[Mapping[str, str]] = {
        "functions": "give tools",
        "function_call": "give tool_choice",
        "reasoning_effort": "give chat_template_kwargs what the model's template reads",
    }
