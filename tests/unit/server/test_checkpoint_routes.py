"""The life of checkpoints over HTTP: addresses, pins, imports, merged exports, budgets; and whose they are."""

from __future__ import annotations

import io
import json
import tarfile
from urllib.parse import quote

import pytest

from tests.unit.server.keyed import keyed_server
from tests.unit.server.tinker_client import Client, OpenServer

pytestmark = pytest.mark.anyio


def archive(base_model: str) -> bytes:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": base_model}
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, data in (("adapter_config.json", json.dumps(config).encode()), ("adapter_model.safetensors", b"x")):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return packed.getvalue()


async def saved(client: Client, name: str = "a") -> str:
    """The path below `/api/v1/` of a checkpoint of a new run."""
    model = await client.model()
    await client.result(await client.train(model, 1))
    await client.result(await client.post("save_weights", {"model_id": model, "seq_id": 2, "path": name}))
    return f"/api/v1/training_runs/{model}/checkpoints/weights"


@pytest.mark.parametrize("address", ["a", "a~1", "~latest", "~best(loss)", "~best(loss:sum,max)"])
@pytest.mark.parametrize("escape", [False, True])
async def test_an_address_is_looked_up_however_it_is_escaped(client: Client, address: str, escape: bool) -> None:
    at = await saved(client)
    found = await client.http.get(f"{at}/{quote(address, safe='') if escape else address}")
    assert found.status_code == 200, found.text
    assert found.json()["tinker_path"] == f"tinker://{at.split('/')[4]}/weights/a"
    assert (found.json()["version"], found.json()["pinned"]) == (1, False)
    assert found.json()["metrics"]["loss:sum"] > 0


async def test_a_bad_address_is_400_and_a_missing_one_404(client: Client) -> None:
    at = await saved(client)
    bad = await client.http.get(f"{at}/~newest")
    assert (bad.status_code, "known are NAME, NAME~VERSION" in bad.json()["detail"]) == (400, True)
    assert (await client.http.get(f"{at}/b")).status_code == 404
    assert (await client.http.delete(f"{at}/~latest")).status_code == 400


async def test_pins_are_idempotent(client: Client) -> None:
    at = await saved(client)
    for method, pinned in (("POST", True), ("POST", True), ("DELETE", False), ("DELETE", False)):
        assert (await client.http.request(method, f"{at}/~latest/pin")).status_code == 204
        assert (await client.http.get(f"{at}/a")).json()["pinned"] is pinned


async def test_an_archive_is_imported_once_per_key(client: Client) -> None:
    body = archive(client.engine.card.name)
    for _ in range(2):
        made = await client.http.post(
            "/api/v1/checkpoints/import?name=x", content=body, headers={"x-idempotency-key": "k"}
        )
        assert made.status_code == 200, made.text
        assert made.json()["checkpoint_id"] == "weights/x"
    assert (await client.get("checkpoints")).json()["cursor"]["total_count"] == 1
    other = await client.http.post("/api/v1/checkpoints/import?name=x", content=archive("x/y"))
    assert (other.status_code, "made for base model 'x/y'" in other.json()["detail"]) == (404, True)
    assert (await client.http.post("/api/v1/checkpoints/import?name=x", content=b"")).status_code == 400


async def test_an_archive_may_be_larger_than_other_bodies_and_has_a_limit(open_server: OpenServer) -> None:
    async with open_server(max_body_bytes=1024, max_upload_bytes=4096) as client:
        for size, status in ((2000, 400), (5000, 413)):  # 400: it is no archive
            sent = await client.http.post("/api/v1/checkpoints/import?name=x", content=b"x" * size)
            assert sent.status_code == status


async def test_a_merged_export_has_links_to_its_files(client: Client) -> None:
    at = await saved(client)
    made = await client.http.post(f"{at}/a/merged", json={"name": "whole"})
    assert made.status_code == 200, made.text
    assert made.json()["checkpoint_type"] == "external"
    links = await client.http.get(f"{at.replace('/weights', '/external_weights')}/whole/external_weights_urls")
    assert "adapter_model.safetensors" in links.json()["urls"]
    assert (await client.http.post(f"{at}/a/merged", json={"dtype": "int4"})).status_code == 400


async def test_checkpoints_of_others_are_not_there(open_server: OpenServer) -> None:
    async with keyed_server(open_server) as server:
        anna, ben = await server.member("anna"), await server.member("ben")
        at = await saved(anna, "secret")
        for address in ("secret", "secret~1", "~latest", "~best(loss)", "none"):
            answers = [
                await ben.http.get(f"{at}/{address}"),
                await ben.http.delete(f"{at}/{address}"),
                await ben.http.post(f"{at}/{address}/pin"),
                await ben.http.delete(f"{at}/{address}/pin"),
                await ben.http.post(f"{at}/{address}/merged", json={}),
            ]
            for answer in answers:
                assert answer.status_code == 404, answer.text
                assert address.startswith("secret") or "'secret'" not in answer.text
        made = await ben.http.post("/api/v1/checkpoints/import?name=x", content=archive(server.engine.card.name))
        assert made.status_code == 200, made.text
        listed = [(await who.get("checkpoints")).json()["checkpoints"] for who in (anna, ben)]
        assert [[one["checkpoint_id"] for one in mine] for mine in listed] == [["weights/secret"], ["weights/x"]]
        viewer = server.client((await server.key("ben", scopes=("read",)))[0])
        for refused in (
            await viewer.http.post("/api/v1/checkpoints/import?name=y", content=b"x"),
            await viewer.http.post(f"{at}/x/merged", json={}),
            await viewer.http.post(f"{at}/x/pin"),
        ):
            assert refused.status_code == 403, refused.text


async def test_a_quota_is_507_and_not_sent_again(open_server: OpenServer) -> None:
    async with keyed_server(open_server) as server:
        anna = await server.member("anna")
        at = await saved(anna)
        size = (await anna.http.get(f"{at}/a")).json()["size_bytes"]
        await server.deeds.change_quota("user", "anna", disk_bytes=int(1.5 * size))
        copied = await anna.post("copy_weights", {"source_path": f"tinker://{at.split('/')[4]}/weights/a"})
        assert (copied.status_code, copied.headers["x-should-retry"]) == (507, "false")
        assert "user 'anna' may store" in copied.json()["detail"]
