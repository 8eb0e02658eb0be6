"""What is refused, and that the message names the field, the place and the value."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tinsmith.control.requests import DrawSamples
from tinsmith.control.validation import check_adam, check_training, check_ttl, sampling_operation
from tinsmith.runtime.fake import FAKE_CARD
from tinsmith.types import AdamParams, Datum, ImageChunk, ModelInput, SampledProvenanceSpan, SamplingParams, TensorData
from tinsmith.types.custom_loss import CustomLoss, LossCall, LossInput, Ref
from tinsmith.types.errors import InvalidInput, TinsmithError, Unsupported

CARD = replace(FAKE_CARD, vocab_size=100, max_context=16, eos_token_ids=(7, 8))
NAN, INF = float("nan"), float("inf")


def sft(tokens: list[int] | None = None, **inputs: Any) -> Datum:
    values = {"target_tokens": [2, 3, 4], "weights": [0.0, 1.0, -0.5]} | inputs
    return Datum(ModelInput.from_ints(tokens or [1, 2, 3]), {k: v for k, v in values.items() if v is not None})


def rl(**inputs: Any) -> Datum:
    values = {"target_tokens": [0, 3, 4], "logprobs": [0.0, -1.0, -2.0], "advantages": [0.0, 1.0, -1.0]} | inputs
    return Datum(ModelInput.from_ints([1, 2, 3]), {k: v for k, v in values.items() if v is not None})


def check(*data: Datum, loss_fn: str = "cross_entropy", **config: float | str) -> None:
    check_training(data, loss_fn, config, CARD)


def two_targets(tokens: list[list[int]], weights: list[list[float]]) -> dict[str, TensorData]:
    return {
        "target_tokens": TensorData.from_numpy(np.asarray(tokens)),
        "weights": TensorData.from_numpy(np.asarray(weights, dtype=np.float32)),
    }


def sparse(shape: tuple[int, int], values: list[float], dtype: Any, crow: list[int], col: list[int]) -> TensorData:
    return TensorData(values, dtype, shape, crow, col)


# ---- training data ----


def test_good_data_pass() -> None:
    check(sft(), sft(tokens=[99, 0, 1]))
    check(sft(weights=[0, 1, 1]))
    check(sft(**two_targets([[1, 2]] * 3, [[0.5, 0.5]] * 3)))
    check(
        sft(
            target_tokens=sparse((3, 9), [5, 6], "int64", [0, 1, 1, 2], [8, 0]),
            weights=sparse((3, 9), [0.5], "float32", [0, 0, 0, 1], [0]),
        )
    )
    check(
        Datum(
            ModelInput(chunks=[*ModelInput.from_ints([1]).chunks, *ModelInput.from_ints([2, 3]).chunks]),
            sft().loss_fn_inputs,
        )
    )
    for loss_fn in ("importance_sampling", "ppo", "cispo", "dro"):
        check(rl(), loss_fn=loss_fn)
    check(rl(), loss_fn="ppo", clip_low_threshold=0.9, clip_high_threshold=1.1)
    check(rl(), loss_fn="cispo", clip_high_threshold=2)
    check(rl(), loss_fn="dro", beta=0.0)
    check(rl(sequence_ratio_mask=[0.0, 1.0, 1.0]), loss_fn="gspo", clip_low_threshold=0.9)
    for loss_fn in ("ppo", "cispo"):
        check(rl(clip_low_threshold=[0.5, 0.6, 0.7], clip_high_threshold=[1.5, 1.6, 1.7]), loss_fn=loss_fn)
    check(rl(clip_low_threshold=[0.5, 0.6, 0.7]), loss_fn="ppo", clip_high_threshold=0.8)


@pytest.mark.parametrize(
    ("datum", "message"),
    [
        (sft(tokens=[1, 100, 3]), "data[1].model_input: token 100 at position 1 is outside the vocabulary 0..99"),
        (sft(tokens=[1, 2, -1]), "data[1].model_input: token -1 at position 2 is outside the vocabulary"),
        (Datum(ModelInput.empty(), sft().loss_fn_inputs), "data[1].model_input is empty"),
        (sft(tokens=[1] * 17), "data[1].model_input has 17 tokens; base model 'tinsmith/fake' takes at most 16"),
        (
            sft(target_tokens=[2, 3]),
            "data[1].loss_fn_inputs['target_tokens'] has 2 rows, but model_input has 3 tokens",
        ),
        (
            sft(target_tokens=[2, 3, 100]),
            "data[1].loss_fn_inputs['target_tokens']: token 100 at position 2 is outside the vocabulary",
        ),
        (
            sft(target_tokens=np.asarray([2.0, 3.0, 4.0])),
            "data[1].loss_fn_inputs['target_tokens'] has dtype 'float32'; it must be 'int64'",
        ),
        (
            sft(weights=np.asarray([0, 1, 1])),
            "data[1].loss_fn_inputs['weights'] has dtype 'int64'; it must be 'float32'",
        ),
        (sft(weights=[0.0, NAN, 1.0]), "data[1].loss_fn_inputs['weights'] is nan at position 1"),
        (sft(weights=[0.0, 1.0, -INF]), "data[1].loss_fn_inputs['weights'] is -inf at position 2"),
        (
            sft(weights=[1.0, 1.0]),
            "data[1].loss_fn_inputs['weights'] has shape (2,); it must be that of target_tokens, (3,)",
        ),
        (
            sft(weights=None),
            "data[1].loss_fn_inputs['weights'] is missing; 'cross_entropy' needs target_tokens, weights",
        ),
        (sft(target_tokens=None), "data[1].loss_fn_inputs['target_tokens'] is missing"),
        (sft(advantages=[1.0, 1.0, 1.0]), "data[1].loss_fn_inputs['advantages'] is unknown for 'cross_entropy'"),
        (
            sft(**two_targets([[1, 2], [1, 200], [1, 2]], [[0.5, 0.5]] * 3)),
            "data[1].loss_fn_inputs['target_tokens']: token 200 at position (1, 1)",
        ),
        (
            sft(**two_targets([[1, 2]] * 3, [[1.0, 1.0], [1.0, 1.0], [NAN, 1.0]])),
            "data[1].loss_fn_inputs['weights'] is nan at position (2, 0)",
        ),
        (
            sft(**two_targets([[1, 2]] * 3, [[1.0]] * 3)),
            "data[1].loss_fn_inputs['weights'] has shape (3, 1); it must be that of target_tokens, (3, 2)",
        ),
        (
            sft(
                target_tokens=sparse((3, 9), [5, 600], "int64", [0, 1, 1, 2], [8, 4]),
                weights=sparse((3, 9), [0.5], "float32", [0, 0, 0, 1], [0]),
            ),
            "data[1].loss_fn_inputs['target_tokens']: token 600 at position (2, 4)",
        ),
        (
            sft(target_tokens=sparse((3, 10**12), [5], "int64", [0, 1, 1, 1], [8])),
            "has 1000000000000 targets per position; 1 to 1024 are allowed",
        ),
        (
            sft(target_tokens=np.asarray([[[1]]] * 3)),
            "data[1].loss_fn_inputs['target_tokens'] has shape (3, 1, 1); it must be (N,) or (N, K)",
        ),
    ],
)
def test_bad_data_are_named(datum: Datum, message: str) -> None:
    with pytest.raises(InvalidInput, match=re.escape(message)):
        check(sft(), datum)


@pytest.mark.parametrize(
    ("loss_fn", "datum", "message"),
    [
        ("ppo", rl(advantages=[0.0, NAN, 0.0]), "data[0].loss_fn_inputs['advantages'] is nan at position 1"),
        ("ppo", rl(logprobs=[0.0, INF, 0.0]), "data[0].loss_fn_inputs['logprobs'] is inf at position 1"),
        (
            "dro",
            rl(logprobs=None),
            "data[0].loss_fn_inputs['logprobs'] is missing; 'dro' needs target_tokens, logprobs",
        ),
        ("cispo", rl(weights=[1.0, 1.0, 1.0]), "data[0].loss_fn_inputs['weights'] is unknown for 'cispo'"),
        (
            "gspo",
            rl(),
            "data[0].loss_fn_inputs['sequence_ratio_mask'] is missing; 'gspo' needs target_tokens, logprobs",
        ),
        (
            "gspo",
            rl(sequence_ratio_mask=[0.0, 0.0, 0.0]),
            "data[0].loss_fn_inputs['sequence_ratio_mask'] is 0 everywhere",
        ),
        (
            "gspo",
            rl(sequence_ratio_mask=[1.0, 1.0]),
            "data[0].loss_fn_inputs['sequence_ratio_mask'] has shape (2,); it must be that of target_tokens, (3,)",
        ),
        (
            "ppo",
            rl(clip_low_threshold=[0.5, -0.5, 0.5]),
            "data[0].loss_fn_inputs['clip_low_threshold'] is -0.5 at position 1; must be at least 0",
        ),
        (
            "ppo",
            rl(clip_low_threshold=[0.5, 0.5, 1.5]),
            "data[0]: clip_low_threshold 1.5 is above clip_high_threshold 1.2 at position 2",
        ),
        (
            "cispo",
            rl(clip_high_threshold=[INF, 1.0, 1.0]),
            "data[0].loss_fn_inputs['clip_high_threshold'] is inf at position 0",
        ),
        (
            "ppo",
            rl(clip_low_threshold=np.asarray([0, 0, 0])),
            "data[0].loss_fn_inputs['clip_low_threshold'] has dtype 'int64'; it must be 'float32'",
        ),
        (
            "dro",
            rl(clip_low_threshold=[0.5, 0.5, 0.5]),
            "data[0].loss_fn_inputs['clip_low_threshold'] is unknown for 'dro'",
        ),
        (
            "importance_sampling",
            rl(target_tokens=np.asarray([[1], [2], [3]])),
            "data[0].loss_fn_inputs['target_tokens'] has shape (3, 1); it must be (N,)",
        ),
    ],
)
def test_bad_policy_data_are_named(loss_fn: str, datum: Datum, message: str) -> None:
    with pytest.raises(InvalidInput, match=re.escape(message)):
        check(datum, loss_fn=loss_fn)


@pytest.mark.parametrize("key", ["clip_low_threshold", "clip_high_threshold"])
def test_a_bound_is_given_by_the_config_or_by_the_datum_not_by_both(key: str) -> None:
    message = f"data[1].loss_fn_inputs[{key!r}] and loss_fn_config[{key!r}] are both given; give one of them"
    with pytest.raises(InvalidInput, match=re.escape(message)):
        check(rl(), rl(**{key: [1.0, 1.0, 1.0]}), loss_fn="ppo", **{key: 1.0})


# ---- custom losses ----


def weighted() -> CustomLoss:
    """`(logprobs * advantages * scale).sum()`."""
    return CustomLoss(
        name="weighted",
        inputs=(
            LossInput(node="logprobs", name="logprobs", rank=1),
            LossInput(node="advantages", name="advantages", rank=1),
            LossInput(node="scale", name="scale", rank=0),
        ),
        calls=(
            LossCall(node="mul", op="call_function", target="operator.mul", args=(Ref("logprobs"), Ref("advantages"))),
            LossCall(node="mul_1", op="call_function", target="operator.mul", args=(Ref("mul"), Ref("scale"))),
            LossCall(node="sum_1", op="call_method", target="sum", args=(Ref("mul_1"),)),
        ),
        loss=Ref("sum_1"),
    )


def for_weighted(**inputs: Any) -> Datum:
    return rl(**{"scale": np.asarray(2.0)} | inputs)


def test_a_custom_loss_takes_what_it_declares_and_ignores_the_rest() -> None:
    scalars = [np.asarray(2.0), TensorData([2.0], "float32"), TensorData([2.0], "float32", [])]
    data = [for_weighted(scale=scale, advantages=[NAN, INF, 0.0]) for scale in scalars]
    check_training(data, "custom", {}, CARD, weighted())


@pytest.mark.parametrize(
    ("datum", "message"),
    [
        (for_weighted(scale=None), "data[0].loss_fn_inputs['scale'] is missing; custom loss 'weighted' takes it"),
        (for_weighted(target_tokens=None), "data[0].loss_fn_inputs['target_tokens'] is missing"),
        (
            for_weighted(scale=np.asarray([1.0, 2.0])),
            "data[0].loss_fn_inputs['scale'] has shape (2,), but custom loss 'weighted' takes scale with 0 dimensions",
        ),
        (
            for_weighted(target_tokens=np.asarray([[1], [2], [3]])),
            "data[0].loss_fn_inputs['target_tokens'] has shape (3, 1), but custom loss 'weighted' takes logprobs",
        ),
        (for_weighted(target_tokens=[1, 2, 100]), "data[0].loss_fn_inputs['target_tokens']: token 100 at position 2"),
        (for_weighted(target_tokens=[1, 2]), "has 2 rows, but model_input has 3 tokens"),
    ],
)
def test_data_that_do_not_fit_a_custom_loss_are_named(datum: Datum, message: str) -> None:
    with pytest.raises(InvalidInput, match=re.escape(message)):
        check_training([datum], "custom", {}, CARD, weighted())


def test_a_custom_loss_reads_no_endless_tensor() -> None:
    loss = replace(weighted(), inputs=(*weighted().inputs[:2], LossInput(node="scale", name="scale", rank=2)))
    datum = for_weighted(scale=sparse((3, 10**12), [5], "float32", [0, 1, 1, 1], [8]))
    with pytest.raises(InvalidInput, match="has more than 16777216 values"):
        check_training([datum], "custom", {}, CARD, loss)


def test_no_data_is_an_error() -> None:
    with pytest.raises(InvalidInput, match="data is empty"):
        check()


def test_pictures_are_not_supported() -> None:
    picture = ImageChunk(data=b"x", format="png", expected_tokens=1)
    datum = Datum(ModelInput(chunks=[*ModelInput.from_ints([1, 2]).chunks, picture]), sft().loss_fn_inputs)
    with pytest.raises(Unsupported, match=re.escape("data[0].model_input.chunks[1] is of type 'image'")):
        check(datum)


@pytest.mark.parametrize(
    ("loss_fn", "kind", "message"),
    [
        (
            "xent",
            InvalidInput,
            "loss_fn 'xent' is unknown. Supported: cross_entropy, importance_sampling, ppo, cispo, dro, gspo, custom",
        ),
        ("stable_reinforce", Unsupported, "use 'importance_sampling'. Supported: cross_entropy"),
        ("custom", InvalidInput, "loss_fn 'custom' needs a loss_fn_config['loss_id']"),
    ],
)
def test_losses_that_are_not_there_are_refused_with_what_is(
    loss_fn: str, kind: type[TinsmithError], message: str
) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        check(rl(), loss_fn=loss_fn)


@pytest.mark.parametrize(
    ("loss_fn", "config", "message"),
    [
        ("cross_entropy", {"beta": 1.0}, "loss_fn_config['beta'] is unknown for 'cross_entropy', which takes no keys"),
        (
            "ppo",
            {"clip": 0.2},
            "loss_fn_config['clip'] is unknown for 'ppo', which takes clip_high_threshold, clip_low",
        ),
        ("ppo", {"clip_low_threshold": "0.8"}, "loss_fn_config['clip_low_threshold'] must be a number, not '0.8'"),
        ("ppo", {"clip_high_threshold": INF}, "loss_fn_config['clip_high_threshold'] must be finite, not inf"),
        ("ppo", {"clip_low_threshold": 1.3}, "clip_low_threshold 1.3 is above clip_high_threshold 1.2 for 'ppo'"),
        ("cispo", {"clip_low_threshold": 5.0}, "clip_low_threshold 5.0 is above clip_high_threshold 4.0"),
        ("cispo", {"clip_low_threshold": -0.1}, "loss_fn_config['clip_low_threshold'] must be at least 0, not -0.1"),
        ("dro", {"beta": -1.0}, "loss_fn_config['beta'] must be at least 0, not -1.0"),
        ("dro", {"beta": NAN}, "loss_fn_config['beta'] must be finite, not nan"),
    ],
)
def test_loss_settings_are_checked(loss_fn: str, config: Mapping[str, float | str], message: str) -> None:
    with pytest.raises(InvalidInput, match=re.escape(message)):
        check(rl() if loss_fn != "cross_entropy" else sft(), loss_fn=loss_fn, **config)


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([("s", 0, 2)], "data[0].model_input_spans cover 2 positions of 3; they must tile all"),
        ([("s", 0, 2), ("", 0, 1)], "data[0].model_input_spans[1] needs a sequence_id"),
        ([("s", -1, 3)], "data[0].model_input_spans[0] needs a sequence_id, an offset of at least 0"),
        ([("s", 0, 3), ("s", 3, 0)], "data[0].model_input_spans[1] needs"),
    ],
)
def test_provenance_must_be_well_formed(spans: list[tuple[str, int, int]], message: str) -> None:
    good = [SampledProvenanceSpan(sequence_id="s", offset=0, length=3)]
    check(Datum(sft().model_input, sft().loss_fn_inputs, good, good))
    bad = [SampledProvenanceSpan(sequence_id=s, offset=o, length=n) for s, o, n in spans]
    with pytest.raises(InvalidInput, match=re.escape(message)):
        check(Datum(sft().model_input, sft().loss_fn_inputs, bad, good))


# ---- optimizer, checkpoints ----


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"learning_rate": -1e-4}, "adam_params.learning_rate must be at least 0, not -0.0001"),
        ({"learning_rate": NAN}, "adam_params.learning_rate must be finite, not nan"),
        ({"beta1": 1.0}, "adam_params.beta1 must be below 1, not 1.0"),
        ({"beta2": 1.5}, "adam_params.beta2 must be below 1, not 1.5"),
        ({"beta2": -0.1}, "adam_params.beta2 must be at least 0, not -0.1"),
        ({"eps": -1e-9}, "adam_params.eps must be at least 0, not -1e-09"),
        ({"weight_decay": INF}, "adam_params.weight_decay must be finite, not inf"),
        ({"grad_clip_norm": -1.0}, "adam_params.grad_clip_norm must be at least 0, not -1.0"),
    ],
)
def test_optimizer_settings_are_checked(params: dict[str, float], message: str) -> None:
    check_adam(AdamParams(learning_rate=0.0, beta1=0.0, beta2=0.0, eps=0.0))
    with pytest.raises(InvalidInput, match=re.escape(message)):
        check_adam(AdamParams(**params))


@pytest.mark.parametrize("seconds", [0, 3599, 10 * 365 * 86400 + 1])
def test_a_checkpoint_lives_an_hour_to_ten_years(seconds: int) -> None:
    for good in (None, 3600, 10 * 365 * 86400):
        check_ttl(good)
    with pytest.raises(InvalidInput, match=f"ttl_seconds {seconds} is outside 3600..315360000"):
        check_ttl(seconds)


# ---- sampling ----


def ask(tokens: list[int] | None = None, **kwargs: Any) -> DrawSamples:
    fields = {"num_samples": 1, "prompt": ModelInput.from_ints(tokens or [1, 2, 3])}
    params = SamplingParams(**{k: kwargs.pop(k) for k in list(kwargs) if k in SamplingParams.model_fields})
    return DrawSamples(sampling_session_id="s", seq_id=0, params=params, **(fields | kwargs))


def operation(request: DrawSamples, seed: Callable[[], int] = lambda: 5) -> Any:
    return sampling_operation(request, CARD, "snap", seed)


def test_open_sampling_values_are_filled_in() -> None:
    filled = operation(ask())
    assert (filled.max_tokens, filled.seed, filled.stop_token_ids, filled.stop_strings) == (13, 5, (7, 8), ())
    assert filled.prompt.tolist() == [1, 2, 3]
    assert filled.snapshot_id == "snap"
    assert operation(ask(max_tokens=13)).max_tokens == 13
    assert operation(ask(stop=[])).stop_token_ids == ()
    assert operation(ask(stop="END")).stop_strings == ("END",)
    assert operation(ask(stop=["a", "b"])).stop_strings == ("a", "b")
    assert operation(ask(stop=[4, 5])).stop_token_ids == (4, 5)
    assert operation(ask(temperature=0.0, top_k=100, top_p=1.0)).top_k == 100


def asking(targets: np.ndarray) -> DrawSamples:
    return ask(target_prompt_logprobs=TensorData(targets))


@pytest.mark.parametrize(("given", "folded"), [(0, 0), (-1, 2**63 - 2), (2**70, 2**70 % (2**63 - 1)), (2**63 - 1, 0)])
def test_any_integer_is_a_seed(given: int, folded: int) -> None:
    assert operation(ask(seed=given)).seed == folded


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (ask(num_samples=0), "num_samples must be 1..4096, not 0"),
        (ask(num_samples=4097), "num_samples must be 1..4096, not 4097"),
        (ask(max_tokens=0), "sampling_params.max_tokens must be at least 1, not 0"),
        (ask(max_tokens=14), "prompt of 3 tokens and sampling_params.max_tokens 14 exceed the context of 16"),
        (ask(tokens=[1] * 16), "prompt has 16 tokens and leaves no room in the context of 16"),
        (ask(tokens=[1] * 17), "prompt has 17 tokens; base model 'tinsmith/fake' takes at most 16"),
        (ask(tokens=[1, 100]), "prompt: token 100 at position 1 is outside the vocabulary 0..99"),
        (ask(prompt=ModelInput.empty()), "prompt is empty"),
        (ask(temperature=-0.1), "sampling_params.temperature must be finite and at least 0, not -0.1"),
        (ask(temperature=NAN), "sampling_params.temperature must be finite and at least 0, not nan"),
        (ask(top_k=0), "sampling_params.top_k must be -1 (off) or 1..100"),
        (ask(top_k=-2), "not -2"),
        (
            ask(top_k=101),
            "sampling_params.top_k must be -1 (off) or 1..100, the vocabulary of 'tinsmith/fake', not 101",
        ),
        (ask(top_p=0.0), "sampling_params.top_p must be above 0 and at most 1, not 0.0"),
        (ask(top_p=1.1), "sampling_params.top_p must be above 0 and at most 1, not 1.1"),
        (ask(top_p=NAN), "sampling_params.top_p must be above 0 and at most 1, not nan"),
        (ask(stop=[100]), "sampling_params.stop[0]: token 100 is outside the vocabulary"),
        (ask(stop=["a", ""]), "sampling_params.stop[1] is an empty text"),
        (ask(stop=""), "sampling_params.stop[0] is an empty text"),
        (ask(stop=["a", "\ud800"]), "sampling_params.stop[1] '\\ud800' holds half of a surrogate pair"),
        (ask(topk_prompt_logprobs=129), "topk_prompt_logprobs must be 0..100, not 129"),
        (ask(topk_sample_logprobs=-1), "topk_sample_logprobs must be 0..100, not -1"),
        (ask(prompt_alt_tokens_k=129), "prompt_alt_tokens_k must be 0..128, not 129"),
        (asking(np.zeros((2, 1), np.float32)), "target_prompt_logprobs.dtype is 'float32'; token ids must be 'int64'"),
        (asking(np.zeros(2, np.int64)), "target_prompt_logprobs.shape is None; it must be [len(prompt) - 1, K]"),
        (asking(np.zeros((3, 1), np.int64)), "target_prompt_logprobs.shape is [3, 1]; it must have 2 rows"),
        (asking(np.zeros((2, 0), np.int64)), "target_prompt_logprobs.shape is [2, 0]; K must be 1..1024"),
        (asking(np.array([[1, 2], [3, 100]])), "target_prompt_logprobs.data[3] is 100; it must be a token"),
        (asking(np.array([[1], [-2]])), "target_prompt_logprobs.data[1] is -2"),
        (asking(np.array([[-1], [-1]])), "target_prompt_logprobs names no token"),
        (ask(prompt_logprobs_last_n=1), "prompt_logprobs_last_n 1 needs prompt_logprobs to be true"),
        (ask(prompt_logprobs=True, prompt_logprobs_last_n=3), "prompt_logprobs_last_n 3 is outside 1..2"),
        (ask(prompt_logprobs=True, prompt_logprobs_last_n=0), "prompt_logprobs_last_n 0 is outside 1..2"),
    ],
)
def test_bad_sampling_requests_are_named(request_: DrawSamples, message: str) -> None:
    with pytest.raises(InvalidInput, match=re.escape(message)):
        operation(request_)
