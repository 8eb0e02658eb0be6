"""Links to files: signed, for a while, and to nothing else; archives and traces behind them."""

from __future__ import annotations

import io
import shutil
import tarfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from tests.fixtures.s3 import S3Server
from tests.unit.server.tinker_client import Client, OpenServer
from tinsmith.control.downloads import archive_files, tar_chunks, tar_size
from tinsmith.control.folder_store import stored_files

pytestmark = pytest.mark.anyio


async def exported(client: Client, name: str = "e1") -> tuple[str, dict[str, Any]]:
    """A model's id, and what `external_weights_urls` says of a fresh export."""
    model_id = await client.model()
    body = {"model_id": model_id, "seq_id": 1, "path": name, "ttl_seconds": 3600}
    saved = await client.result(await client.post("save_weights_external", body))
    assert saved["path"] == f"tinker://{model_id}/external_weights/{name}"
    assert saved["size_bytes"] > 0
    return model_id, (await client.get(f"training_runs/{model_id}/checkpoints/external_weights/{name}/{URLS}")).json()


URLS = "external_weights_urls"


async def test_an_external_checkpoint_is_fetched_file_by_file(client: Client) -> None:
    model_id, links = await exported(client)
    listed = (await client.get(f"training_runs/{model_id}/checkpoints")).json()["checkpoints"][0]
    assert listed["checkpoint_type"] == "external"
    assert {"adapter_config.json", "adapter_model.safetensors"} <= links["urls"].keys()
    assert "optimizer.safetensors" not in links["urls"]
    files = {name: await client.http.get(url) for name, url in links["urls"].items()}
    assert {answer.status_code for answer in files.values()} == {200}
    assert sum(len(answer.content) for answer in files.values()) == listed["size_bytes"]
    left = datetime.fromisoformat(links["expires"]).timestamp() - time.time()
    assert 3500 < left <= 3600


async def test_files_of_a_bucket_are_fetched_through_the_server(
    open_server: OpenServer, s3: S3Server, tmp_path: Path
) -> None:
    bucket = s3.new_bucket()
    async with open_server(control={"checkpoints": s3.url(bucket)}) as client:
        model_id, links = await exported(client)
        shutil.rmtree(tmp_path / "data" / "checkpoint-cache" / "checkpoints")
        url = links["urls"]["adapter_model.safetensors"]
        whole = await client.http.get(url)
        assert whole.status_code == 200
        part = await client.http.get(url, headers={"range": "bytes=2-5"})
        assert (part.status_code, part.content) == (206, whole.content[2:6])
        shutil.rmtree(tmp_path / "data" / "checkpoint-cache" / "checkpoints")
        answer = await client.get(f"training_runs/{model_id}/checkpoints/external_weights/e1/archive")
        archive = await client.http.get(answer.headers["location"])
        with tarfile.open(fileobj=io.BytesIO(archive.content)) as tar:
            member = tar.extractfile("adapter_model.safetensors")
            assert member is not None
            assert member.read() == whole.content
        assert not client.app.state.service.control._folders._cache._held
        checkpoint = f"/api/v1/training_runs/{model_id}/checkpoints/external_weights/e1"
        assert (await client.http.delete(checkpoint)).status_code == 204
        assert s3.objects(bucket) == []
        assert (await client.http.get(url)).status_code == 404


async def test_a_link_opens_one_file_for_its_time(open_server: OpenServer) -> None:
    async with open_server(link_ttl_s=1) as client:
        _, links = await exported(client)
        url = links["urls"]["adapter_config.json"]
        signature = parse_qs(urlsplit(url).query)["signature"][0]
        for forged in (
            url.replace("adapter_config.json", "adapter_model.safetensors"),
            url.replace("expires=", "expires=9"),
            url.replace(signature, "0" * len(signature)),
            url.replace(signature, "%C3%A9"),
        ):
            refused = await client.http.get(forged)
            assert refused.status_code == 403
            assert "signature" in refused.json()["detail"]
        assert (await client.http.get(url)).status_code == 200
        time.sleep(2)  # noqa: ASYNC251 - the clock is the system's
        assert (await client.http.get(url)).status_code == 403


async def test_a_link_to_a_deleted_checkpoint_is_404(client: Client) -> None:
    model_id, links = await exported(client)
    checkpoint = f"/api/v1/training_runs/{model_id}/checkpoints/external_weights/e1"
    assert (await client.http.delete(checkpoint)).status_code == 204
    assert (await client.http.get(links["urls"]["adapter_config.json"])).status_code == 404
    assert (await client.http.get(f"{checkpoint}/{URLS}")).status_code == 404


async def test_only_external_checkpoints_have_links(client: Client) -> None:
    model_id = await client.model()
    await client.result(await client.post("save_weights", {"model_id": model_id, "seq_id": 1, "path": "a"}))
    refused = await client.get(f"training_runs/{model_id}/checkpoints/weights/a/{URLS}")
    assert refused.status_code == 400
    assert "save_weights_external" in refused.json()["detail"]


@pytest.mark.parametrize(("version", "count"), [("0.16.1", 0), ("0.27.2", 0), ("0.28.0", 1), ("1.0.0", 1), ("", 1)])
async def test_sdks_that_know_no_external_checkpoints_are_not_told_of_them(
    client: Client, version: str, count: int
) -> None:
    """For one of them they refuse the whole list."""
    model_id, _ = await exported(client)
    headers = {"x-stainless-package-version": version}
    everything = (await client.get("checkpoints", headers=headers)).json()
    assert len(everything["checkpoints"]) == everything["cursor"]["total_count"] == count
    of_run = await client.get(f"training_runs/{model_id}/checkpoints", headers=headers)
    assert len(of_run.json()["checkpoints"]) == count


async def test_an_external_checkpoint_cannot_be_trained_on(client: Client) -> None:
    model_id, _ = await exported(client)
    body = {"model_id": model_id, "seq_id": 2, "path": f"tinker://{model_id}/external_weights/e1", "optimizer": False}
    failed = await client.result(await client.post("load_weights", body))
    assert failed["category"] == "user"
    assert "external" in failed["error"]


async def test_an_archive_is_a_redirection_to_a_tar(client: Client) -> None:
    model_id = await client.model()
    await client.result(await client.post("save_weights_for_sampler", {"model_id": model_id, "seq_id": 1, "path": "s"}))
    answer = await client.get(f"training_runs/{model_id}/checkpoints/sampler_weights/s/archive")
    assert answer.status_code == 302
    assert answer.headers["expires"].endswith("GMT")
    assert answer.headers["location"] == answer.json()["url"]
    archive = await client.http.get(answer.headers["location"])
    assert int(archive.headers["content-length"]) == len(archive.content)
    with tarfile.open(fileobj=io.BytesIO(archive.content)) as tar:
        assert {"adapter_config.json", "adapter_model.safetensors", "checkpoint_complete"} <= set(tar.getnames())
    missing = await client.get(f"training_runs/{model_id}/checkpoints/weights/none/archive")
    assert missing.status_code == 404


@pytest.mark.parametrize("sizes", [[], [0], [1, 511, 512, 513], [3_000_000]])
def test_an_archive_is_as_long_as_announced_and_holds_every_byte(tmp_path: Path, sizes: list[int]) -> None:
    for number, size in enumerate(sizes):
        (tmp_path / f"f{number}").write_bytes(bytes([number + 1]) * size)
    files = archive_files(tmp_path)
    content = b"".join(tar_chunks(tmp_path, files))
    assert len(content) == tar_size(files)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        for number, size in enumerate(sizes):
            member = tar.extractfile(f"f{number}")
            assert member is not None
            assert member.read() == bytes([number + 1]) * size


def test_links_out_of_a_checkpoint_are_no_files_of_it(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s")
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "stolen").symlink_to(tmp_path / "secret")
    assert stored_files(folder) == []


async def test_a_trace_shows_wait_and_work_of_every_request(client: Client) -> None:
    session_id = await client.session()
    model_id = await client.model(session_id)
    early = await client.train(model_id, 2)
    await client.result(await client.train(model_id, 1))
    await client.result(early)
    bad = await client.post("optim_step", {"model_id": model_id, "seq_id": 3, "adam_params": {"learning_rate": -1.0}})
    await client.result(bad)
    sampler = await client.sampler(session_id)
    await client.result(await client.sample(sampler))
    client.engine.pause()
    await client.sample(sampler, 1)
    exported = (await client.get(f"sessions/{session_id}/trace_export")).json()
    assert exported["status"] == "ready"
    events = (await client.http.get(exported["url"])).json()["traceEvents"]
    client.engine.resume()
    rows = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert rows == {model_id, sampler}
    begun = [event for event in events if event["ph"] == "b"]
    assert [e["name"] for e in begun if e["name"] not in ("queued", "running")] == [
        *("CreateModel", "ForwardBackward", "ForwardBackward", "OptimStep", "Sample", "Sample")
    ]
    ended = {(e["id"], e["name"]): e["ts"] for e in events if e["ph"] == "e"}
    assert all(ended[e["id"], e["name"]] >= e["ts"] for e in begun)
    states = [event["args"]["state"] for event in begun if "state" in event["args"]]
    assert states == ["done", "done", "done", "failed", "done", "open"]
    failed = next(event for event in begun if event["args"].get("state") == "failed")
    assert "learning_rate" in failed["args"]["error"]


async def test_a_trace_of_no_session_says_so(client: Client) -> None:
    answer = (await client.get("sessions/sess-none/trace_export")).json()
    assert answer["status"] == "failed"
    assert "sess-none" in answer["error"]
