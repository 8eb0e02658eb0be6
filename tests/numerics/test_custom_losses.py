"""Losses traced in a client and run in the engine: equal to autograd, bounded, and harmless to others."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.numerics.driver import VOCAB, Driver, item, random_datum
from tests.numerics.traces import traced
from tinsmith.engine.custom_loss import TracedLoss, _bound, _operation, _size, _tensors, _value
from tinsmith.engine.loss_operations import FUNCTIONS, METHODS
from tinsmith.types import Datum, ModelInput, TensorData
from tinsmith.types import loss_operations as allowed
from tinsmith.types.custom_loss import CustomLoss, LossCall, LossInput, Ref
from tinsmith.types.errors import InvalidInput
from tinsmith.types.metrics import reduction_of

Result = tuple[Tensor, dict[str, Any]]


def policy_gradient(logprobs: Tensor, advantages: Tensor, old: Tensor, mask: Tensor) -> Result:
    ratio = torch.exp(logprobs - old)
    clipped = ratio.clamp(0.8, 1.2)
    surrogate = -torch.minimum(ratio * advantages, clipped * advantages)
    count = torch.clamp(mask.sum(), min=1)
    kl = (torch.exp(old - logprobs) - 1 - (old - logprobs)) * mask
    loss = (surrogate * mask).sum() / count + 0.1 * kl.sum() / count
    return loss, {"custom/kl:mean": kl.detach().mean(), "custom/tokens:sum": mask.sum()}


def everything(logprobs: Tensor, old: Tensor, mask: Tensor) -> Result:
    """The ways of writing things that traces spell differently."""
    num = logprobs.shape[0]
    taken = logprobs[mask > 0]
    ends = logprobs[1 : num - 1].sum() + logprobs[..., None].mean() + logprobs[::2].sum() + logprobs[[0, 2]].sum()
    smooth = functional.softplus(logprobs).mean() + functional.logsigmoid(logprobs).sum()
    pair = functional.huber_loss(logprobs, old, reduction="sum") + functional.mse_loss(logprobs, old)
    values, order = torch.sort(logprobs, descending=True)
    weights = torch.arange(num, device=logprobs.device, dtype=torch.float32) / math.sqrt(num)
    finite = torch.where(mask > 0, logprobs, float("-inf"))
    special = torch.special.expm1(logprobs).sum() + torch.special.logsumexp(finite, 0)
    norms = torch.linalg.vector_norm(logprobs) + logprobs.norm() + torch.norm(logprobs)
    shapes = logprobs.unsqueeze(0).T.sum() + torch.stack([logprobs, old], dim=1).max(dim=1).values.sum()
    rows = torch.cat([functional.pad(logprobs, (1, 0)), torch.zeros_like(old)]).cumsum(0).std()
    kinds = logprobs.to(torch.float64).pow(2).float().sum() + (~(mask > 0)).float().dot(logprobs) + logprobs @ old
    pieces = (
        sum(part.mean() for part in logprobs[:4].reshape(2, 2).unbind(0)[:1])
        if False
        else logprobs.sigmoid().log().sum()
    )
    relus = functional.relu(logprobs).sum() + functional.silu(logprobs).sum() + functional.elu(logprobs).sum()
    loss = taken.sum() + ends + smooth + pair + (values * weights).sum() + special + norms + shapes + rows + kinds
    return loss + pieces + relus + (order * 0).sum(), {}


def pairwise(logprobs: Tensor, scores: Tensor, scale: Tensor) -> Result:
    gaps = logprobs[:, None] - logprobs[None, :]
    wins = (scores[:, None] > scores[None, :]).float()
    return -(functional.logsigmoid(gaps * scale) * wins).sum(), {"custom/pairs:sum": wins.sum()}


def distillation(logprobs: Tensor, weights: Tensor) -> Result:
    return -(weights * torch.log_softmax(logprobs, dim=-1)).sum(), {"custom/width:mean": logprobs.shape[1]}


def custom_datum(rng: np.random.Generator, length: int, **inputs: np.ndarray) -> Datum:
    given = {
        "advantages": rng.normal(0, 1, length),
        "old": rng.normal(-3, 0.5, length),
        "mask": rng.random(length) < 0.7,
        "scores": rng.normal(0, 1, length),
        **inputs,
    }
    datum = random_datum(rng, length)
    floats = {key: value if value.dtype == np.int64 else value.astype(np.float32) for key, value in given.items()}
    return Datum(datum.model_input, {**datum.loss_fn_inputs, **floats})


def wide_datum(rng: np.random.Generator, length: int, width: int) -> Datum:
    inputs = {
        "target_tokens": rng.integers(0, VOCAB, (length, width)),
        "weights": rng.random((length, width)).astype(np.float32),
    }
    return Datum(ModelInput.from_ints(rng.integers(0, VOCAB, length)), inputs)


CASES: list[tuple[Callable[..., Result], dict[str, int]]] = [
    (policy_gradient, {}),
    (everything, {}),
    (pairwise, {"scale": 0}),
    (distillation, {"logprobs": 2, "weights": 2}),
]


@pytest.mark.parametrize(("fn", "ranks"), CASES, ids=lambda value: getattr(value, "__name__", ""))
def test_a_traced_loss_equals_direct_autograd_through_the_model(
    driver: Driver, fn: Callable[..., Result], ranks: dict[str, int]
) -> None:
    """Its value, its metrics, and by the linear surrogate its gradient in every weight; several datums, summed."""
    rng = np.random.default_rng(0)
    data = [custom_datum(rng, n, scale=np.asarray(1.5)) for n in (9, 30, 5)]
    if fn is distillation:
        data = [wide_datum(rng, n, 3) for n in (9, 30, 5)]
    loss = traced(fn, **ranks)
    driver.create("m")
    driver.randomize("m")
    (output,) = driver.train(item("m", *data, loss_fn="custom", custom_loss=loss))
    total, metrics, surrogates = 0.0, [], []
    for datum, logprobs in zip(data, output.logprobs, strict=True):
        leaf = logprobs.to_torch().requires_grad_()
        others = [datum.loss_fn_inputs[given.name].to_torch() for given in loss.inputs[1:]]
        value, found = fn(leaf, *others)
        value.backward()
        total += float(value.detach())
        metrics.append({key: float(metric) for key, metric in found.items()})
        inputs = {"target_tokens": datum.loss_fn_inputs["target_tokens"], "weights": -leaf.grad.numpy()}
        surrogates.append(Datum(datum.model_input, inputs))
    assert output.loss_sum == pytest.approx(total, rel=1e-5)
    for key in metrics[0]:
        combine = np.mean if key.endswith(":mean") else np.sum
        assert output.metrics[key] == pytest.approx(combine([found[key] for found in metrics]), rel=1e-5), key
    assert all(reduction_of(key) for key in output.metrics)
    driver.create("reference")
    driver.randomize("reference")
    driver.train(item("reference", *surrogates))
    reference = driver.grads("reference")
    assert np.linalg.norm(driver.grads("m") - reference) <= 1e-5 * np.linalg.norm(reference)


def test_forward_alone_leaves_no_gradient(driver: Driver) -> None:
    data = [custom_datum(np.random.default_rng(1), 9)]
    driver.create("m")
    both = [
        driver.train(item("m", *data, loss_fn="custom", custom_loss=traced(policy_gradient), forward_only=only))[0]
        for only in (True, False)
    ]
    assert both[0].metrics == both[1].metrics
    driver.create("n")
    driver.train(item("n", *data, loss_fn="custom", custom_loss=traced(policy_gradient), forward_only=True))
    assert not driver.grads("n").any()


def test_a_loss_that_does_not_fit_fails_alone_and_leaves_its_gradients_as_they_were(driver: Driver) -> None:
    def add_too_many(logprobs: Tensor, advantages: Tensor) -> Result:
        return (logprobs + advantages[:-1]).sum(), {}

    rng = np.random.default_rng(2)
    good, bad = random_datum(rng, 9), custom_datum(rng, 9)
    for name in ("good", "bad"):
        driver.create(name)
        driver.train(item(name, good))
    before = driver.grads("bad")
    outcomes = driver.all([item("bad", bad, loss_fn="custom", custom_loss=traced(add_too_many)), item("good", good)])
    assert isinstance(outcomes[0], InvalidInput)
    assert "custom loss 'add_too_many', data[0]: node 'add' ('operator.add') failed" in str(outcomes[0])
    assert np.array_equal(driver.grads("bad"), before)
    assert np.array_equal(driver.grads("good"), 2 * before)
    driver.train(item("bad", good))


def test_a_loss_that_is_not_a_number_is_no_error_of_the_loss() -> None:
    def nowhere(logprobs: Tensor) -> Result:
        return torch.log(logprobs - 1e6).sum(), {}

    value, grad, _ = run(nowhere)
    assert math.isnan(float(value))
    assert grad.shape == (6,)


def test_a_scalar_that_came_without_its_shape_is_a_scalar() -> None:
    def scaled(logprobs: Tensor, num: Tensor) -> Result:
        return logprobs.sum() * num, {}

    datum = custom_datum(np.random.default_rng(0), 6, num=np.asarray([3.0]))
    bare = TensorData([3.0], "float32")
    value, grad, _ = run(
        scaled, ranks={"num": 0}, datum=Datum(datum.model_input, {**datum.loss_fn_inputs, "num": bare})
    )
    assert float(value) == pytest.approx(-22.5)
    assert grad.tolist() == [3.0] * 6


def test_inputs_are_not_changed() -> None:
    def relabel(logprobs: Tensor, advantages: Tensor) -> Result:
        return (advantages.relu() * logprobs).sum(), {}

    datum = custom_datum(np.random.default_rng(3), 6)
    before = datum.loss_fn_inputs["advantages"].to_numpy().copy()
    run(relabel, datum=datum)
    assert np.array_equal(datum.loss_fn_inputs["advantages"].to_numpy(), before)


# ---- what does not fit ----


def two(logprobs: Tensor) -> Result:
    return logprobs[:2], {}


def integer(logprobs: Tensor) -> Result:
    return (logprobs > 0).sum(), {}


def constant(logprobs: Tensor, advantages: Tensor) -> Result:
    return advantages.sum(), {}


def detached(logprobs: Tensor) -> Result:
    return logprobs.detach().sum(), {}


def undifferentiable(logprobs: Tensor) -> Result:
    return (logprobs // 2).sum(), {}


def long_metric(logprobs: Tensor) -> Result:
    return logprobs.sum(), {"custom/all:sum": logprobs * 2}


def math_of_a_tensor(logprobs: Tensor) -> Result:
    return logprobs.sum() * math.exp(logprobs[0]), {}


def sized_by_data(logprobs: Tensor, num: Tensor) -> Result:
    return logprobs.sum() * torch.ones(num).sum(), {}


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (two, "the loss must be a floating-point scalar, not a tensor of float32 with shape (2,)"),
        (integer, "the loss must be a floating-point scalar, not a tensor of int64 with shape ()"),
        (constant, "the loss does not depend on logprobs"),
        (detached, "the loss does not depend on logprobs"),
        (undifferentiable, "the loss cannot be differentiated: "),
        (long_metric, "metric 'custom/all:sum' must be a scalar, not a tensor of float32 with shape (6,)"),
        (math_of_a_tensor, "node 'exp' ('math.exp') failed: works on numbers, not on a Tensor"),
        (sized_by_data, "node 'ones' ('torch.ones') failed: "),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_a_loss_must_not_return_or_do_is_named(fn: Callable[..., Result], message: str) -> None:
    with pytest.raises(InvalidInput, match=re.escape(f"custom loss {fn.__name__!r}, data[4]: {message}")):
        run(fn, ranks={"num": 0})


# ---- bounds ----


def repeated(logprobs: Tensor) -> Result:
    return logprobs.repeat(2**40).sum(), {}


def expanded(logprobs: Tensor) -> Result:
    return (logprobs[0].expand(2**20, 2**20) * 2).sum(), {}


def ones(logprobs: Tensor) -> Result:
    return (torch.ones(logprobs.shape[0] * 10**10) * logprobs.sum()).sum(), {}


def tensor_power(logprobs: Tensor) -> Result:
    for _ in range(12):
        logprobs = (logprobs[..., None] * logprobs[0]).reshape(-1)
        logprobs = torch.cat([logprobs] * 8)
    return logprobs.sum(), {}


def outer_loss(logprobs: Tensor) -> Result:
    long = torch.cat([logprobs] * 6000)
    return functional.mse_loss(long[:, None].expand_as(long[:, None]), long[None, :], reduction="sum"), {}


def indexed(logprobs: Tensor) -> Result:
    index = torch.arange(logprobs.shape[0] * 5000) * 0
    return logprobs[:, None][index[:, None], index[None, :] * 0].sum(), {}


def big_number(logprobs: Tensor) -> Result:
    num = logprobs.shape[0]
    for _ in range(9):
        num = num * num
    return logprobs.sum() * num, {}


def big_power(logprobs: Tensor) -> Result:
    return logprobs.sum() * (logprobs.shape[0] ** 10**9), {}


def product(logprobs: Tensor) -> Result:
    square = logprobs[:, None] * logprobs[None, :]
    return (square @ square).sum(), {}


def padded(logprobs: Tensor) -> Result:
    return functional.pad(logprobs, (0, 2**50)).sum(), {}


def in_pieces(logprobs: Tensor) -> Result:
    return torch.cat([logprobs] * 1000).split(1)[0].sum(), {}


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (repeated, "('repeat') failed: "),
        (expanded, "('expand') failed: it needs 1099511627776 more values"),
        (ones, "('torch.ones') failed: it needs 60000000000 more values"),
        (tensor_power, "more values, and the loss may make"),
        (outer_loss, "('torch.nn.functional.mse_loss') failed: it needs 1296000000 more values"),
        (indexed, "more values, and the loss may make"),
        (big_number, "('operator.mul') failed: an integer beyond 64 bits"),
        (big_power, "('operator.pow') failed: the exponent of an integer may be at most 64"),
        (product, "one operand of a matrix product must be a vector here, not 2 and 2 dimensions"),
        (padded, "('torch.nn.functional.pad') failed: it needs 1125899906842630 more values"),
        (in_pieces, "('split') failed: makes 6000 pieces; at most 4096 are allowed"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_no_loss_takes_more_than_its_share(fn: Callable[..., Result], message: str) -> None:
    with pytest.raises(InvalidInput, match=re.escape(message)):
        run(fn)


def test_division_that_would_kill_the_process_is_refused() -> None:
    """torch divides the smallest integer by -1 with truncation by a machine instruction that traps."""

    def divide(logprobs: Tensor, num: Tensor) -> Result:
        return logprobs.sum() + torch.div(num, num - num - 1, rounding_mode="trunc"), {}

    datum = custom_datum(np.random.default_rng(0), 6, num=np.asarray(-(2**63)))
    with pytest.raises(InvalidInput, match="rounding_mode 'trunc' is for floating-point numbers here"):
        run(divide, ranks={"num": 0}, datum=datum)


# ---- the table ----


def test_every_allowed_name_has_its_function_and_no_other_has() -> None:
    assert FUNCTIONS.keys() == allowed.TARGETS
    assert METHODS.keys() == allowed.METHODS
    for name in {*FUNCTIONS, *METHODS} - {"operator.and_", "operator.or_"}:
        assert not re.search(r"_$|rand|dropout|\bitem|tolist|numpy|load|save|set_|manual_seed|backward|apply", name), (
            name
        )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", sorted(FUNCTIONS))
def test_every_function_keeps_to_its_bound_and_writes_into_no_argument(target: str) -> None:
    _try("call_function", target)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", sorted(METHODS))
def test_every_method_keeps_to_its_bound_and_writes_into_no_argument(target: str) -> None:
    _try("call_method", target)


def _try(op: Any, target: str) -> None:
    """With many shapes of arguments, most of which do not fit; nothing but `InvalidInput` may come of it."""
    datum = custom_datum(np.random.default_rng(0), 6, order=np.arange(6))
    before = {key: tensor.to_numpy().copy() for key, tensor in datum.loss_fn_inputs.items()}
    inputs = tuple(LossInput(node=name, name=name, rank=1) for name in ("logprobs", "advantages", "mask", "order"))
    likely: tuple[Any, ...] = ((), (0,), (0, 1), (2, 0), (1.5,), ((6, -1),), (-1, None, -(2**63)), (0, Ref("order")))
    likely += ((Ref("advantages"),), (Ref("advantages"), Ref("mask")), (Ref("order"), Ref("order")), (Ref("square"),))
    for head in (Ref("logprobs"), Ref("order"), Ref("square"), [Ref("logprobs"), Ref("advantages")], 3):
        for tail in likely:
            calls = (
                LossCall(node="column", op="call_method", target="unsqueeze", args=(Ref("logprobs"), 1)),
                LossCall(node="square", op="call_function", target="operator.mul", args=(Ref("column"), Ref("mask"))),
                LossCall(node="result", op=op, target=target, args=(head, *tail)),
                LossCall(node="loss", op="call_method", target="sum", args=(Ref("logprobs"),)),
            )
            try:
                loss = CustomLoss(name="probe", inputs=inputs, calls=calls, loss=Ref("loss"))
                TracedLoss(loss).evaluate(torch.full((6,), -1.0), [datum], first_datum=0, forward_only=False)
            except InvalidInput:
                continue
            _check_bound(calls[2], datum)
    for key, values in before.items():
        assert np.array_equal(datum.loss_fn_inputs[key].to_numpy(), values), key


def _check_bound(call: LossCall, datum: Datum) -> None:
    """Functions that return two tensors may return the bound twice."""
    logprobs = torch.full((6,), -1.0)
    nodes = {key: tensor.to_torch() for key, tensor in datum.loss_fn_inputs.items()} | {"logprobs": logprobs}
    nodes["square"] = logprobs[:, None] * nodes["mask"]
    args = [_value(argument, nodes) for argument in call.args]
    result = _operation(call)(*args)
    assert _size(result) <= _bound(call, _operation(call), args, {}) * max(1, len(_tensors([result]))), (call, result)


def run(
    fn: Callable[..., Result], *, ranks: dict[str, int] | None = None, datum: Datum | None = None
) -> tuple[Tensor, Tensor, dict[str, float]]:
    datum = datum or custom_datum(np.random.default_rng(0), 6, num=np.asarray(3))
    logprobs = torch.linspace(-2, -0.5, 6)
    return TracedLoss(traced(fn, **(ranks or {}))).evaluate(logprobs, [datum], first_datum=4, forward_only=False)
