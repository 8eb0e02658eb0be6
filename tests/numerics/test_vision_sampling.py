"""Pictures in prompts, against transformers' own Qwen2.5-VL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.numerics.driver import VOCAB, Driver, item, sample_operation
from tests.numerics.vision import picture, plain_vision_model, reference_inputs, save_vision_model, text
from tinsmith.types import Datum, EncodedTextChunk, ImageChunk, ModelInput, SampleResponse
from tinsmith.types.errors import InvalidInput, Unsupported
from tinsmith.types.images import place_tokens
from tinsmith.types.operations import PublishSnapshot, Sample


@pytest.fixture(scope="module")
def vision_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vision_model(tmp_path_factory.mktemp("qwen_vl"))


@pytest.fixture(scope="module")
def plain(vision_folder: Path) -> Any:
    return plain_vision_model(vision_folder)


def operation(driver: Driver, prompt: ModelInput, **fields: Any) -> Sample:
    placed = place_tokens(prompt, driver.engine.card.images, "prompt")
    return sample_operation(placed.ids_N, images=placed.images, **fields)  # type: ignore[arg-type]


def prompts(seed: int = 0) -> list[ModelInput]:
    rng = np.random.default_rng(seed)
    wide, small, large = picture(1, 40, 24), picture(2, 16, 16, "jpeg"), picture(4, 150, 90)
    chunks: list[list[Any]] = [
        [text(rng, 6), wide, text(rng, 9)],
        [text(rng, 18)],
        [small, text(rng, 5)],
        [text(rng, 3), large],
        [text(rng, 20), small, text(rng, 1), wide, text(rng, 4)],
        [wide],
    ]
    return [ModelInput(chunks=some) for some in chunks]


def reference_logprobs(plain: Any, folder: Path, prompt: ModelInput, drawn: list[int]) -> np.ndarray:
    """Of every token of prompt and answer but the first; picture rows among them mean nothing."""
    whole = prompt.append(EncodedTextChunk(tokens=drawn)) if drawn else prompt
    inputs = reference_inputs(folder, whole)
    with torch.no_grad():
        logprobs = torch.log_softmax(reference_logits(plain, inputs)[:-1], -1)
    return logprobs.gather(1, inputs["input_ids"][0, 1:, None])[:, 0].numpy()


def reference_logits(plain: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Put together from transformers' parts: its own forward pass takes any placeholder for a row of a picture."""
    embeds = plain.get_input_embeddings()(inputs["input_ids"]).clone()
    positions = None
    if "pixel_values" in inputs:
        kinds, grids = inputs["mm_token_type_ids"], inputs["image_grid_thw"]
        embeds[kinds == 1] = torch.cat(plain.get_image_features(inputs["pixel_values"], grids).pooler_output)
        positions, _ = plain.model.get_rope_index(inputs["input_ids"], kinds, grids)
    hidden = plain.get_decoder()(inputs_embeds=embeds, position_ids=positions).last_hidden_state
    return plain.lm_head(hidden)[0]


def check_drawn(plain: Any, folder: Path, prompt: ModelInput, response: SampleResponse) -> None:
    for sequence in response.sequences:
        expected = reference_logprobs(plain, folder, prompt, sequence.tokens)[-len(sequence.tokens) :]
        assert np.abs(np.asarray(sequence.logprobs) - expected).max() <= 1e-4


@pytest.mark.parametrize("options", [{}, {"max_prefill_tokens": 7}, {"deterministic": True}])
def test_greedy_answers_to_pictures_equal_generate(vision_folder: Path, plain: Any, options: dict[str, Any]) -> None:
    driver = Driver(vision_folder, **options)
    try:
        asked = prompts()
        fields = {"max_tokens": 12, "temperature": 0.0, "stop_token_ids": (1,)}
        answers = driver.all([operation(driver, prompt, **fields) for prompt in asked])
    finally:
        torch.use_deterministic_algorithms(False)
    for prompt, answer in zip(asked, answers, strict=True):
        inputs = reference_inputs(vision_folder, prompt)
        everything = torch.ones_like(inputs["input_ids"])  # else ids that equal the padding's are hidden
        whole = plain.generate(**inputs, attention_mask=everything, max_new_tokens=12, do_sample=False, pad_token_id=0)
        expected = whole[0, inputs["input_ids"].shape[1] :].tolist()
        if isinstance(prompt.chunks[-1], EncodedTextChunk):
            # behind a picture `generate` counts on along each axis, not from where a forward pass puts the next token
            assert answer.sequences[0].tokens == expected
        check_drawn(plain, vision_folder, prompt, answer)


def test_samples_in_company_have_the_log_probs_of_transformers(vision_folder: Path, plain: Any) -> None:
    driver = Driver(vision_folder)
    operations = [
        operation(driver, prompt, num_samples=3, max_tokens=20, seed=index) for index, prompt in enumerate(prompts())
    ]
    together = driver.all(operations)
    for prompt, asked, answer in zip(prompts(), operations, together, strict=True):
        check_drawn(plain, vision_folder, prompt, answer)
        alone = Driver(vision_folder)(asked)
        assert [s.tokens for s in alone.sequences] == [s.tokens for s in answer.sequences]


def test_prompt_log_probs_are_those_of_text_and_none_in_pictures(vision_folder: Path, plain: Any) -> None:
    driver = Driver(vision_folder, max_prefill_tokens=11)
    for prompt in prompts():
        asked = operation(driver, prompt, max_tokens=1, prompt_logprobs=True, topk_prompt_logprobs=2)
        got = driver(asked).prompt_logprobs_np
        is_text = asked.prompt >= 0
        is_text[0] = False
        assert np.isnan(got[~is_text]).all()
        expected = reference_logprobs(plain, vision_folder, prompt, [])
        assert np.abs(got[1:] - expected)[is_text[1:]].max(initial=0) <= 1e-4


def test_two_pictures_share_no_cache_and_one_picture_shares_its_own(vision_folder: Path, plain: Any) -> None:
    driver, rng = Driver(vision_folder), np.random.default_rng(1)
    before, after = text(rng, 20), text(rng, 30)

    def prompt(seed: int) -> ModelInput:
        return ModelInput(chunks=[before, picture(seed, 80, 48), after])

    hits = []
    for seed in (1, 2, 1, 2):
        answer = driver(operation(driver, prompt(seed), max_tokens=6, seed=seed))
        check_drawn(plain, vision_folder, prompt(seed), answer)
        hits.append(answer.prompt_cache_hit_tokens)
    assert hits == [0, 16, 82, 82]


def test_answers_survive_interruptions(vision_folder: Path, plain: Any) -> None:
    driver, asked = Driver(vision_folder, kv_cache_bytes=2**20), prompts()[0]
    preempted = 0
    sampler = driver.engine._sampler
    preempt = sampler._preempt_youngest

    def counted() -> Any:
        nonlocal preempted
        preempted += 1
        return preempt()

    sampler._preempt_youngest = counted  # type: ignore[method-assign]
    answer = driver(operation(driver, asked, num_samples=24, max_tokens=200))
    assert preempted
    check_drawn(plain, vision_folder, asked, answer)


def test_training_and_sampling_agree_on_an_adapter_that_sees_pictures(vision_folder: Path) -> None:
    driver, prompt = Driver(vision_folder), prompts()[4]
    driver.create("m", rank=3)
    driver.randomize("m")
    driver(PublishSnapshot(model_id="m", snapshot_id="s"))
    asked = operation(driver, prompt, max_tokens=10, snapshot_id="s")
    base, tuned = driver.all([operation(driver, prompt, max_tokens=10), asked])
    assert base.sequences[0].logprobs != tuned.sequences[0].logprobs
    drawn = tuned.sequences[0]
    num_prompt, num_drawn = len(asked.prompt), len(drawn.tokens)
    targets = np.concatenate([np.zeros(num_prompt - 1, np.int64), drawn.tokens])
    weights = np.ones(len(targets), np.float32)
    whole = prompt.append(EncodedTextChunk(tokens=drawn.tokens[:-1]))
    (output,) = driver.train(item("m", Datum(whole, {"target_tokens": targets, "weights": weights}), forward_only=True))
    trained = output.logprobs[0].to_numpy()[-num_drawn:]
    assert np.abs(trained - np.asarray(drawn.logprobs)).max() <= 1e-5


def test_a_broken_picture_fails_its_own_request_only(vision_folder: Path, plain: Any) -> None:
    driver, rng = Driver(vision_folder), np.random.default_rng(2)
    broken = ImageChunk(data=picture(1, 40, 24).data[:-200], format="png")
    bad = operation(driver, ModelInput(chunks=[text(rng, 3), broken]))
    good = prompts()[0]
    failed, fine = driver.all([bad, operation(driver, good)])
    assert isinstance(failed, InvalidInput)
    assert failed.message.startswith("prompt.chunks[1].data cannot be decoded as a png file")
    check_drawn(plain, vision_folder, good, fine)


def test_a_model_that_reads_text_only_refuses_a_prompt_with_a_picture(driver: Driver, vision_folder: Path) -> None:
    asked = operation(Driver(vision_folder), ModelInput(chunks=[picture(1, 16, 16)]))
    with pytest.raises(
        Unsupported, match=r"prompt\.chunks\[0\] is of type 'image'; base model 'test/model' reads text"
    ):
        driver(asked)


def test_drawn_placeholders_are_read_as_the_plain_tokens_they_are(vision_folder: Path) -> None:
    driver = Driver(vision_folder)
    answer = driver(operation(driver, prompts()[0], num_samples=40, max_tokens=60, temperature=3.0))
    assert {token for sequence in answer.sequences for token in sequence.tokens} == set(range(VOCAB))
    assert all(len(sequence.tokens) == 60 for sequence in answer.sequences)
