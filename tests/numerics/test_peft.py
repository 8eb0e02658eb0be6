"""Gradients, optimizer steps and saved adapters against PEFT and torch."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel

from tests.numerics.driver import Driver, item, plain_model, random_datum
from tinsmith.types import Datum
from tinsmith.types.operations import SaveAdapter

FLAGS = [
    {},
    {"train_mlp": False},
    {"train_attn": False},
    {"train_unembed": False},
    {"train_attn": False, "train_mlp": False},
]


@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: ",".join(flags) or "all")
def test_gradients_and_one_adamw_step_equal_peft_and_torch(
    any_folder: Path, tmp_path: Path, flags: dict[str, bool]
) -> None:
    rng = np.random.default_rng(0)
    data = [random_datum(rng, int(n)) for n in [3, 17, 17, 40, 1]]
    driver = Driver(any_folder)
    driver.create("m", rank=5, **flags)
    driver.randomize("m")
    driver(SaveAdapter(model_id="m", folder=str(tmp_path / "before"), optimizer=False))
    reference = load_peft(any_folder, tmp_path / "before")

    (output,) = driver.train(item("m", *data))
    loss = reference_loss(reference, data)
    loss.backward()
    assert output.loss_sum == pytest.approx(loss.item(), rel=1e-5)

    ours = dict(driver.engine._adapters["m"].layout.named_views(torch.from_numpy(driver.grads("m"))))
    theirs = trainable(reference)
    assert {key_of(name) for name in theirs} == set(ours)
    for name, parameter in theirs.items():
        assert parameter.grad is not None
        assert relative(ours[key_of(name)], parameter.grad) <= 1e-4, name

    params = {"learning_rate": 0.01, "beta1": 0.8, "beta2": 0.9, "eps": 1e-8, "weight_decay": 0.1}
    optimizer = torch.optim.AdamW(theirs.values(), lr=0.01, betas=(0.8, 0.9), eps=1e-8, weight_decay=0.1)
    for clip in (0.0, 0.5):
        norm = torch.nn.utils.clip_grad_norm_(theirs.values(), clip or float("inf"))
        optimizer.step()
        metrics = driver.step("m", grad_clip_norm=clip, **params)
        assert metrics["grad_norm:mean"] == pytest.approx(norm.item(), rel=1e-4)
        after = dict(driver.engine._adapters["m"].layout.named_views(torch.from_numpy(driver.weights("m"))))
        for name, parameter in theirs.items():
            assert relative(after[key_of(name)], parameter) <= 1e-4, name
        optimizer.zero_grad()
        reference_loss(reference, data).backward()
        driver.train(item("m", *data))


def test_a_saved_adapter_gives_the_same_logits_in_peft(any_folder: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    driver = Driver(any_folder)
    driver.create("m", rank=3)
    data = [random_datum(rng, 30) for _ in range(3)]
    for _ in range(3):
        driver.train(item("m", *data))
        driver.step("m", learning_rate=0.02)
    driver(SaveAdapter(model_id="m", folder=str(tmp_path / "saved"), optimizer=True))
    reference = load_peft(any_folder, tmp_path / "saved")
    (output,) = driver.train(item("m", *data, forward_only=True))
    for datum, logprobs in zip(data, output.logprobs, strict=True):
        with torch.no_grad():
            logits = reference(torch.tensor(datum.model_input.to_ints())[None]).logits[0]
        targets = torch.from_numpy(datum.loss_fn_inputs["target_tokens"].to_numpy())
        expected = torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0].numpy()
        assert np.abs(logprobs.to_numpy() - expected).max() <= 1e-4
    base = plain_model(any_folder)(torch.tensor(data[0].model_input.to_ints())[None]).logits[0]
    tuned = reference(torch.tensor(data[0].model_input.to_ints())[None]).logits[0]
    assert (base - tuned).abs().max().item() > 0.1


def test_flags_choose_the_modules_that_have_an_adapter(driver: Driver) -> None:
    names = {}
    for index, flags in enumerate(FLAGS):
        driver.create(f"m{index}", **flags)
        layout = driver.engine._adapters[f"m{index}"].layout
        names[index] = {site.name for site in layout.sites if layout.trains(site)}
    assert len(names[0]) == 2 * 7 + 1
    assert not any(".mlp." in name for name in names[1])
    assert not any(".self_attn." in name for name in names[2])
    assert "lm_head" not in names[3]
    assert names[4] == {"lm_head"}


def load_peft(folder: Path, adapter: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns about adapters on a tied unembedding
        return PeftModel.from_pretrained(plain_model(folder), adapter, is_trainable=True).eval()


def trainable(model: Any) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def key_of(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".default", "").removesuffix(".weight")


def reference_loss(model: Any, data: list[Datum]) -> torch.Tensor:
    total = torch.zeros(())
    for datum in data:
        logits = model(torch.tensor(datum.model_input.to_ints())[None]).logits[0]
        targets = torch.from_numpy(datum.loss_fn_inputs["target_tokens"].to_numpy())
        logprobs = torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]
        total = total - (logprobs * torch.from_numpy(datum.loss_fn_inputs["weights"].to_numpy())).sum()
    return total


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm().clamp_min(1e-12)).item()
