"""Losses computed by the client: any function of log-probabilities.

The server's `cross_entropy` is linear in the log-probabilities, `-sum(weights * logprobs)`. So a backward pass with
`weights = -dloss/dlogprobs` gives exactly the gradient of the loss.
"""

# N token positions, K alternatives per position

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from tinsmith.types.datum import Datum
from tinsmith.types.results import ForwardBackwardOutput
from tinsmith.types.tensor import TensorData
from tinsmith.wire.metrics import merge_metrics

if TYPE_CHECKING:
    import torch

CustomLoss: TypeAlias = Callable[[list[Datum], "list[torch.Tensor]"], "tuple[torch.Tensor, Mapping[str, float]]"]
"""`(data, logprobs)` to `(loss, metrics)`; each log-probability tensor has the shape of its `target_tokens`."""

PerDatumLoss: TypeAlias = Callable[..., "tuple[torch.Tensor, Mapping[str, Any]]"]
"""`(logprobs, **loss_fn_inputs)` of one datum to `(loss, metrics)`, metrics named `custom/<name>:sum` or `:mean`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossHandle:
    """A loss that runs once per datum; the losses of the datums are summed. It runs in this process."""

    name: str
    fn: PerDatumLoss
    input_ranks: Mapping[str, int]
    """The number of dimensions of each parameter, `logprobs` first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gradient:
    """What a custom loss came to."""

    loss: float
    metrics: Mapping[str, float]
    per_datum: list[np.ndarray]
    """dloss/dlogprobs, in the shape of each datum's `target_tokens`, float32."""


def make_handle(fn: PerDatumLoss, input_ranks: Mapping[str, int]) -> LossHandle:
    """Raises `ValueError` unless `input_ranks` gives 0, 1 or 2 for each parameter of `fn`, `logprobs` first."""
    parameters = list(inspect.signature(fn).parameters)
    if not parameters or parameters[0] != "logprobs":
        raise ValueError(f"the first parameter of a custom loss must be logprobs; this one takes {parameters!r}")
    if set(input_ranks) != set(parameters):
        raise ValueError(f"input_ranks must name the parameters {parameters!r}, not {list(input_ranks)!r}")
    for name, rank in input_ranks.items():
        if rank not in (0, 1, 2) or (name == "logprobs" and rank == 0):
            raise ValueError(
                f"input_ranks[{name!r}] must be {'1 or 2' if name == 'logprobs' else '0, 1 or 2'}, not {rank!r}"
            )
    ranks = {name: input_ranks[name] for name in parameters}
    return LossHandle(name=getattr(fn, "__name__", "custom"), fn=fn, input_ranks=ranks)


def as_function(loss: CustomLoss | LossHandle) -> CustomLoss:
    """Raises `ValueError` if `loss` is neither callable nor a handle."""
    if isinstance(loss, LossHandle):
        return lambda data, logprobs: _sum_over_datums(loss, data, logprobs)
    if not callable(loss):
        raise ValueError(f"a custom loss must be a function or a LossHandle, not {loss!r}")
    return loss


def plain_data(data: Sequence[Datum]) -> list[Datum]:
    """The datums with only what the passes need: `target_tokens` and `weights` (zeros where there are none)."""
    plain = []
    for index, datum in enumerate(data):
        if not isinstance(datum, Datum):
            raise ValueError(f"data[{index}] is a {type(datum).__name__}, not a Datum")
        targets = datum.loss_fn_inputs.get("target_tokens")
        if targets is None:
            raise ValueError(f"data[{index}].loss_fn_inputs has no 'target_tokens', which every custom loss needs")
        weights = datum.loss_fn_inputs.get("weights")
        if weights is None:
            weights = TensorData.from_numpy(np.zeros(targets.to_numpy().shape, dtype=np.float32))
        plain.append(Datum(datum.model_input, {"target_tokens": targets, "weights": weights}))
    return plain


def differentiate(
    loss: CustomLoss, data: Sequence[Datum], plain: Sequence[Datum], forward: ForwardBackwardOutput
) -> Gradient:
    """Run the loss on the log-probabilities of a forward pass and differentiate it. Imports torch.

    Raises `ValueError` if the server sent no log-probabilities, or if the loss is not a finite scalar that depends
    on them, or if its gradient is not finite.
    """
    import torch

    logprobs = []
    for index, (datum, output) in enumerate(zip(plain, forward.loss_fn_outputs, strict=True)):
        if "logprobs" not in output:
            raise ValueError(f"the server returned no logprobs for data[{index}]")
        shape = datum.loss_fn_inputs["target_tokens"].to_numpy().shape
        logprobs.append(output["logprobs"].to_torch().reshape(shape).requires_grad_())
    with torch.enable_grad():
        value, metrics = _returned(lambda: loss(list(data), logprobs))
        if not value.requires_grad:
            raise ValueError("the custom loss does not depend on the log-probabilities, so it has no gradient")
        value.backward()  # type: ignore[no-untyped-call]
    total = float(value.detach())
    per_datum = [_gradient_of(logprob, index) for index, logprob in enumerate(logprobs)]
    if not np.isfinite(total):
        raise ValueError(f"the custom loss is {total!r}")
    return Gradient(loss=total, metrics=metrics, per_datum=per_datum)


def weighted_data(plain: Sequence[Datum], gradient: Gradient) -> list[Datum]:
    return [
        Datum(
            datum.model_input,
            {
                "target_tokens": datum.loss_fn_inputs["target_tokens"],
                "weights": TensorData.from_numpy(-derivative),
            },
        )
        for datum, derivative in zip(plain, gradient.per_datum, strict=True)
    ]


def merged_metrics(backend: Mapping[str, float], gradient: Gradient) -> dict[str, float]:
    """The server's metrics, its `loss:sum` under the name `surrogate_loss:sum`, and those of the custom loss."""
    renamed = {("surrogate_loss:sum" if key == "loss:sum" else key): value for key, value in backend.items()}
    return {**renamed, "loss:sum": gradient.loss, **gradient.metrics}


def _returned(loss: Callable[[], object]) -> tuple[torch.Tensor, dict[str, float]]:
    """What a loss gives, metrics as numbers. Raises `ValueError` if it is not `(scalar tensor, metrics)`."""
    import torch

    try:
        answer = loss()
    except StopIteration as error:  # no asyncio future can hold one: Python 3.11 would wait for ever
        raise RuntimeError("the custom loss raised StopIteration") from error
    match answer:
        case (torch.Tensor() as value, Mapping() as metrics) if value.numel() == 1:
            return value, {key: _number(key, metric) for key, metric in metrics.items()}
    parts = answer if isinstance(answer, tuple) else (answer,)
    told = " and ".join(_kind(part) for part in parts)
    raise ValueError(f"a custom loss must return (scalar tensor, metrics), not {told}")


def _kind(value: object) -> str:
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else f"{type(value).__name__}{list(shape)}"


def _number(name: str, metric: Any) -> float:
    """A metric as a number. Raises `ValueError` if it is none."""
    try:
        return float(metric.detach() if hasattr(metric, "detach") else metric)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"metric {name!r} of the custom loss is no number: {metric!r}") from error


def _gradient_of(logprob: torch.Tensor, index: int) -> np.ndarray:
    if logprob.grad is None:
        return np.zeros(tuple(logprob.shape), dtype=np.float32)
    derivative: np.ndarray = logprob.grad.float().numpy()
    if not np.isfinite(derivative).all():
        raise ValueError(f"the gradient of the custom loss is not finite for data[{index}]")
    return derivative


def _sum_over_datums(
    handle: LossHandle, data: Sequence[Datum], logprobs: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, dict[str, float]]:
    losses, metrics = [], []
    for index, (datum, logprob) in enumerate(zip(data, logprobs, strict=True)):
        inputs = {name: _input(datum, name, index) for name in handle.input_ranks if name != "logprobs"}
        for name, tensor in {"logprobs": logprob, **inputs}.items():
            if tensor.ndim != handle.input_ranks[name]:
                raise ValueError(
                    f"data[{index}]: {name} has {tensor.ndim} dimensions, "
                    f"but {handle.name} declares {handle.input_ranks[name]}"
                )
        loss, values = _returned(functools.partial(handle.fn, logprob, **inputs))
        losses.append(loss)
        metrics.append(values)
    return sum(losses[1:], start=losses[0]), merge_metrics(metrics, [1] * len(metrics))


def _input(datum: Datum, name: str, index: int) -> torch.Tensor:
    if name not in datum.loss_fn_inputs:
        raise ValueError(f"data[{index}].loss_fn_inputs has no {name!r}, which the loss takes")
    return datum.loss_fn_inputs[name].to_torch()
