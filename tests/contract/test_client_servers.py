"""One suite for every way a client reaches a server: embedded in this process, and over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import tinsmith as tinker
from tinsmith import types


def _embedded(folder: Path) -> Iterator[str]:
    yield f"local:?data_dir={folder}&dtype=float32"


def _served(folder: Path) -> Iterator[str]:
    command = [sys.executable, "-c", "import tinsmith.cli as c; c.main()", "serve", "--port", "0", "--dtype", "float32"]
    with subprocess.Popen([*command, "--data-dir", str(folder)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            ready = process.stdout.readline()
            found = re.search(r"http://127\.0\.0\.1:\d+", ready)
            assert found, f"the server said {ready!r}"
            yield found.group()
        finally:
            process.terminate()


def _older(folder: Path) -> Iterator[str]:
    """A server behind something that hides `client/config`, as one does that has none and knows only JSON."""
    for url in _served(folder):
        with _HidingProxy(("127.0.0.1", 0), int(url.rpartition(":")[2])) as proxy:
            thread = threading.Thread(target=proxy.serve_forever, name="hiding proxy")
            thread.start()
            try:
                yield f"http://127.0.0.1:{proxy.server_address[1]}"
            finally:
                proxy.shutdown()
                thread.join(10)


class _HidingProxy(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, address: tuple[str, int], port: int) -> None:
        super().__init__(address, _Hide)
        self.port = port


class _Hide(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        server = self.server
        assert isinstance(server, _HidingProxy)
        with socket.create_connection(("127.0.0.1", server.port)) as upstream:
            back = threading.Thread(target=_pump, args=(upstream, self.request), daemon=True)
            back.start()
            _pump(self.request, upstream, hidden=b"/api/v1/client/config")
            back.join()


def _pump(source: socket.socket, sink: socket.socket, hidden: bytes = b"") -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            assert b"x-protobuf" not in data
            sink.sendall(data.replace(hidden, b"/api/v1/client/hidden") if hidden else data)
        sink.shutdown(socket.SHUT_WR)


@pytest.fixture(scope="module", params=[_embedded, _served, _older], ids=["embedded", "served", "older"])
def address(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    yield from request.param(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def service(address: str) -> Iterator[tinker.ServiceClient]:
    with tinker.ServiceClient(base_url=address) as client:
        yield client


@pytest.fixture
def training(service: tinker.ServiceClient) -> tinker.TrainingClient:
    return service.create_lora_training_client("tinsmith/tiny", rank=8, seed=7).result(60)


def example(client: tinker.TrainingClient, text: str = "The tinsmith mends a kettle.") -> types.Datum:
    tokens = client.get_tokenizer().encode(text)
    return types.Datum(
        types.ModelInput.from_ints(tokens[:-1]),
        {"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)},
    )


def train(client: tinker.TrainingClient, steps: int) -> list[float]:
    """Everything is submitted before the first result is read."""
    data = [example(client)]
    passes = []
    for _ in range(steps):
        passes.append(client.forward_backward(data, "cross_entropy"))
        client.optim_step(types.AdamParams(learning_rate=5e-3))
    return [one.result(60).loss for one in passes]


def test_an_ordinary_script_trains_and_its_sampler_has_learned(training: tinker.TrainingClient) -> None:
    losses = train(training, 8)
    assert losses[-1] < losses[0] / 2
    sampler = training.save_weights_and_get_sampling_client("learned").result(60)
    prompt = types.ModelInput.from_ints(training.get_tokenizer().encode("The tinsmith"))
    params = types.SamplingParams(max_tokens=6, temperature=0.0)
    response = sampler.sample(prompt=prompt, num_samples=2, sampling_params=params).result(60)
    assert len(response.sequences) == 2
    assert response.sequences[0].tokens == response.sequences[1].tokens
    assert len(response.sequences[0].logprobs or []) == len(response.sequences[0].tokens)


def test_sampler_and_trainer_agree_on_log_probabilities(training: tinker.TrainingClient) -> None:
    train(training, 2)
    datum = example(training)
    trained = training.forward([datum], "cross_entropy").result(60).logprobs[0].to_numpy()
    sampler = training.save_weights_and_get_sampling_client().result(60)
    whole = datum.model_input.append_int(datum.loss_fn_inputs["target_tokens"].tolist()[-1])
    scored = sampler.compute_logprobs(whole).result(60)
    assert scored[0] is None
    np.testing.assert_allclose(np.array(scored[1:], dtype=np.float32), trained, atol=1e-4)


def test_training_goes_on_from_a_checkpoint_as_if_never_stopped(
    service: tinker.ServiceClient, training: tinker.TrainingClient
) -> None:
    train(training, 3)
    path = training.save_state("middle").result(60).path
    resumed = service.create_training_client_from_state_with_optimizer(path).result(60)
    assert train(resumed, 2) == pytest.approx(train(training, 2), rel=1e-5)


def test_a_custom_loss_equals_the_built_in_one(service: tinker.ServiceClient, training: tinker.TrainingClient) -> None:
    twin = service.create_lora_training_client("tinsmith/tiny", rank=8, seed=7).result(60)
    datum = example(training)
    built_in = training.forward_backward([datum], "cross_entropy").result(60).metrics["loss:sum"]
    custom = twin.forward_backward_custom([datum], lambda data, logprobs: (-logprobs[0].sum(), {"n:sum": 1.0}))
    assert custom.result(60).metrics["loss:sum"] == pytest.approx(built_in, rel=1e-5)
    step = types.AdamParams(learning_rate=1e-2)
    training.optim_step(step).result(60)
    twin.optim_step(step).result(60)
    after = [c.forward([datum], "cross_entropy").result(60).metrics["loss:sum"] for c in (training, twin)]
    assert after[0] == pytest.approx(after[1], rel=1e-4)
    assert after[0] < built_in


def test_a_script_of_coroutines_works(service: tinker.ServiceClient) -> None:
    async def script() -> list[list[int]]:
        client = await service.create_lora_training_client("tinsmith/tiny", rank=4)
        result = await client.forward_backward([example(client)] * 3, "cross_entropy")
        assert len(result.loss_fn_outputs) == 3
        await client.optim_step(types.AdamParams())
        sampler = await client.save_weights_and_get_sampling_client()
        prompt = types.ModelInput.from_ints([1, 2, 3])
        params = types.SamplingParams(max_tokens=4)
        responses = await asyncio.gather(*(sampler.sample(prompt, 1, params).coroutine() for _ in range(20)))
        return [response.sequences[0].tokens for response in responses]

    drawn = asyncio.run(script())
    assert len(drawn) == 20
    assert all(1 <= len(tokens) <= 4 for tokens in drawn)


def test_mistakes_are_failures_that_name_them_and_harm_nothing(
    service: tinker.ServiceClient, training: tinker.TrainingClient
) -> None:
    good = example(training)
    outside = types.Datum(types.ModelInput.from_ints([1, 10**6]), {"target_tokens": [1, 1], "weights": [1.0, 1.0]})
    for data, loss, message in (
        ([good], "no_such_loss", "no_such_loss"),
        ([good, outside], "cross_entropy", "1000000"),
    ):
        with pytest.raises(tinker.RequestFailedError, match=message) as failure:
            training.forward_backward(data, loss).result(60)
        assert failure.value.category == types.RequestErrorCategory.User
    with pytest.raises(tinker.TinkerError, match="no/such-model"):
        service.create_lora_training_client("no/such-model").result(60)
    with pytest.raises(tinker.TinkerError, match="nowhere"):
        service.create_sampling_client("tinker://nowhere/sampler_weights/x").result(60)
    assert len(train(training, 1)) == 1


def test_what_was_saved_is_listed_and_can_be_deleted(
    service: tinker.ServiceClient, training: tinker.TrainingClient
) -> None:
    path = training.save_weights_for_sampler("listed").result(60).path
    rest = tinker.RestClient(service.holder)
    assert rest.get_training_run(training.model_id).result(60).lora_rank == 8
    assert [c.tinker_path for c in rest.list_checkpoints(training.model_id).result(60).checkpoints] == [path]
    assert rest.get_weights_info_by_tinker_path(path).result(60).base_model == "tinsmith/tiny"
    sampler = service.create_sampling_client(path).result(60)
    assert sampler.get_base_model() == "tinsmith/tiny"
    rest.delete_checkpoint_from_tinker_path(path).result(60)
    assert rest.list_checkpoints(training.model_id).result(60).checkpoints == []


def test_two_clients_of_one_process_have_sessions_of_their_own(address: str, service: tinker.ServiceClient) -> None:
    with tinker.ServiceClient(base_url=address) as other:
        mine = service.create_lora_training_client("tinsmith/tiny", rank=4).result(60)
        theirs = other.create_lora_training_client("tinsmith/tiny", rank=4).result(60)
        assert mine.model_id.partition(":")[0] != theirs.model_id.partition(":")[0]
    assert len(train(mine, 1)) == 1
