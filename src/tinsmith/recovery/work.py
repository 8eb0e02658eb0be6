"""Training as a job of a scheduler, and a model as a backend that completes prompts.

`Job` is what a scheduler hands over; `run_job` runs it under a recovery policy made from its retry policy.
`TinsmithBackend` says truthfully what a server can do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from tinsmith.client.errors import TinkerError
from tinsmith.client.rest import RestClient
from tinsmith.recovery.checkpoints import CheckpointPolicy
from tinsmith.recovery.loop import Recovery, Step
from tinsmith.recovery.policy import RecoveryPolicy
from tinsmith.types.datum import ModelInput
from tinsmith.types.params import SamplingParams

if TYPE_CHECKING:
    from tinsmith.client.sampling import SamplingClient
    from tinsmith.client.service import ServiceClient

DEFAULT_RANK = 32


class JobStatus(StrEnum):
    PENDING = "pending"
    """Made, not handed over; next: queued, canceled."""
    QUEUED = "queued"
    """Waits for room; next: running, canceled, timeout."""
    RUNNING = "running"
    """Next: any of the four below."""
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELED = "canceled"
    TIMEOUT = "timeout"

    @property
    def is_final(self) -> bool:
        return self in (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELED, JobStatus.TIMEOUT)


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RetryPolicy(_Part):
    max_attempts: int = Field(default=3, ge=1)
    backoff_type: Literal["exponential", "constant"] = "exponential"
    backoff_ms: int = Field(default=5000, ge=1)


class CheckpointOrder(_Part):
    strategy: Literal["steps", "epoch", "best", "last", "all"] = "steps"
    save_every: int = Field(default=100, ge=1)
    keep_last: int = Field(default=5, ge=1)


class JobPayload(_Part):
    base_model: str
    num_steps: int = Field(default=1, ge=1)
    rank: int = Field(default=DEFAULT_RANK, ge=1)
    seed: int | None = None
    checkpoint_policy: CheckpointOrder = CheckpointOrder()


class Job(_Part):
    """Unknown fields are errors, whatever scheduler wrote them."""

    kind: Literal["training_step"] = "training_step"
    payload: JobPayload
    retry_policy: RetryPolicy = RetryPolicy()
    id: str | None = None

    @classmethod
    def of(cls, order: Mapping[str, Any]) -> Job:
        """A job as a scheduler writes it: the retry policy at the top, or under `constraints`."""
        told = dict(order)
        constraints = dict(told.pop("constraints", None) or {})
        if "retry_policy" in constraints and "retry_policy" not in told:
            told["retry_policy"] = constraints["retry_policy"]
        return cls.model_validate(told)

    def recovery_policy(self) -> RecoveryPolicy:
        retry = self.retry_policy
        longest = retry.backoff_ms if retry.backoff_type == "constant" else max(60_000, retry.backoff_ms)
        return RecoveryPolicy(
            enabled=True, max_attempts=retry.max_attempts, backoff_ms=retry.backoff_ms, max_backoff_ms=longest
        )

    def checkpoint_policy(self) -> CheckpointPolicy:
        order = self.payload.checkpoint_policy
        steps = None
        if order.strategy == "epoch":
            steps = order.save_every
        return CheckpointPolicy(
            strategy=order.strategy, save_every=order.save_every, keep_last=order.keep_last, steps_per_epoch=steps
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class JobResult:
    status: JobStatus
    run_ids: tuple[str, ...]
    """All physical runs, the first one first."""
    checkpoint: str | None
    error: Mapping[str, Any] | None = None


def run_job(job: Job, service: ServiceClient, train: Callable[[Step[None]], None]) -> JobResult:
    """Run a job to its end: `train` takes one `Step`, as the body of `with step` would. Its errors fail the job."""
    payload = job.payload
    recovery: Recovery = Recovery.start(
        service,
        name=job.id,
        policy=job.recovery_policy(),
        checkpoints=job.checkpoint_policy(),
        base_model=payload.base_model,
        rank=payload.rank,
        seed=payload.seed,
    )
    first, error = recovery.run_id, None
    with recovery:
        try:
            step: Step[None]
            for step in recovery.steps(payload.num_steps):
                with step:
                    train(step)
        except TinkerError as failure:
            error = failure.as_dict()
        saved = recovery.checkpoints
        return JobResult(
            status=JobStatus.SUCCEEDED if error is None else JobStatus.FAILED,
            run_ids=(first, *(change.new_run_id for change in recovery.lineage)),
            checkpoint=saved[-1].path if saved else None,
            error=error,
        )


class TinsmithBackend:
    """Completes prompts with one model, and says what its server really has."""

    def __init__(self, service: ServiceClient, sampler: SamplingClient) -> None:
        self._service = service
        self._sampler = sampler

    def capabilities(self) -> dict[str, Any]:
        """As the server answers now. Streaming is not part of the Tinker wire."""
        models = RestClient(self._service.holder).get_server_capabilities().result().supported_models
        return {
            "backend_id": "tinsmith",
            "provider": "tinker",
            "models": [model.model_name for model in models],
            "supports_streaming": False,
            "supports_training": any(model.trainable is not False for model in models),
        }

    def complete(self, prompt_ir: Mapping[str, Any]) -> dict[str, Any]:
        """`prompt_ir` has `messages` (chats) or `prompt` (text), and may have `max_tokens`, `temperature`, `seed`.

        Raises `ValueError` for a field it does not know, or if there is neither or both of messages and prompt.
        """
        unknown = set(prompt_ir) - {"messages", "prompt", "max_tokens", "temperature", "seed"}
        if unknown or ("messages" in prompt_ir) == ("prompt" in prompt_ir):
            raise ValueError(f"a prompt has messages or prompt, and no field {sorted(unknown)!r}")
        tokenizer = self._sampler.get_tokenizer()
        tokens = _prompt_tokens(tokenizer, prompt_ir)
        params = SamplingParams(
            max_tokens=prompt_ir.get("max_tokens", 256),
            temperature=prompt_ir.get("temperature", 1.0),
            seed=prompt_ir.get("seed"),
        )
        sampled = self._sampler.sample(ModelInput.from_ints(tokens), 1, params).result().sequences[0]
        return {
            "model": self._sampler.get_base_model(),
            "choices": [
                {
                    "text": tokenizer.decode(sampled.tokens, skip_special_tokens=True),
                    "finish_reason": sampled.stop_reason,
                }
            ],
            "usage": {"prompt_tokens": len(tokens), "completion_tokens": len(sampled.tokens)},
        }


def _prompt_tokens(tokenizer: Any, prompt_ir: Mapping[str, Any]) -> Sequence[int]:
    if "prompt" in prompt_ir:
        return list(tokenizer(prompt_ir["prompt"], add_special_tokens=False)["input_ids"])
    rendered = tokenizer.apply_chat_template(list(prompt_ir["messages"]), add_generation_prompt=True, tokenize=True)
    return list(rendered["input_ids"] if isinstance(rendered, Mapping) else rendered)
