"""The official SDK sends pictures to a server with a tiny vision model."""

from __future__ import annotations

import base64
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.numerics.vision import (
    picture,
    plain_vision_model,
    reference_inputs,
    reference_target_logprobs,
    save_vision_model,
)
from tests.protocol.conftest import Server, running_server
from tinsmith.types import Datum, EncodedTextChunk, ModelInput

PROGRAM = """
import base64, json, sys
import tinker
from tinker import types
given = json.loads(sys.argv[1])
image = lambda **more: types.ImageChunk(data=base64.b64decode(given["picture"]), format="png", **more)
text = lambda tokens: types.EncodedTextChunk(tokens=tokens)

def datum(*chunks):
    inputs = {"target_tokens": given["targets"], "weights": [1.0] * len(given["targets"])}
    return types.Datum(model_input=types.ModelInput(chunks=list(chunks)), loss_fn_inputs=inputs)

def error_of(call):
    try:
        return call().result().dict()
    except Exception as error:
        return str(error)

client = tinker.ServiceClient().create_lora_training_client(base_model="acme/eyes", rank=4)
good = datum(text(given["before"]), image(), text(given["after"]))
forward = client.forward([good], "cross_entropy").result()
losses = []
for _ in range(3):
    trained = client.forward_backward([good], "cross_entropy")
    stepped = client.optim_step(types.AdamParams(learning_rate=0.01))
    losses.append(trained.result().metrics["loss:sum"])
    stepped.result()
wrong = datum(text(given["before"]), image(expected_tokens=99), text(given["after"]))
sampler = tinker.ServiceClient().create_sampling_client(base_model="acme/eyes")
greedy = types.SamplingParams(max_tokens=8, temperature=0.0, stop=[])

def sample(*chunks, **more):
    return sampler.sample(types.ModelInput(chunks=list(chunks)), num_samples=1, sampling_params=greedy, **more)

seen = sample(text(given["before"]), image(expected_tokens=15), text(given["after"]), include_prompt_logprobs=True)
print(json.dumps({
    "drawn": seen.result().sequences[0].tokens,
    "prompt_logprobs": seen.result().prompt_logprobs,
    "wrong_prompt": error_of(lambda: sample(text(given["before"]), image(expected_tokens=99))),
    "logprobs": forward.loss_fn_outputs[0]["logprobs"].data,
    "losses": losses,
    "wrong": error_of(lambda: client.forward([wrong], "cross_entropy")),
}))
"""


@pytest.fixture(scope="module")
def vision_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vision_model(tmp_path_factory.mktemp("eyes"))


@pytest.fixture(scope="module")
def vision_server(tmp_path_factory: pytest.TempPathFactory, vision_folder: Path) -> Iterator[Server]:
    options = ["--dtype", "float32", "--base-model", f"acme/eyes={vision_folder}"]
    with running_server(tmp_path_factory.mktemp("vision_server"), *options) as running:
        yield running


def test_pictures_train_through_the_official_sdk(
    vision_server: Server, vision_folder: Path, tinker_python: Path
) -> None:
    image, rng = picture(1, 40, 24), np.random.default_rng(0)
    before, after = rng.integers(0, 140, 4).tolist(), rng.integers(0, 140, 6).tolist()
    targets = rng.integers(0, 140, 4 + 15 + 6)
    told = _run(
        vision_server,
        tinker_python,
        {
            "picture": base64.b64encode(image.data).decode(),
            "before": before,
            "after": after,
            "targets": targets.tolist(),
        },
    )
    chunks = [EncodedTextChunk(tokens=before), image, EncodedTextChunk(tokens=after)]
    datum = Datum(ModelInput(chunks=chunks), {"target_tokens": targets})
    with torch.no_grad():
        expected = reference_target_logprobs(plain_vision_model(vision_folder), vision_folder, datum).numpy()
    assert np.abs(np.asarray(told["logprobs"]) - expected).max() <= 1e-4
    assert told["losses"][0] > told["losses"][1] > told["losses"][2]
    assert "data[0].model_input.chunks[1].expected_tokens is 99" in told["wrong"]
    assert "as 15 tokens (3 x 5)" in told["wrong"]
    assert "prompt.chunks[1].expected_tokens is 99" in told["wrong_prompt"]

    inputs = reference_inputs(vision_folder, datum.model_input)
    everything = torch.ones_like(inputs["input_ids"])
    whole = plain_vision_model(vision_folder).generate(
        **inputs, attention_mask=everything, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=159
    )
    assert told["drawn"] == whole[0, 25:].tolist()
    is_none = [value is None for value in told["prompt_logprobs"]]
    assert is_none == [True] + [False] * 3 + [True] * 15 + [False] * 6


def _run(server: Server, python: Path, given: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(
        [str(python), "-c", PROGRAM, json.dumps(given)],
        capture_output=True,
        text=True,
        timeout=100,
        env=server.environment,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr + server.log.read_text()[-3000:]
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told
