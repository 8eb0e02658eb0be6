"""Outcomes as the Tinkerbell dialect writes them: the bare result, with the loss of a training request at the top.

Any future can be written this way, whichever dialect submitted it; what only the submitter knew is in its context.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from tinsmith.control.futures import Outcome, SamplerSaved
from tinsmith.control.ledger_codec import recorded
from tinsmith.server.tinkerbell.rewards import BASE_LOSS, KL, WEIGHT
from tinsmith.types.errors import ServerError
from tinsmith.types.results import ForwardBackwardOutput, SampledSequence, SampleResponse


@recorded
@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The context of a future that this dialect submitted."""

    model: str
    """As the user calls it."""
    created: bool = False
    """Whether the request made its adapter."""
    kl_coeff: float | None = None
    """Of a request with rewards."""


@dataclass(slots=True)
class PromptsSampled(SampleResponse):
    """The samples of several prompts, in their order; `sequences` has them all."""

    completions: list[str] = field(default_factory=list)
    logprobs_of_prompts: list[list[float | None]] | None = None


def result_of(outcome: Outcome, backend: str) -> dict[str, Any]:
    """The JSON of a future that did not fail. Raises `ServerError` if a loss is no number.

    Samples that another dialect asked for come without their text: whoever has a tokenizer adds it.
    """
    asked = outcome.context if isinstance(outcome.context, Asked) else None
    named: dict[str, Any] = {"model_id": asked.model if asked else outcome.subject, "backend": backend}
    if asked is not None and asked.created:
        named["created"] = True
    result = outcome.result
    match outcome.request_type:
        case "CreateModel":
            return named
        case "ForwardBackward":
            return _training(result, asked) | named
        case "OptimStep":
            return {"status": "applied", "metrics": _finite(result)} | named
        case "SaveWeights":
            return {"status": "saved", "path": result} | named
        case "SaveWeightsForSampler":
            return {"status": "saved"} | _saved_sampler(result) | named
        case "SaveWeightsExternal":
            return {"status": "saved", "path": result.path, "size_bytes": result.size_bytes} | named
        case "LoadWeights":
            return {"status": "loaded", "path": result.path} | named
        case "UnloadModel":
            return {"status": "removed"} | named
        case "Sample":
            return _samples(result) | named
        case "CreateCustomLoss":
            return {"loss_id": result, "backend": backend}


def _saved_sampler(saved: SamplerSaved) -> dict[str, Any]:
    fields = {"path": saved.path, "sampling_session_id": saved.sampling_session_id}
    return {name: value for name, value in fields.items() if value is not None}


def _training(output: ForwardBackwardOutput, asked: Asked | None) -> dict[str, Any]:
    """`loss` is the mean over weighted tokens: `loss_sum / weight_sum`."""
    metrics = output.metrics
    weight = next((metrics[key] for key in (WEIGHT, "weight:sum", "tokens:sum") if metrics.get(key)), 1.0)
    fields: dict[str, Any] = {
        "loss": metrics["loss:sum"] / weight,
        "loss_sum": metrics["loss:sum"],
        "weight_sum": weight,
        "num_tokens": int(metrics.get("tokens:sum", 0)),
        "num_samples": len(output.loss_fn_outputs),
        "logprobs": [tensor.to_numpy().tolist() for tensor in output.logprobs],
    }
    shown = {name: value for name, value in metrics.items() if name not in (WEIGHT, BASE_LOSS, KL)}
    if asked is not None and asked.kl_coeff is not None:
        divergence = metrics[KL] / weight if KL in metrics else None
        fields["base_loss"] = metrics[BASE_LOSS] / weight
        fields["kl_penalty"] = 0.0 if divergence is None else asked.kl_coeff * divergence
        shown |= {} if divergence is None else {"kl_div": divergence}
    for name in ("loss", "base_loss", "kl_penalty"):
        if not math.isfinite(fields.get(name, 0.0)):
            raise ServerError(f"{name} is {fields[name]!r}; lower the learning rate or the rewards")
    return fields | {"metrics": _finite(shown)}


def _finite(metrics: dict[str, float]) -> dict[str, float | None]:
    """JSON has no NaN."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def _samples(response: SampleResponse) -> dict[str, Any]:
    fields: dict[str, Any] = {"sequences": [_sequence(sequence) for sequence in response.sequences]}
    if isinstance(response, PromptsSampled):
        return fields | {"completions": response.completions, "prompt_logprobs": response.logprobs_of_prompts}
    scores = response.prompt_logprobs
    return fields | {"prompt_logprobs": None if scores is None else [scores]}


def _sequence(sequence: SampledSequence) -> dict[str, Any]:
    return {"stop_reason": sequence.stop_reason, "tokens": sequence.tokens, "logprobs": sequence.logprobs}
