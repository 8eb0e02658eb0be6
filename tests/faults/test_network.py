"""A bad network between client and server: every operation is applied once, whatever was lost on the way."""

from __future__ import annotations

import json
import sys
from collections import deque
from pathlib import Path
from typing import Any

import pytest

import tinsmith as tinker
from tests.faults.conftest import at_length
from tests.faults.fake_server import fake_server
from tests.faults.killing import Ended, daemon, run_script
from tests.faults.proxy import Network, bad_network
from tinsmith import types
from tinsmith.client import Timing

HASTY = Timing(
    retry_initial=0.01, retry_max=0.05, poll_retry_initial=0.01, poll_retry_max=0.05, close_timeout=2.0
)  # a second lost here is only a second lost


def datum(step: int) -> types.Datum:
    tokens = [(7 * step + 3 * i) % 200 + 1 for i in range(8)]
    inputs = {"target_tokens": tokens[1:], "weights": [1.0] * 7}
    return types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)


def train(url: str, steps: int, ahead: int = 10) -> list[float]:
    """The losses. Some steps are always under way; what they come to is saved."""
    with tinker.ServiceClient(base_url=url, timing=HASTY) as service:
        training = service.create_lora_training_client("tinsmith/fake", rank=4, seed=3).result(60)
        losses: list[float] = []
        waiting: deque[tuple[Any, Any]] = deque()
        for step in range(steps):
            backward = training.forward_backward([datum(step)], "cross_entropy")
            waiting.append((backward, training.optim_step(types.AdamParams(learning_rate=1e-3))))
            while len(waiting) > (ahead if step < steps - 1 else 0):
                backward, stepped = waiting.popleft()
                losses.append(backward.result(60).metrics["loss:sum"])
                stepped.result(60)
        training.save_state("end").result(60)
        return losses


def saved(data_dir: Path) -> tuple[int, str]:
    """Steps and digest of the one checkpoint there is."""
    (path,) = data_dir.glob("checkpoints/*/weights/end/v1/checkpoint.json")
    record = json.loads(path.read_text())
    return record["step"], record["digest"]


def applied_once(folder: Path, network: Network, steps: int) -> None:
    with fake_server(folder / "undisturbed") as server:
        expected = train(server.url, steps)
    with fake_server(folder / "disturbed", snapshot_requests=50) as server, bad_network(server.url, network) as url:
        losses = train(url, steps)
    seed = f"seed {network.seed}"
    assert server.trained == [datum(step).model_input.to_ints()[0] for step in range(steps)], seed
    assert server.num_stepped == steps, seed
    assert losses == expected, seed
    assert saved(folder / "disturbed") == saved(folder / "undisturbed"), seed
    assert saved(folder / "disturbed")[0] == steps, seed


@pytest.mark.timeout(120)
def test_operations_over_a_bad_network_are_applied_once(tmp_path: Path) -> None:
    network = Network(seed=20261122, rate=0.15)
    applied_once(tmp_path, network, steps=50)
    assert min(network.done[kind] for kind in network.kinds) >= 3


@at_length
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_thousand_operations_whose_replies_are_lost_are_applied_once(tmp_path: Path, seed: int) -> None:
    network = Network(seed=seed, rate=0.3, kinds=("drop reply",))
    applied_once(tmp_path, network, steps=500)
    assert network.done["drop reply"] > 300


@at_length
@pytest.mark.timeout(900)
@pytest.mark.parametrize("sdk", ["tinsmith", "tinker"])
def test_a_run_over_a_bad_network_ends_in_the_same_bits(
    sdk: str, undisturbed: dict[int, Ended], tmp_path: Path, tinker_python: str
) -> None:
    python = sys.executable if sdk == "tinsmith" else tinker_python
    network = Network(seed=7, rate=0.1)
    with daemon(tmp_path) as server, bad_network(server.url, network) as url:
        assert run_script(server, python, sdk, 20, url=url) == undisturbed[20]
    assert network.done["drop reply"] > 0
