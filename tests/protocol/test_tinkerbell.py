"""The Tinkerbell dialect against `tinsmith serve`: its scripts, beside the official SDK and ours."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest

from tests.protocol.conftest import Server, running_server

SCRIPTS = Path(__file__).with_name("tinkerbell")
ORIGINALS = os.environ.get("TINKERBELL_EXAMPLES")
"""A folder with the examples of the Tinkerbell guide, which expect a server on port 8000."""
STEPS = 8
CHAT = [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Blue, like the sea."}]


def run(script: Path | str, *arguments: str, **options: Any) -> str:
    done = subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, timeout=120, check=False, **options
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def floats(line: str) -> list[float]:
    return [float(word) for word in line.split()]


@pytest.fixture
def http(server: Server, request: pytest.FixtureRequest) -> Iterator[httpx2.Client]:
    """With a key of its own, and so with adapters of its own."""
    with httpx2.Client(base_url=server.url, timeout=120, headers={"x-api-key": request.node.name}) as client:
        yield client


def ok(http: httpx2.Client, path: str, /, **body: Any) -> Any:
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def fetch(http: httpx2.Client, receipt: dict[str, Any]) -> Any:
    for _ in range(600):
        answer = http.post("/retrieve_future", json={"request_id": receipt["request_id"]})
        if answer.status_code != 202:
            assert answer.status_code == 200, answer.text
            return answer.json()
        time.sleep(0.05)
    raise AssertionError(f"no result of {receipt}")


# ---- TB-15: the scripts of the guide ----


def test_TB_15_a_blocking_script_trains(server: Server) -> None:
    losses = floats(run(SCRIPTS / "blocking_loop.py", server.url))
    assert len(losses) == 5
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.7 * losses[0]


def test_TB_15_five_gradients_then_five_steps(server: Server) -> None:
    """The first step takes all five; the others find nothing and succeed."""
    losses = floats(run(SCRIPTS / "five_at_once.py", server.url))
    assert len(losses) == 5
    assert max(losses) - min(losses) < 1e-5, "all five were computed before the first step"


def test_TB_15_three_users_train_at_once(server: Server) -> None:
    """TB-10: each one's losses are those of its own chat, and fall."""
    for line in run(SCRIPTS / "three_users.py", server.url).splitlines():
        losses = floats(line)
        assert losses == sorted(losses, reverse=True)
        assert losses[-1] < losses[0] - 0.5


def test_TB_15_the_curl_test_of_a_model_nobody_made(http: httpx2.Client) -> None:
    body = {"model_id": "test", "data": [[{"role": "user", "content": "test"}]], "loss_fn": "cross_entropy"}
    receipt = ok(http, "/api/v1/forward_backward_async", **body)
    assert receipt["model_id"] == "test"
    assert fetch(http, receipt)["loss"] > 0


if ORIGINALS is not None:

    def test_TB_15_the_originals_run_verbatim_on_port_8000(tmp_path: Path) -> None:
        scripts = sorted(Path(ORIGINALS).glob("*.py"))
        assert len(scripts) == 3
        with running_server(tmp_path, "--dtype", "float32", "--port", "8000"), ThreadPoolExecutor(4) as pool:
            said = list(pool.map(run, scripts))
            for path in Path(ORIGINALS).glob("*.sh"):
                curl = shutil.which("bash")
                assert curl is not None
                told = subprocess.run([curl, str(path)], capture_output=True, text=True, timeout=60, check=False).stdout
                assert '"request_id":"future_' in told
        assert ["Done!" in text or "All users trained!" in text for text in said] == [True] * 3


# ---- three kinds of client, one process ----


@contextmanager
def loop(python: str | Path, script: str, *arguments: str, server: Server) -> Iterator[subprocess.Popen[str]]:
    """A loop that is ready and waits for its line."""
    process = subprocess.Popen(
        [str(python), str(SCRIPTS / script), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=server.environment,
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == "ready":
                break
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def report(process: subprocess.Popen[str]) -> Any:
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return json.loads(next(line for line in out.splitlines() if line.startswith('{"losses"')))


def test_TB_10_scripts_the_official_sdk_and_ours_train_in_one_process_and_none_moves_another(
    server: Server, tinker_python: Path
) -> None:
    """Each learns, all at the same time, and exactly what it learns alone."""
    kinds = {
        "tinkerbell": (sys.executable, "seeded_loop.py", server.url, "11", str(STEPS)),
        "official": (tinker_python, "sdk_loop.py", "tinker", "12", str(STEPS)),
        "ours": (sys.executable, "sdk_loop.py", "tinsmith", "13", str(STEPS)),
    }
    with ExitStack() as running, ThreadPoolExecutor(3) as pool:
        processes = {name: running.enter_context(loop(*kind, server=server)) for name, kind in kinds.items()}
        examples = [
            pool.submit(run, SCRIPTS / name, server.url)
            for name in ("blocking_loop.py", "five_at_once.py", "three_users.py")
        ]
        for process in processes.values():
            go(process)
        together = {name: report(process) for name, process in processes.items()}
        for example in examples:
            assert floats(example.result())
    assert max(told["began"] for told in together.values()) < min(told["ended"] for told in together.values())
    for name, kind in kinds.items():
        with loop(*kind, server=server) as process:
            go(process)
            alone = report(process)["losses"]
        shared = together[name]["losses"]
        assert len(alone) == len(shared) == STEPS
        assert shared == sorted(shared, reverse=True), name
        assert shared[-1] < 0.8 * shared[0], name
        np.testing.assert_allclose(shared, alone, atol=1e-5, rtol=0, err_msg=name)


# ---- numbers ----


def test_TB_06_a_fresh_adapter_is_the_base_model(http: httpx2.Client) -> None:
    """Row 5."""
    fresh = ok(http, "/api/v1/add_lora", rank=4, alpha=8)["model_id"]
    losses = [ok(http, "/api/v1/forward", model_id=name, data=[CHAT])["loss"] for name in (fresh, "fresh as well")]
    prompt = {"prompts": ["The sea is"], "sampling_params": {"max_tokens": 12, "temperature": 0.0}}
    assert abs(losses[0] - losses[1]) < 1e-5
    own, base = (ok(http, "/api/v1/sample", model_id=name, **prompt) for name in (fresh, "base"))
    assert own["completions"] == base["completions"]
    np.testing.assert_allclose(own["sequences"][0]["logprobs"], base["sequences"][0]["logprobs"], atol=1e-4)


def test_TB_04_the_loss_is_the_mean_of_the_logprobs_that_were_trained(http: httpx2.Client) -> None:
    """Row 4: 21 tokens or so, of which those of the answer count."""
    model = ok(http, "/api/v1/add_lora", seed=1)["model_id"]
    result = ok(http, "/api/v1/forward_backward", model_id=model, data=[CHAT], loss_fn="cross_entropy")
    trained = int(result["weight_sum"])
    assert 0 < trained < result["num_tokens"] == len(result["logprobs"][0])
    answer_then_newline = result["logprobs"][0][-trained - 1 : -1]
    assert result["loss"] == pytest.approx(-sum(answer_then_newline) / trained, abs=1e-5)
    assert result["loss"] == pytest.approx(result["loss_sum"] / result["weight_sum"])


def test_TB_09_the_rate_that_is_given_is_the_rate_that_is_used(http: httpx2.Client) -> None:
    drops = []
    for rate in (0.0, 1e-5, 1e-3):
        model = ok(http, "/api/v1/add_lora", seed=5)["model_id"]
        before = ok(http, "/api/v1/forward_backward", model_id=model, data=[CHAT])["loss"]
        ok(http, "/api/v1/optim_step", model_id=model, adam_params={"learning_rate": rate})
        drops.append(before - ok(http, "/api/v1/forward", model_id=model, data=[CHAT])["loss"])
        ok(http, "/api/v1/remove_lora", model_id=model)
    assert abs(drops[0]) < 1e-6
    assert 0 < 50 * drops[1] < drops[2]


def test_TB_01_forward_leaves_no_gradients_behind(http: httpx2.Client) -> None:
    """Row 23."""
    model = ok(http, "/api/v1/add_lora")["model_id"]
    before = ok(http, "/api/v1/forward", model_id=model, data=[CHAT])["loss"]
    step = ok(http, "/api/v1/optim_step", model_id=model, adam_params={"learning_rate": 0.01})
    assert step["metrics"]["step_applied"] == 0.0
    assert ok(http, "/api/v1/forward", model_id=model, data=[CHAT])["loss"] == pytest.approx(before, abs=1e-6)
    ok(http, "/api/v1/remove_lora", model_id=model)


def test_TB_17_saved_weights_and_optimizer_come_back(http: httpx2.Client) -> None:
    model = ok(http, "/api/v1/add_lora", seed=2)["model_id"]

    def step() -> float:
        loss = ok(http, "/api/v1/forward_backward", model_id=model, data=[CHAT])["loss"]
        ok(http, "/api/v1/optim_step", model_id=model, adam_params={"learning_rate": 1e-3})
        return loss

    step()
    step()
    saved = fetch(http, ok(http, "/api/v1/save_weights_async", model_id=model, path="two-steps"))
    expected = [step(), step()]
    assert (
        fetch(http, ok(http, "/api/v1/load_weights_async", model_id=model, path="two-steps"))["path"] == saved["path"]
    )
    np.testing.assert_allclose([step(), step()], expected, atol=1e-6)
    ok(http, "/api/v1/remove_lora", model_id=model)


def test_TB_19_training_moves_what_is_sampled(http: httpx2.Client) -> None:
    model = ok(http, "/api/v1/add_lora", seed=4)["model_id"]
    prompt = {
        "prompts": ["<|im_start|>user\nName a colour.<|im_end|>\n<|im_start|>assistant\n"],
        "sampling_params": {"max_tokens": 16, "temperature": 0.0},
    }
    before = ok(http, "/api/v1/sample", model_id=model, **prompt)["completions"]
    for _ in range(40):
        ok(http, "/fwdbwd", model_id=model, data=[CHAT])
        receipt = ok(http, "/optim_step", model_id=model, adam_params={"learning_rate": 3e-3})
    fetch(http, receipt)
    after = ok(http, "/api/v1/sample", model_id=model, **prompt)
    assert after["completions"] == ["Blue, like the sea."] != before
    assert after["sequences"][0]["stop_reason"] == "stop"
    ok(http, "/api/v1/remove_lora", model_id=model)


# ---- TB-20: rewards ----

OTHER = [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Red."}]


def completion_logprobs(http: httpx2.Client, model: str) -> list[float]:
    """Of the answers of CHAT and OTHER, summed over their tokens."""
    rows = [ok(http, "/api/v1/forward", model_id=model, data=[chat]) for chat in (CHAT, OTHER)]
    return [-row["loss_sum"] for row in rows]


def test_TB_20_rewards_pull_completions_up_and_push_them_down(http: httpx2.Client) -> None:
    model = ok(http, "/api/v1/add_lora", seed=6)["model_id"]
    before = completion_logprobs(http, model)
    given = {"rewards": [1.0, -0.5]}
    result = ok(
        http,
        "/api/v1/forward_backward",
        model_id=model,
        data=[CHAT, OTHER],
        loss_fn="importance_sampling",
        loss_fn_inputs=given,
    )
    forward = [ok(http, "/api/v1/forward", model_id=model, data=[chat])["weight_sum"] for chat in (CHAT, OTHER)]
    expected = -(1.0 * forward[0] - 0.5 * forward[1]) / sum(forward)
    assert result["loss"] == result["base_loss"] == pytest.approx(expected, abs=1e-6)
    assert result["kl_penalty"] == 0.0
    assert result["num_samples"] == 2
    ok(http, "/api/v1/optim_step", model_id=model, adam_params={"learning_rate": 1e-4})
    after = completion_logprobs(http, model)
    assert after[0] > before[0]
    assert after[1] < before[1]
    ok(http, "/api/v1/remove_lora", model_id=model)


def test_TB_20_the_kl_penalty_is_computed_from_the_base_model_and_pulls_back(http: httpx2.Client) -> None:
    model, base = ok(http, "/api/v1/add_lora", seed=7)["model_id"], "never trained"
    rewarded = {
        "model_id": model,
        "data": [CHAT],
        "loss_fn": "importance_sampling",
        "loss_fn_inputs": {
            "rewards": [0.0],
            "prompts": [CHAT[0]["content"]],
            "completions": [CHAT[1]["content"]],
            "kl_coeff": 0.1,
        },
    }
    fresh = ok(http, "/api/v1/forward", **rewarded)
    assert fresh["kl_penalty"] == pytest.approx(0.0, abs=1e-6)
    for _ in range(5):
        ok(http, "/api/v1/forward_backward", model_id=model, data=[CHAT])
        ok(http, "/api/v1/optim_step", model_id=model, adam_params={"learning_rate": 1e-3})
    moved = ok(http, "/api/v1/forward_backward", **rewarded)
    own, theirs = (
        np.asarray(ok(http, "/api/v1/forward", model_id=name, data=[CHAT])["logprobs"][0]) for name in (model, base)
    )
    trained = int(moved["weight_sum"])
    d = (theirs - own)[-trained - 1 : -1]
    expected = float(np.mean(np.expm1(d) - d))
    assert moved["metrics"]["kl_div"] == pytest.approx(expected, abs=1e-4)
    assert moved["kl_penalty"] == pytest.approx(0.1 * expected, abs=1e-5)
    assert moved["loss"] == pytest.approx(moved["base_loss"] + moved["kl_penalty"], abs=1e-6)
    fetch(http, ok(http, "/save_weights", model_id=model, path="moved"))
    fetch(http, ok(http, "/load_weights", model_id=model, path="moved", optimizer=False))
    for _ in range(3):  # without the momentum of the steps before
        again = ok(http, "/api/v1/forward_backward", **rewarded)
        ok(http, "/api/v1/optim_step", model_id=model, adam_params={"learning_rate": 1e-4})
    assert again["kl_penalty"] < 0.98 * moved["kl_penalty"]
    ok(http, "/api/v1/remove_lora", model_id=model)


def test_TB_20_drawn_logprobs_make_the_ratio(http: httpx2.Client) -> None:
    model = ok(http, "/api/v1/add_lora", seed=8)["model_id"]
    plain = ok(http, "/api/v1/forward", model_id=model, data=[CHAT])
    trained = int(plain["weight_sum"])
    own = plain["logprobs"][0][-trained - 1 : -1]
    result = ok(
        http,
        "/api/v1/forward",
        model_id=model,
        data=[CHAT],
        loss_fn="importance_sampling",
        loss_fn_inputs={"rewards": [2.0], "logprobs": [[value - 0.25 for value in own]]},
    )
    assert result["loss"] == pytest.approx(-2.0 * np.exp(0.25), rel=1e-5)
    ok(http, "/api/v1/remove_lora", model_id=model)
