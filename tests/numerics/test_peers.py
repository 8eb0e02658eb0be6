"""What other servers were seen to get wrong without saying so, line by line, through the whole stack."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest

import tinsmith
from tests.numerics.driver import VOCAB
from tinsmith import AdamParams, Datum, ModelInput, RequestFailedError, SamplingParams, TrainingClient

TOKENS = [5, 9, 14, 3, 77, 21, 8]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def service(qwen_folder: Path, data_dir: Path) -> Iterator[tinsmith.ServiceClient]:
    model = quote(f"test/model={qwen_folder}", safe="")
    with tinsmith.ServiceClient(base_url=f"local:?base_model={model}&data_dir={data_dir}&dtype=float32") as client:
        yield client


@pytest.fixture
def model(service: tinsmith.ServiceClient) -> TrainingClient:
    return new_model(service)


def new_model(service: tinsmith.ServiceClient, **settings: object) -> TrainingClient:
    return service.create_lora_training_client("test/model", **{"rank": 4, "seed": 1, **settings}).result()


def datum(weights: list[float] | None = None, **inputs: object) -> Datum:
    given = weights or [1.0] * (len(TOKENS) - 1)
    return Datum(ModelInput.from_ints(TOKENS[:-1]), {"target_tokens": TOKENS[1:], "weights": given, **inputs})


def policy_datum(**changes: object) -> Datum:
    length = len(TOKENS) - 1
    inputs = {"target_tokens": TOKENS[1:], "logprobs": [-4.0] * length, "advantages": [1.0] * length, **changes}
    return Datum(ModelInput.from_ints(TOKENS[:-1]), inputs)


def grad_norm(model: TrainingClient, *data: Datum, loss_fn: str = "cross_entropy", **adam: float) -> float:
    """Of one pass; the step that reads it moves nothing."""
    model.forward_backward(list(data), loss_fn).result()
    metrics = model.optim_step(AdamParams(learning_rate=0.0, **adam)).result().metrics
    assert metrics is not None
    return metrics["grad_norm:mean"]


def first_logprobs(model: TrainingClient) -> np.ndarray:
    return model.forward([datum()], "cross_entropy").result().loss_fn_outputs[0]["logprobs"].to_numpy()


def test_loss_weights_scale_the_gradient_and_two_copies_are_weight_two(model: TrainingClient) -> None:
    once = grad_norm(model, datum())
    for weight in (0.5, 2.0):
        assert grad_norm(model, datum([weight] * 6)) == pytest.approx(weight * once, rel=1e-5)
    assert grad_norm(model, datum(), datum()) == pytest.approx(2 * once, rel=1e-5)


def test_negative_weights_mirror_the_gradient(service: tinsmith.ServiceClient) -> None:
    up, down = new_model(service), new_model(service)
    weights = [0.3, 1.0, 0.0, 2.0, 1.0, 0.5]
    assert grad_norm(down, datum([-w for w in weights])) == pytest.approx(grad_norm(up, datum(weights)), rel=1e-6)
    both = new_model(service)
    assert grad_norm(both, datum(weights), datum([-w for w in weights])) <= 1e-5


def test_clipping_bounds_the_step_and_the_unclipped_norm_is_reported(service: tinsmith.ServiceClient) -> None:
    free, clipped = new_model(service), new_model(service)
    norms, moved = [], []
    for model, clip in ((free, 0.0), (clipped, 0.01)):
        before = first_logprobs(model)
        model.forward_backward([datum([1000.0] * 6)], "cross_entropy").result()
        # eps far above the gradients makes the step proportional to them
        step = model.optim_step(AdamParams(learning_rate=10.0, eps=1e3, grad_clip_norm=clip)).result()
        assert step.metrics is not None
        norms.append(step.metrics["grad_norm:mean"])
        moved.append(np.abs(first_logprobs(model) - before).max())
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    assert norms[0] > 1
    assert moved[1] < 0.1 * moved[0]


def test_modules_that_are_not_trained_have_no_adapter(service: tinsmith.ServiceClient) -> None:
    flags = ("train_mlp", "train_attn", "train_unembed")
    norms = {grad_norm(new_model(service, **{flag: False}), datum()) for flag in flags}
    norms.add(grad_norm(new_model(service), datum()))
    assert len({round(norm, 4) for norm in norms}) == 4
    with pytest.raises(Exception, match=r"train_unembed, train_mlp and train_attn are all false|at least one"):
        new_model(service, **dict.fromkeys(flags, False))


def test_weight_decay_of_one_model_leaves_another_as_it_was(service: tinsmith.ServiceClient) -> None:
    still, decaying = new_model(service), new_model(service)
    for model in (still, decaying):
        model.forward_backward([datum()], "cross_entropy").result()
        model.optim_step(AdamParams(learning_rate=0.01)).result()
    before = first_logprobs(still)
    for _ in range(3):
        decaying.forward_backward([datum()], "cross_entropy").result()
        decaying.optim_step(AdamParams(learning_rate=0.1, weight_decay=0.9)).result()
    assert np.array_equal(first_logprobs(still), before)


def test_a_bad_sample_fails_alone(service: tinsmith.ServiceClient) -> None:
    sampler = service.create_sampling_client(base_model="test/model").result()
    prompt = ModelInput.from_ints([3, 4, 5])
    params = SamplingParams(max_tokens=5, seed=1)
    alone = sampler.sample(prompt, 1, params).result().sequences[0].tokens
    bad = sampler.sample(prompt, 1, SamplingParams(max_tokens=5, top_k=VOCAB + 1))
    good = sampler.sample(prompt, 1, params)
    with pytest.raises(RequestFailedError, match=f"top_k must be -1 .* not {VOCAB + 1}"):
        bad.result()
    assert good.result().sequences[0].tokens == alone


def test_a_snapshot_never_moves_and_sampling_it_disturbs_nothing(service: tinsmith.ServiceClient) -> None:
    sampled, quiet = new_model(service), new_model(service)
    for model in (sampled, quiet):
        model.forward_backward([datum()], "cross_entropy").result()
        model.optim_step(AdamParams(learning_rate=0.05)).result()
    snapshot = sampled.save_weights_and_get_sampling_client().result()
    params = SamplingParams(max_tokens=20, seed=3)
    before = snapshot.sample(ModelInput.from_ints([3]), 2, params).result()
    for model in (sampled, quiet):
        model.forward_backward([datum()], "cross_entropy").result()
        model.optim_step(AdamParams(learning_rate=0.05)).result()
    after = snapshot.sample(ModelInput.from_ints([3]), 2, params).result()
    assert [s.tokens for s in before.sequences] == [s.tokens for s in after.sequences]
    assert [s.logprobs for s in before.sequences] == [s.logprobs for s in after.sequences]
    assert np.abs(first_logprobs(sampled) - first_logprobs(quiet)).max() <= 1e-6


def test_an_unknown_base_model_is_refused_by_name(service: tinsmith.ServiceClient) -> None:
    with pytest.raises(Exception, match=r"no base model 'other/model'.*test/model"):
        service.create_lora_training_client("other/model").result()
    with pytest.raises(Exception, match=r"other/model.*test/model"):
        service.create_sampling_client(base_model="other/model").result().sample(
            ModelInput.from_ints([3]), 1, SamplingParams(max_tokens=1)
        ).result()


def test_an_adapter_that_cannot_be_read_is_never_replaced_by_the_base_model(
    service: tinsmith.ServiceClient, model: TrainingClient, data_dir: Path
) -> None:
    path = model.save_weights_for_sampler("damaged").result().path
    (file,) = [found for found in data_dir.rglob("adapter_model.safetensors") if "damaged" in str(found)]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(Exception, match=r"damaged.*adapter_model\.safetensors|adapter_model\.safetensors.*damaged"):
        service.create_sampling_client(model_path=path).result().sample(
            ModelInput.from_ints([3]), 1, SamplingParams(max_tokens=1)
        ).result()


@pytest.mark.parametrize(
    ("bad", "loss_fn", "message"),
    [
        (Datum(ModelInput.from_ints([VOCAB, 1]), {"target_tokens": [1, 2], "weights": [1.0, 1.0]}), "cross_entropy",
         rf"data\[0\]\.model_input: token {VOCAB} at position 0"),
        (Datum(ModelInput.from_ints([1, 1]), {"target_tokens": [1, VOCAB], "weights": [1.0, 1.0]}), "cross_entropy",
         rf"data\[0\].*target_tokens.*{VOCAB}.*1"),
        (datum([1.0] * 5), "cross_entropy", r"data\[0\].*weights.*5"),
        (policy_datum(advantages=[1.0, 1.0, float("nan"), 1.0, 1.0, 1.0]), "ppo", r"data\[0\].*advantages.*2"),
        (datum(), "no_such_loss", r"no_such_loss.*cross_entropy.*importance_sampling.*ppo.*cispo.*dro"),
    ],
)  # fmt: skip
def test_bad_data_are_refused_with_datum_field_and_position(
    model: TrainingClient, bad: Datum, loss_fn: str, message: str
) -> None:
    with pytest.raises(Exception, match=message):
        model.forward_backward([bad], loss_fn).result()
    assert grad_norm(model, datum()) > 0


def test_importance_sampling_is_not_clipped(model: TrainingClient) -> None:
    far = policy_datum(logprobs=[-9.0] * 6)
    result = model.forward_backward([far], "importance_sampling").result()
    lp = result.loss_fn_outputs[0]["logprobs"].to_numpy().astype(np.float64)
    assert result.metrics["loss:sum"] == pytest.approx(-np.exp(lp + 9.0).sum(), rel=1e-5)
    assert np.exp(lp + 9.0).max() > 4


def test_prompt_logprobs_have_the_length_of_the_prompt_and_begin_with_none(service: tinsmith.ServiceClient) -> None:
    sampler = service.create_sampling_client(base_model="test/model").result()
    scored = sampler.compute_logprobs(ModelInput.from_ints(TOKENS)).result()
    assert len(scored) == len(TOKENS)
    assert scored[0] is None
    model = new_model(service)
    assert np.abs(np.asarray(scored[1:]) - first_logprobs(model)).max() <= 1e-4


def test_stop_reasons_are_exact_and_the_end_token_ends(service: tinsmith.ServiceClient) -> None:
    sampler = service.create_sampling_client(base_model="test/model").result()
    prompt = ModelInput.from_ints([3, 4])
    drawn = sampler.sample(prompt, 40, SamplingParams(max_tokens=50, seed=2)).result().sequences
    for sequence in drawn:
        if sequence.stop_reason == "stop":
            assert sequence.tokens[-1] == 1
        else:
            assert len(sequence.tokens) == 50
        assert 1 not in sequence.tokens[:-1]
    assert {s.stop_reason for s in drawn} == {"stop", "length"}


def test_base_model_sampling_from_state_forward_and_custom_losses_work(
    service: tinsmith.ServiceClient, model: TrainingClient
) -> None:
    model.forward_backward([datum()], "cross_entropy").result()
    model.optim_step(AdamParams(learning_rate=0.05)).result()
    path = model.save_state("state").result().path
    again = service.create_training_client_from_state(path).result()
    assert np.array_equal(first_logprobs(again), first_logprobs(model))

    def minus_mean(data: list[Datum], logprobs: list) -> tuple:  # type: ignore[type-arg]
        loss = -sum(lp.sum() for lp in logprobs)
        return loss, {"custom": float(loss.detach())}

    custom = model.forward_backward_custom([datum()], minus_mean).result()
    assert custom.metrics["custom"] == pytest.approx(-first_logprobs(model).sum(), rel=1e-4)


def test_a_step_without_gradients_succeeds_and_moves_nothing(model: TrainingClient) -> None:
    before = first_logprobs(model)
    step = model.optim_step(AdamParams(learning_rate=1.0, weight_decay=0.5)).result()
    assert step.metrics is not None
    assert step.metrics["step_applied"] == 0
    assert np.array_equal(first_logprobs(model), before)
