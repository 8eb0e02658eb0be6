"""What the dialect answers, for the OpenAPI document. `results.py` writes it; schemathesis compares the two."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Answer(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class FutureReceipt(Answer):
    request_id: str
    model_id: str
    created: Literal[True] = True
    """Only if the request made its adapter."""


class PendingFuture(Answer):
    status: Literal["pending"]


class JobFailure(Answer):
    detail: str
    request_id: str = ""
    """In the synchronous form: the future to fetch."""


class AdapterResult(Answer):
    model_id: str | None
    backend: str
    created: Literal[True] = True


class TrainingResult(AdapterResult):
    loss: float
    """`loss_sum / weight_sum`."""
    loss_sum: float
    weight_sum: float
    num_tokens: int
    num_samples: int
    logprobs: list[list[float] | list[list[float]]]
    """Per conversation, of each target."""
    base_loss: float = 0.0
    """With rewards, like `kl_penalty`."""
    kl_penalty: float = 0.0
    metrics: dict[str, float | None]


class StepResult(AdapterResult):
    status: Literal["applied"]
    metrics: dict[str, float | None]


class SavedResult(AdapterResult):
    status: Literal["saved", "loaded"]
    path: str | None = None
    sampling_session_id: str = ""


class RemovedResult(AdapterResult):
    status: Literal["removed"]


class SequenceResult(Answer):
    stop_reason: Literal["stop", "length"]
    tokens: list[int]
    logprobs: list[float] | None


class SampleResult(AdapterResult):
    sequences: list[SequenceResult]
    completions: list[str] = Field(default_factory=list)
    prompt_logprobs: list[list[float | None]] | None


class LossResult(Answer):
    loss_id: str
    backend: str


class ModelSummary(Answer):
    model_id: str
    model_name: str
    arch: str


class Capabilities(Answer):
    supported_models: list[ModelSummary]
    backend: str


class LossFunctions(Answer):
    available_loss_functions: list[str]


RESULTS: dict[str, type[Answer]] = {
    "forward": TrainingResult,
    "forward_backward": TrainingResult,
    "optim_step": StepResult,
    "add_lora": AdapterResult,
    "remove_lora": RemovedResult,
    "sample": SampleResult,
}
"""Of the synchronous form of each operation."""

ANY_RESULT: tuple[type[Answer], ...] = (
    TrainingResult,
    StepResult,
    SavedResult,
    RemovedResult,
    SampleResult,
    LossResult,
    AdapterResult,
)
"""Of a future, whatever was asked."""
