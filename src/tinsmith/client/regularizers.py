"""Terms to add to a custom loss: `regularized(loss, [RegularizerSpec(fn=l2(), weight=0.01, name="l2")])`.

A regularizer is a function of the datums and their target log-probabilities, `[N]` or `[N, K]` each, like the loss
itself; so its gradient is exact. Sums that stand for a whole distribution (entropy, KL) run over the targets given:
with the likely tokens of each position as `[N, K]` targets they are those of the distribution, with one target per
position a part of it.
"""

# N token positions, K alternatives per position

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from tinsmith.client.custom_loss import CustomLoss
from tinsmith.types.datum import Datum

if TYPE_CHECKING:
    import torch

Regularizer: TypeAlias = Callable[[list[Datum], "list[torch.Tensor]"], "torch.Tensor | Awaitable[torch.Tensor]"]
"""May be a coroutine function: one that asks a service, say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RegularizerSpec:
    """Raises `ValueError` for a name that cannot be part of a metric's name."""

    fn: Regularizer
    weight: float
    name: str

    def __post_init__(self) -> None:
        if not self.name or ":" in self.name or "/" in self.name:
            raise ValueError(f"the name of a regularizer must be a word without : and /, not {self.name!r}")


def regularized(base: CustomLoss, specs: Sequence[RegularizerSpec]) -> CustomLoss:
    """`base + Σ weight · term`, for `TrainingClient.forward_backward_custom`.

    Metrics beside those of `base`: `base_loss:sum`, and per term `reg/<name>/value:sum`, `reg/<name>/contribution:sum`
    and `reg/<name>/grad_norm:max`, the norm of the weighted term's gradient with respect to the log-probabilities.
    Raises `ValueError` if two terms have one name.
    """
    names = [spec.name for spec in specs]
    if len(set(names)) < len(names):
        raise ValueError(f"regularizers need names of their own, not {names!r}")

    def total(data: list[Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, Mapping[str, float]]:
        loss, told = base(data, logprobs)
        metrics = {**told, "base_loss:sum": float(loss.detach())}
        for spec in specs:
            value = _value(spec, data, logprobs)
            term = spec.weight * value
            metrics[f"reg/{spec.name}/value:sum"] = float(value.detach())
            metrics[f"reg/{spec.name}/contribution:sum"] = float(term.detach())
            metrics[f"reg/{spec.name}/grad_norm:max"] = _gradient_norm(term, logprobs)
            loss = loss + term
        return loss, metrics

    return total


def l1() -> Regularizer:
    """Σ |lp|"""
    return lambda data, logprobs: _total(lp.abs() for lp in logprobs)


def l2() -> Regularizer:
    """Σ lp²"""
    return lambda data, logprobs: _total(lp.square() for lp in logprobs)


def elastic_net(l1_ratio: float = 0.5) -> Regularizer:
    """Σ ratio·|lp| + (1 - ratio)·lp²"""
    if not 0 <= l1_ratio <= 1:
        raise ValueError(f"l1_ratio must lie between 0 and 1, not {l1_ratio!r}")
    return lambda data, logprobs: _total(l1_ratio * lp.abs() + (1 - l1_ratio) * lp.square() for lp in logprobs)


def entropy() -> Regularizer:
    """The negative entropy Σ p·lp over the targets: a positive weight keeps the model undecided."""
    return lambda data, logprobs: _total(lp.exp() * lp for lp in logprobs)


def kl(direction: Literal["forward", "reverse", "symmetric"] = "reverse", reference: str = "logprobs") -> Regularizer:
    """Divergence from the log-probabilities q that each datum has under `reference`, over the targets.

    `reverse` is Σ p·(lp - lq), `forward` Σ q·(lq - lp), `symmetric` their mean.
    Raises `ValueError` if a datum has no reference.
    """
    if direction not in ("forward", "reverse", "symmetric"):
        raise ValueError(f"direction must be forward, reverse or symmetric, not {direction!r}")

    def term(data: list[Datum], logprobs: list[torch.Tensor]) -> torch.Tensor:
        parts = []
        for index, (datum, lp) in enumerate(zip(data, logprobs, strict=True)):
            lq = _reference(datum, reference, index, lp)
            reverse, forward = lp.exp() * (lp - lq), lq.exp() * (lq - lp)
            parts.append({"reverse": reverse, "forward": forward, "symmetric": (reverse + forward) / 2}[direction])
        return _total(parts)

    return term


def consistency() -> Regularizer:
    """Σ (lp - lp')² between neighbours: datums 0 and 1, 2 and 3, …, two views of one example each.

    Raises `ValueError` if their number is odd or two neighbours differ in shape.
    """

    def term(data: list[Datum], logprobs: list[torch.Tensor]) -> torch.Tensor:
        if len(logprobs) % 2:
            raise ValueError(f"consistency compares pairs, and there are {len(logprobs)} datums")
        pairs = list(zip(logprobs[::2], logprobs[1::2], strict=True))
        for index, (one, other) in enumerate(pairs):
            if one.shape != other.shape:
                raise ValueError(f"data[{2 * index}] and data[{2 * index + 1}] differ in shape, so they are no pair")
        return _total((one - other).square() for one, other in pairs)

    return term


def orthogonality() -> Regularizer:
    """Σ cos² of the angle between the log-probabilities of each two datums.

    Raises `ValueError` unless all datums have the same shape.
    """

    def term(data: list[Datum], logprobs: list[torch.Tensor]) -> torch.Tensor:
        import torch

        if len({tuple(lp.shape) for lp in logprobs}) > 1:
            raise ValueError("orthogonality needs datums of one shape")
        rows = torch.nn.functional.normalize(torch.stack([lp.reshape(-1) for lp in logprobs]), dim=-1)
        cosines = rows @ rows.T
        return torch.triu(cosines, diagonal=1).square().sum()

    return term


def gradient_penalty(base: CustomLoss, target: float = 1.0) -> Regularizer:
    """(|∂base/∂lp| - target)², the norm over all log-probabilities together."""

    def term(data: list[Datum], logprobs: list[torch.Tensor]) -> torch.Tensor:
        import torch

        loss, _ = base(data, logprobs)
        gradients = torch.autograd.grad(loss, logprobs, create_graph=True)
        norm = torch.cat([gradient.reshape(-1) for gradient in gradients]).norm()
        penalty: torch.Tensor = (norm - target).square()
        return penalty

    return term


def _value(spec: RegularizerSpec, data: list[Datum], logprobs: list[torch.Tensor]) -> torch.Tensor:
    """Raises `ValueError` if a term is no scalar."""
    import torch

    value: Any = spec.fn(data, logprobs)
    if inspect.isawaitable(value):
        value = asyncio.run(_awaited(value))
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        raise ValueError(f"regularizer {spec.name!r} must return a scalar tensor, not {type(value).__name__}")
    scalar: torch.Tensor = value
    return scalar


async def _awaited(value: Awaitable[torch.Tensor]) -> torch.Tensor:
    return await value


def _gradient_norm(term: torch.Tensor, logprobs: list[torch.Tensor]) -> float:
    import torch

    if not term.requires_grad:
        return 0.0
    gradients = torch.autograd.grad(term, logprobs, retain_graph=True, allow_unused=True)
    squares = [float(gradient.square().sum()) for gradient in gradients if gradient is not None]
    return float(sum(squares) ** 0.5)


def _reference(datum: Datum, name: str, index: int, lp: torch.Tensor) -> torch.Tensor:
    if name not in datum.loss_fn_inputs:
        raise ValueError(f"data[{index}].loss_fn_inputs has no {name!r} to compare with")
    return datum.loss_fn_inputs[name].to_torch().reshape(lp.shape)


def _total(parts: Any) -> torch.Tensor:
    import torch

    return torch.stack([part.sum() for part in parts]).sum()
