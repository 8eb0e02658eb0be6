"""Pictures in training data, against transformers' own Qwen2.5-VL."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image

from tests.numerics.driver import VOCAB, Driver, item, random_datum
from tests.numerics.test_peft import key_of, relative, trainable
from tests.numerics.vision import (
    IMAGE_TOKEN,
    cross_entropy_datum,
    picture,
    plain_vision_model,
    reference_target_logprobs,
    save_vision_model,
    text,
)
from tinsmith.engine.fused import fuse_layers
from tinsmith.engine.kernels import FusedKernels
from tinsmith.types import Datum, ImageChunk, ModelInput
from tinsmith.types.errors import InvalidInput, Unsupported
from tinsmith.types.operations import SaveAdapter


@pytest.fixture(scope="module")
def vision_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vision_model(tmp_path_factory.mktemp("qwen_vl"))


def mixed_data(seed: int = 0) -> list[Datum]:
    """Text alone, a picture inside, first, last and alone, two pictures, and one that is scaled down."""
    rng = np.random.default_rng(seed)
    wide, small, tall, large = picture(1, 40, 24), picture(2, 16, 16, "jpeg"), picture(3, 18, 61), picture(4, 150, 90)
    return [
        random_datum(rng, 21),
        cross_entropy_datum(rng, text(rng, 6), wide, text(rng, 9), length=6 + 15 + 9),
        cross_entropy_datum(rng, small, text(rng, 5), length=4 + 5),
        cross_entropy_datum(rng, text(rng, 3), tall, length=3 + 16),
        cross_entropy_datum(rng, wide, length=15),
        cross_entropy_datum(rng, text(rng, 2), small, text(rng, 1), tall, text(rng, 4), length=2 + 4 + 1 + 16 + 4),
        cross_entropy_datum(rng, text(rng, 2), large, text(rng, 4), length=2 + 32 + 4),
    ]


@pytest.mark.parametrize("max_tokens", [2048, 40])
def test_log_probs_of_text_and_pictures_equal_transformers(vision_folder: Path, max_tokens: int) -> None:
    driver, plain = Driver(vision_folder, max_micro_batch_tokens=max_tokens), plain_vision_model(vision_folder)
    driver.create("m")
    data = mixed_data()
    (output,) = driver.train(item("m", *data, forward_only=True))
    for datum, result in zip(data, output.logprobs, strict=True):
        with torch.no_grad():
            expected = reference_target_logprobs(plain, vision_folder, datum).numpy()
        assert np.abs(result.to_numpy() - expected).max() <= 1e-4


def test_what_a_picture_shows_and_how_it_is_shaped_moves_the_text_behind_it(vision_folder: Path) -> None:
    driver, rng = Driver(vision_folder), np.random.default_rng(0)
    driver.create("m")
    before, after = text(rng, 4), text(rng, 6)
    inputs = {"target_tokens": rng.integers(0, VOCAB, 18), "weights": np.ones(18, np.float32)}
    shown = [picture(1, 32, 16), picture(2, 32, 16), picture(1, 16, 32)]
    data = [Datum(ModelInput(chunks=[before, image, after]), inputs) for image in shown]
    (output,) = driver.train(item("m", *data, forward_only=True))
    first, other, turned = (result.to_numpy() for result in output.logprobs)
    assert np.array_equal(first[:3], other[:3])
    assert np.abs(first[-6:] - other[-6:]).max() > 0.01
    assert np.abs(first[-6:] - turned[-6:]).max() > 0.01


def test_gradients_with_pictures_equal_peft_and_leave_the_vision_tower_alone(
    vision_folder: Path, tmp_path: Path
) -> None:
    driver, data = Driver(vision_folder), mixed_data(1)
    driver.create("m", rank=5)
    driver.randomize("m")
    driver(SaveAdapter(model_id="m", folder=str(tmp_path / "saved"), optimizer=False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = PeftModel.from_pretrained(
            plain_vision_model(vision_folder), tmp_path / "saved", is_trainable=True
        ).eval()

    (output,) = driver.train(item("m", *data))
    loss = torch.zeros(())
    for datum in data:
        weights = torch.from_numpy(datum.loss_fn_inputs["weights"].to_numpy())
        loss = loss - (reference_target_logprobs(reference, vision_folder, datum) * weights).sum()
    loss.backward()
    assert output.loss_sum == pytest.approx(loss.item(), rel=1e-5)

    ours = dict(driver.engine._adapters["m"].layout.named_views(torch.from_numpy(driver.grads("m"))))
    theirs = trainable(reference)
    assert {key_of(name) for name in theirs} == set(ours)
    assert not any("visual" in name for name in ours)
    for name, parameter in theirs.items():
        assert parameter.grad is not None
        assert relative(ours[key_of(name)], parameter.grad) <= 1e-4, name


def test_recomputed_layers_give_the_same_gradients_with_pictures(vision_folder: Path) -> None:
    grads = []
    for choice in ("off", "on"):
        driver = Driver(vision_folder, gradient_checkpointing=choice)
        driver.create("m")
        driver.randomize("m")
        driver.train(item("m", *mixed_data()))
        grads.append(torch.from_numpy(driver.grads("m")))
    assert relative(grads[1], grads[0]) <= 1e-6


def test_fused_layers_change_nothing_and_leave_the_vision_tower_alone(vision_folder: Path) -> None:
    results = []
    for is_fused in (False, True):
        driver = Driver(vision_folder)
        driver.create("m")
        driver.randomize("m")
        if is_fused:
            assert fuse_layers(driver.engine._base._language_model, FusedKernels()) == 2 * 4 + 1
        (output,) = driver.train(item("m", *mixed_data()))
        results.append((np.concatenate([x.to_numpy() for x in output.logprobs]), driver.grads("m")))
    (plain, plain_grads), (fused, fused_grads) = results
    assert np.abs(fused - plain).max() <= 1e-5
    assert relative(torch.from_numpy(fused_grads), torch.from_numpy(plain_grads)) <= 1e-5


def test_a_model_in_bfloat16_reads_pictures_too(vision_folder: Path) -> None:
    outputs = []
    for dtype in ("float32", "bfloat16"):
        driver = Driver(vision_folder, dtype=dtype)
        driver.create("m")
        (output,) = driver.train(item("m", *mixed_data(), forward_only=True))
        outputs.append(np.concatenate([x.to_numpy() for x in output.logprobs]))
    assert 0 < np.abs(outputs[1] - outputs[0]).max() <= 0.1


def test_two_tenants_in_one_pass_compute_what_each_computes_alone(vision_folder: Path) -> None:
    rng = np.random.default_rng(3)
    items = {
        "pictures": item("pictures", *mixed_data(), random_datum(rng, 12)),
        "plain": item("plain", random_datum(rng, 30), random_datum(rng, 7)),
    }

    def run(*names: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        driver = Driver(vision_folder)
        for name in names:
            driver.create(name, rank=len(name))
            driver.randomize(name, seed=len(name))
        outputs = driver.train(*(items[name] for name in names))
        logprobs = [np.concatenate([x.to_numpy() for x in output.logprobs]) for output in outputs]
        return {name: (lps, driver.grads(name)) for name, lps in zip(names, logprobs, strict=True)}

    together = run("pictures", "plain")
    for name in items:
        logprobs, grads = run(name)[name]
        assert np.abs(together[name][0] - logprobs).max() <= 1e-5
        assert relative(torch.from_numpy(together[name][1]), torch.from_numpy(grads)) <= 1e-5


def test_text_alone_may_name_the_placeholder_and_equals_transformers(vision_folder: Path) -> None:
    driver, plain, rng = Driver(vision_folder), plain_vision_model(vision_folder), np.random.default_rng(4)
    driver.create("m")
    tokens = [*rng.integers(0, VOCAB, 9).tolist(), IMAGE_TOKEN, 3, 4]
    inputs = {"target_tokens": rng.integers(0, VOCAB, 12), "weights": np.ones(12, np.float32)}
    datum = Datum(ModelInput.from_ints(tokens), inputs)
    (output,) = driver.train(item("m", datum, forward_only=True))
    with torch.no_grad():
        expected = reference_target_logprobs(plain, vision_folder, datum).numpy()
    assert np.abs(output.logprobs[0].to_numpy() - expected).max() <= 1e-4


def test_a_picture_cut_short_fails_its_own_request_only(vision_folder: Path) -> None:
    rng, whole = np.random.default_rng(5), picture(1, 40, 24)
    broken = ImageChunk(data=whole.data[:-200], format="png")
    bad = cross_entropy_datum(rng, text(rng, 3), broken, length=18)
    good = cross_entropy_datum(rng, text(rng, 3), whole, length=18)
    driver = Driver(vision_folder)
    for name in ("guilty", "other"):
        driver.create(name)
    failed, fine = driver.all([item("guilty", good, bad), item("other", good)])
    assert isinstance(failed, InvalidInput)
    assert failed.message.startswith("data[1].model_input.chunks[1].data cannot be decoded as a png file")
    assert not driver.grads("guilty").any()
    assert len(fine.logprobs[0].to_numpy()) == 18


def test_pictures_of_grey_palette_and_transparent_pixels_are_read_as_rgb(vision_folder: Path) -> None:
    driver, plain, rng = Driver(vision_folder), plain_vision_model(vision_folder), np.random.default_rng(6)
    driver.create("m")
    data = []
    for mode in ("L", "P", "RGBA", "1"):
        pixels = Image.fromarray(rng.integers(0, 256, (16, 24, 3), dtype=np.uint8)).convert(mode)
        buffer = io.BytesIO()
        pixels.save(buffer, format="png")
        image = ImageChunk(data=buffer.getvalue(), format="png")
        data.append(cross_entropy_datum(rng, text(rng, 2), image, length=8))
    (output,) = driver.train(item("m", *data, forward_only=True))
    for datum, result in zip(data, output.logprobs, strict=True):
        with torch.no_grad():
            expected = reference_target_logprobs(plain, vision_folder, datum).numpy()
        assert np.abs(result.to_numpy() - expected).max() <= 1e-4


def test_a_model_that_reads_text_only_refuses_a_picture(driver: Driver) -> None:
    rng = np.random.default_rng(7)
    driver.create("m")
    assert driver.engine.card.images is None
    with pytest.raises(Unsupported, match=r"data\[0\].model_input.chunks\[1\] is of type 'image'"):
        driver.train(item("m", cross_entropy_datum(rng, text(rng, 3), picture(1, 16, 16), length=7)))


def test_a_vision_model_without_the_settings_of_its_processor_is_refused(vision_folder: Path, tmp_path: Path) -> None:
    for file in vision_folder.iterdir():
        if file.name != "preprocessor_config.json":
            (tmp_path / file.name).symlink_to(file)
    with pytest.raises(InvalidInput, match=r"preprocessor_config\.json"):
        Driver(tmp_path)
