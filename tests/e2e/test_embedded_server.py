"""Embedded mode: the server and its engine in this process, over a transport."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch

from tinsmith.embedded import open_local
from tinsmith.types import Datum, ModelInput
from tinsmith.types.errors import UserError
from tinsmith.wire.tinker_proto import CONTENT_TYPE, TrainRequest, encode_train_request

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def result(http: httpx2.AsyncClient, receipt: httpx2.Response) -> dict[str, Any]:
    for _ in range(10):
        answer = await http.post("retrieve_future", json={"request_id": receipt.json()["request_id"]})
        if answer.status_code == 200:
            found: dict[str, Any] = answer.json()
            return found
    raise AssertionError(answer.text)


async def test_a_local_server_trains_saves_and_samples(tmp_path: Path) -> None:
    transport, close = await open_local(f"local:?data_dir={tmp_path}&dtype=float32&threads=1")
    try:
        async with httpx2.AsyncClient(transport=transport, base_url="http://local/api/v1/", timeout=60) as http:
            session_id = (await http.post("create_session", json={})).json()["session_id"]
            body = {"session_id": session_id, "model_seq_id": 0, "base_model": "tinsmith/tiny"}
            created = await result(http, await http.post("create_model", json=body | {"lora_config": {"rank": 4}}))
            model_id = created["model_id"]
            tokens = [10, 20, 30, 40, 50]
            datum = Datum(ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:], "weights": [1.0] * 4})
            losses = []
            for step in range(3):
                train = TrainRequest(
                    model_id=model_id,
                    seq_id=2 * step + 1,
                    data=(datum,),
                    loss_fn="cross_entropy",
                    loss_fn_config={},
                    forward_only=False,
                )
                receipt = await http.post(
                    "forward_backward", content=encode_train_request(train), headers={"content-type": CONTENT_TYPE}
                )
                adam = {"model_id": model_id, "seq_id": 2 * step + 2, "adam_params": {"learning_rate": 0.01}}
                stepped = await http.post("optim_step", json=adam)
                losses.append((await result(http, receipt))["metrics"]["loss:sum"])
                assert (await result(http, stepped))["metrics"]["step_applied"] == 1
            assert losses[2] < losses[1] < losses[0]
            saved = await result(
                http, await http.post("save_weights", json={"model_id": model_id, "seq_id": 7, "path": "a"})
            )
            assert saved["path"] == f"tinker://{model_id}/weights/a"
            sampler = {"session_id": session_id, "sampling_session_seq_id": 0, "model_path": saved["path"]}
            sampler_id = (await http.post("create_sampling_session", json=sampler)).json()["sampling_session_id"]
            drawn = {
                "sampling_session_id": sampler_id,
                "seq_id": 0,
                "prompt": {"chunks": [{"tokens": tokens}]},
                "sampling_params": {"max_tokens": 3, "stop": [], "temperature": 0.0},
            }
            sequence = (await result(http, await http.post("asample", json=drawn)))["sequences"][0]
            assert len(sequence["tokens"]) == len(sequence["logprobs"]) == 3
    finally:
        await close()
    assert any(path.endswith("adapter_model.safetensors") for path in files_below(tmp_path))


async def test_settings_of_the_process_last_as_long_as_engines_in_it(tmp_path: Path) -> None:
    def found() -> tuple[int, bool]:
        with ThreadPoolExecutor(1) as thread:  # a new one: those that were there before keep their number of threads
            return thread.submit(torch.get_num_threads).result(), torch.are_deterministic_algorithms_enabled()

    before = found()
    threads = before[0] + 1
    _, close_first = await open_local(f"local:?data_dir={tmp_path}/a&threads={threads}&deterministic=true")
    _, close_second = await open_local(f"local:?data_dir={tmp_path}/b&threads={threads}")
    await close_first()
    assert found() == (threads, True)
    await close_second()
    assert found() == before


async def test_two_servers_over_one_data_folder_are_refused(tmp_path: Path) -> None:
    url = f"local:?data_dir={tmp_path}&dtype=float32&threads=1"
    _, close = await open_local(url)
    try:
        with pytest.raises(UserError, match=str(tmp_path)):
            await open_local(url)
    finally:
        await close()
    _, close = await open_local(url)
    await close()


async def test_a_second_program_takes_the_next_default_folder_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TINSMITH_DATA_DIR", str(tmp_path))
    _, close_first = await open_local("local:?threads=1")
    _, close_second = await open_local("local:?threads=1")
    await close_second()
    await close_first()
    assert {folder.name for folder in tmp_path.iterdir()} == {"local", "local-2"}
    assert [record.getMessage() for record in caplog.records if "checkpoints go to" in record.getMessage()] == [
        f"another program uses {tmp_path / 'local'}; checkpoints go to {tmp_path / 'local-2'}"
    ]


@pytest.mark.parametrize(("url", "named"), [("local:?dtype=int4", "int4"), ("local:?base_model=no=/where", "/where")])
async def test_a_url_that_cannot_be_served_says_why(url: str, named: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=named):
        await open_local(f"{url}&data_dir={tmp_path}")


def files_below(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob("*")]


ENDS_WHILE_THE_ENGINE_WORKS = """
import tinsmith as tinker
service = tinker.ServiceClient()
trainer = service.create_lora_training_client(base_model="tinsmith/tiny", rank=8, seed=0).result()
datum = tinker.Datum(tinker.ModelInput.from_ints([5] * 400), {"target_tokens": [5] * 400, "weights": [1.0] * 400})
trainer.forward_backward([datum] * 8, "cross_entropy")
service.close("success")
"""


def test_a_program_that_waits_for_nothing_ends_without_a_crash(tmp_path: Path) -> None:
    environment = {**os.environ, "TINSMITH_DATA_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    environment.pop("TINKER_BASE_URL", None)
    ended = subprocess.run(
        [sys.executable, "-c", ENDS_WHILE_THE_ENGINE_WORKS],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
