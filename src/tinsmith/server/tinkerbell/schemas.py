"""JSON bodies of the Tinkerbell dialect. Numbers are strict, a null counts as absent, and a field that is not listed is
an error unless it holds a value that says "off"."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tinsmith.data.conversations import Role
from tinsmith.server.tinker.schemas import AdamBody, Body

Name = Annotated[str, Field(min_length=1, max_length=200)]
"""Of an adapter, as its user calls it: what `add_lora` answered, or any other word."""


Finite = Annotated[float, Field(allow_inf_nan=False)]


class AddLoraBody(Body):
    base_model: str = "base"
    """`base` is the server's first base model."""
    rank: int = 16
    alpha: float = 32.0
    seed: int | None = None
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True


class AdapterBody(Body):
    model_id: Name


class MessageBody(Body):
    role: Role
    content: str


Chat = Annotated[list[MessageBody], Field(min_length=1)]
Chats = Annotated[list[Chat], Field(min_length=1)]


class RewardsBody(Body):
    """What `importance_sampling` reads beside the conversations; lists have one entry per conversation."""

    rewards: Annotated[list[Finite], Field(min_length=1)]
    prompts: list[str] | None = None
    completions: list[str] | None = None
    logprobs: list[list[Finite]] | None = None
    """Of the completion's tokens and its end of turn, when they were drawn; absent: drawn from the present weights."""
    kl_coeff: Annotated[Finite, Field(ge=0)] = 0.0


class ForwardBody(Body):
    """`data` may be left out where `loss_fn_inputs` has prompts and completions."""

    model_id: Name
    data: Chats | None = None
    loss_fn: Literal["cross_entropy", "importance_sampling"] = "cross_entropy"
    loss_fn_inputs: RewardsBody | None = None


class StepBody(Body):
    model_id: Name
    adam_params: AdamBody


class SaveBody(Body):
    model_id: Name
    path: str
    """A name; saving under it again makes a new version."""
    ttl_seconds: int | None = None


class LoadBody(Body):
    model_id: Name
    path: str
    """What a save answered, or a name that this adapter was saved under."""
    optimizer: bool = True


class PromptParamsBody(Body):
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    seed: int | None = None
    stop: str | list[str] | list[int] | None = None


class PromptsBody(Body):
    model_id: str | None = None
    """An adapter, a base model, or the `tinker://` path of a checkpoint."""
    base_model: str | None = None
    prompts: Annotated[list[str], Field(min_length=1, max_length=1024)]
    sampling_params: PromptParamsBody = PromptParamsBody()
    num_samples: int = 1
    """Per prompt."""
    prompt_logprobs: bool = False


class RetrieveBody(Body):
    request_id: str
