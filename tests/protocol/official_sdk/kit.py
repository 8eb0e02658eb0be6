"""What the checks share: the registry of checks, the clients, and small makers of data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tinker
from tinker import types

MODEL = "tinsmith/tiny"
CHECKS: list[Callable[[], None]] = []


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS.append(function)
    return function


class Shared:
    """What later checks take from earlier ones."""

    service: tinker.ServiceClient
    rest: tinker.RestClient
    base_url: str
    trainer: tinker.TrainingClient
    sampler: tinker.SamplingClient
    state_path: str
    sampler_path: str
    traced_loss: tinker.LossHandle


def datum(tokens: Sequence[int], **inputs: Any) -> types.Datum:
    given = {"target_tokens": list(tokens[1:]), "weights": [1.0] * (len(tokens) - 1)} | inputs
    return types.Datum(
        model_input=types.ModelInput.from_ints(list(tokens[:-1])),
        loss_fn_inputs={key: value for key, value in given.items() if value is not None},
    )


def policy_datum(tokens: Sequence[int], logprobs: Sequence[float], advantages: Sequence[float]) -> types.Datum:
    return datum(tokens, weights=None, logprobs=list(logprobs), advantages=list(advantages))


def logprobs_of(result: types.ForwardBackwardOutput) -> list[np.ndarray]:
    return [output["logprobs"].to_numpy() for output in result.loss_fn_outputs]


def adam(**changes: float) -> types.AdamParams:
    return types.AdamParams(**({"learning_rate": 1e-3} | changes))


def failure_of(action: Callable[[], Any], *words: str) -> str:
    """The message of the error that `action` must end with; it must hold all `words`."""
    try:
        outcome = action()
    except Exception as error:  # noqa: BLE001 - whatever the SDK raises
        message = f"{type(error).__name__}: {error}"
        for word in words:
            assert word in message, f"{word!r} is not in {message!r}"
        return message
    raise AssertionError(f"no error; got {outcome!r}")


SENTENCES = [[10 + (7 * i + 3 * j) % 400 for j in range(6 + i % 5)] for i in range(8)]


PROMPT = types.ModelInput.from_ints([20, 21, 22, 23])


def draw(client: tinker.SamplingClient, num_samples: int = 1, **params: Any) -> types.SampleResponse:
    given = {"max_tokens": 12, "seed": 5, "temperature": 1.0} | params
    return client.sample(PROMPT, num_samples, types.SamplingParams(**given)).result()
