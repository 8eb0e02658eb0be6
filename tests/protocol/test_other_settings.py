"""The official SDK against a server with other settings: one poll for all samples, short waits, a model under an
alias."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.protocol.conftest import ROOT, Server, running_server

TINY = ROOT / "src" / "tinsmith" / "models" / "tiny"

PREAMBLE = """
import pickle, sys, time
import tinker
from tinker import types
MODEL = "my-own-model"
service = tinker.ServiceClient()
def datum(tokens):
    return types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]),
                       loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)})
prompt = types.ModelInput.from_ints([20, 21, 22])
"""


@pytest.fixture(scope="module")
def other_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server_settings = {"sample_poller": True, "poll_hold_s": 2.0}
    control_settings = {"seq_gap_timeout_s": 1.0, "max_pending_samples": 8}
    command = [sys.executable, str(Path(__file__).with_name("serve_with_settings.py"))]
    arguments = [json.dumps(server_settings), json.dumps(control_settings), f"my-own-model={TINY}"]
    with running_server(tmp_path_factory.mktemp("other"), command=command + arguments) as running:
        yield running


Sdk = Callable[[str], str]


@pytest.fixture
def sdk(other_server: Server, tinker_python: Path) -> Sdk:
    """Run a program with the official SDK; its stdout."""

    def run(program: str) -> str:
        done = subprocess.run(
            [str(tinker_python), "-c", PREAMBLE + program],
            capture_output=True,
            text=True,
            timeout=100,
            env=other_server.environment,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_t16_a_number_that_the_sdk_never_sent_is_not_waited_for_for_ever(sdk: Sdk) -> None:
    sdk("""
trainer = service.create_lora_training_client(MODEL, rank=2).result()
pointer = types.ImageAssetPointerChunk(format="png", location="x", expected_tokens=3)
burnt = types.Datum(model_input=types.ModelInput(chunks=[pointer]), loss_fn_inputs={"target_tokens": [1, 2, 3]})
try:
    trainer.forward_backward([burnt], "cross_entropy").result()
except Exception as error:
    print("refused locally:", error)
started = time.monotonic()
try:
    trainer.forward_backward([datum([5, 6, 7])], "cross_entropy").result(timeout=30)
except tinker.RequestFailedError as error:
    assert "seq 1" in str(error), error
assert time.monotonic() - started < 20
assert trainer.forward_backward([datum([5, 6, 7])], "cross_entropy").result(timeout=30).metrics["loss:sum"] > 0
""")


def test_r12_a_model_under_an_alias_has_a_tokenizer_that_loads(sdk: Sdk) -> None:
    sdk("""
trainer = service.create_lora_training_client(MODEL, rank=2).result()
info = trainer.get_info()
assert info.model_data.model_name == MODEL
tokenizer = trainer.get_tokenizer()
assert tokenizer.decode(tokenizer.encode("a kettle", add_special_tokens=False)) == "a kettle"
sampler = trainer.save_weights_and_get_sampling_client().result()
assert sampler.get_base_model() == MODEL
""")


def test_t20_one_poll_serves_all_samples_of_a_client(sdk: Sdk) -> None:
    sdk("""
sampler = service.create_sampling_client(base_model=MODEL).result()
polls = []
resource = tinker.resources.futures.AsyncFuturesResource
original = resource.retrieve_multi
async def counted(self, **options):
    polls.append(options)
    return await original(self, **options)
resource.retrieve_multi = counted
futures = [sampler.sample(prompt, 2, types.SamplingParams(max_tokens=3 + i % 9, seed=i)) for i in range(60)]
for i, future in enumerate(futures):
    assert len(future.result(timeout=60).sequences) == 2
assert polls
try:
    sampler.sample(prompt, 1, types.SamplingParams(max_tokens=10**6)).result(timeout=30)
except tinker.RequestFailedError as error:
    assert "max_tokens" in str(error)
else:
    raise AssertionError("no error")
clone = pickle.loads(pickle.dumps(sampler))
assert clone.sample(prompt, 1, types.SamplingParams(max_tokens=4)).result(timeout=30).sequences
assert clone.compute_logprobs(prompt).result(timeout=30)[0] is None
rebuilt = tinker.SamplingClient.from_sampler_handle(sampler.get_sampler_handle(), api_key="tml-local")
assert rebuilt.sample(prompt, 1, types.SamplingParams(max_tokens=4)).result(timeout=30).sequences
service.close("success").result()
""")


def test_more_samples_than_the_server_takes_all_come_back(sdk: Sdk) -> None:
    sdk("""
sampler = service.create_sampling_client(base_model=MODEL).result()
futures = [sampler.sample(prompt, 1, types.SamplingParams(max_tokens=20, seed=i, stop=[])) for i in range(24)]
assert all(len(future.result(timeout=60).sequences[0].tokens) == 20 for future in futures)
service.close("success").result()
""")
