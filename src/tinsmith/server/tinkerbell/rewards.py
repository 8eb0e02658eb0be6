"""Policy gradients from conversations and rewards, as a loss that the engine runs.

Per trained token, with log-probability lp, its value q when it was drawn, the base model's value r and the reward A of
its conversation, the loss sums  -exp(lp - q) A + kl_coeff (exp(r - lp) - 1 - (r - lp)).  The last term is Schulman's k3
estimate of KL(policy || base) (http://joschu.net/blog/kl-approx.html): never negative, and with a gradient of its own.
"""

# N token position of one conversation

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tinsmith.data import RenderedConversation
from tinsmith.types import Datum, ModelInput, TensorData
from tinsmith.types.custom_loss import CustomLoss, LossCall, LossInput, Ref
from tinsmith.types.errors import InvalidInput

BASE_LOSS, KL, WEIGHT = "custom/base_loss:sum", "custom/kl:sum", "custom/weight:sum"
"""Metrics of the loss, sums over trained tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A conversation and what is known of its trained tokens."""

    rendered: RenderedConversation
    reward: float
    drawn_logprobs: Sequence[float] | None = None
    """Of the trained tokens."""
    base_logprobs_N: np.ndarray | None = None
    """Of all tokens; the first has none."""


def reward_loss(*, kl_coeff: float, has_drawn_logprobs: bool) -> CustomLoss:
    """Without `has_drawn_logprobs`, the tokens count as drawn from the weights they are trained on: q is lp itself."""
    names = ["logprobs", "mask", "advantages"]
    calls = []
    if has_drawn_logprobs:
        names.append("drawn")
    else:
        calls.append(_call("drawn", "call_method", "detach", Ref("logprobs")))
    calls += [
        _torch("gap", "sub", Ref("logprobs"), Ref("drawn")),
        _torch("masked_gap", "mul", Ref("gap"), Ref("mask")),
        _torch("ratio", "exp", Ref("masked_gap")),
        _torch("gain", "mul", Ref("ratio"), Ref("advantages")),
        _torch("total_gain", "sum", Ref("gain")),
        _torch("base_loss", "neg", Ref("total_gain")),
        _torch("weight", "sum", Ref("mask")),
    ]
    metrics = {BASE_LOSS: Ref("base_loss"), WEIGHT: Ref("weight")}
    loss = Ref("base_loss")
    if kl_coeff:
        names.append("reference")
        calls += [
            _torch("distance", "sub", Ref("reference"), Ref("logprobs")),
            _torch("masked_distance", "mul", Ref("distance"), Ref("mask")),
            _torch("grown", "expm1", Ref("masked_distance")),
            _torch("k3", "sub", Ref("grown"), Ref("masked_distance")),
            _torch("kl", "sum", Ref("k3")),
            _torch("penalty", "mul", Ref("kl"), kl_coeff),
            _torch("loss", "add", Ref("base_loss"), Ref("penalty")),
        ]
        metrics[KL] = Ref("kl")
        loss = Ref("loss")
    inputs = tuple(LossInput(node=name, name=name, rank=1) for name in names)
    return CustomLoss(name="importance_sampling", inputs=inputs, calls=tuple(calls), loss=loss, metrics=metrics)


def _torch(node: str, function: str, *args: object) -> LossCall:
    return _call(node, "call_function", f"torch.{function}", *args)


def _call(node: str, op: str, target: str, *args: object) -> LossCall:
    return LossCall(node=node, op="call_method" if op == "call_method" else "call_function", target=target, args=args)


def reward_datum(scored: Scored) -> Datum:
    """Shifted by one, as every datum. Raises `InvalidInput` if `drawn_logprobs` does not fit the trained tokens."""
    rendered = scored.rendered
    mask_N = np.asarray(rendered.weights, dtype=np.float32)
    inputs: dict[str, np.ndarray] = {"mask": mask_N, "advantages": mask_N * np.float32(scored.reward)}
    if scored.drawn_logprobs is not None:
        if len(scored.drawn_logprobs) != int(mask_N.sum()):
            raise InvalidInput(
                f"loss_fn_inputs.logprobs of {rendered.source} has {len(scored.drawn_logprobs)} values, but its "
                f"completion has {int(mask_N.sum())} tokens, the end of its turn included"
            )
        drawn_N = np.zeros_like(mask_N)
        drawn_N[mask_N > 0] = scored.drawn_logprobs
        inputs["drawn"] = drawn_N
    if scored.base_logprobs_N is not None:
        inputs["reference"] = np.nan_to_num(scored.base_logprobs_N).astype(np.float32)
    tensors = {name: TensorData.from_numpy(array_N[1:]) for name, array_N in inputs.items()}
    targets = TensorData.from_numpy(np.asarray(rendered.tokens[1:], dtype=np.int64))
    return Datum(
        model_input=ModelInput.from_ints(rendered.tokens[:-1]), loss_fn_inputs={"target_tokens": targets, **tensors}
    )
