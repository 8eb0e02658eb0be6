"""Archives of adapters become checkpoints; what is no adapter leaves nothing behind."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.unit.control.harness import Harness
from tinsmith.control.imports import ImportOrder
from tinsmith.control.requests import CreateModelFromCheckpoint, SaveState
from tinsmith.types.errors import InvalidInput, NotFound, PayloadConflict, StorageError, TinsmithError
from tinsmith.types.operations import ImportAdapter

pytestmark = pytest.mark.anyio

CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "r": 3,
    "lora_alpha": 12,
    "base_model_name_or_path": "tinsmith/fake",
}


def archive(tmp_path: Path, files: dict[str, bytes], mode: str = "w", name: str = "a.tar") -> Path:
    path = tmp_path / name
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for member, data in files.items():
            entry = tarfile.TarInfo(member)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def adapter(config: dict[str, Any] | None = None, folder: str = "") -> dict[str, bytes]:
    return {
        f"{folder}README.md": b"trained elsewhere",
        f"{folder}adapter_config.json": json.dumps(config or CONFIG).encode(),
        f"{folder}adapter_model.safetensors": b"weights",
    }


@pytest.mark.parametrize(("mode", "folder"), [("w", ""), ("w:gz", "./"), ("w:xz", "outside/")])
async def test_an_import_is_listed_trained_on_and_noted(h: Harness, tmp_path: Path, mode: str, folder: str) -> None:
    packed = archive(tmp_path, adapter(folder=folder), mode)
    made = await h.control.library.import_adapter(packed, ImportOrder(name="outside", ttl_seconds=3600), None)
    listed, total = await h.control.library.list_user_checkpoints(10, 0)
    assert (listed, total) == ([made], 1)
    assert (made.checkpoint_id, made.step, made.version) == ("weights/outside", 0, 1)
    assert made.expires_at is not None
    info = await h.control.library.weights_info(made.tinker_path)
    assert (info.base_model, info.lora_rank) == ("tinsmith/fake", 3)
    run = await h.control.library.get_training_run(made.tinker_path.split("/")[2])
    assert (run.lora_rank, run.last_checkpoint) == (3, made)
    request = CreateModelFromCheckpoint(
        session_id=await h.session(), model_seq_id=0, path=made.tinker_path, optimizer=False
    )
    receipt = await h.control.create_model_from_checkpoint(request)
    await h.result(receipt)
    await h.result(h.submit(SaveState(model_id=receipt.model_id or "", seq_id=1, name="on")))
    events = [entry.event for entry in await h.control.library.audit_log("checkpoints", None)]
    assert events[0] == "checkpoint_import"


async def test_optimizer_state_is_not_invented(h: Harness, tmp_path: Path) -> None:
    made = await h.control.library.import_adapter(archive(tmp_path, adapter()), ImportOrder(name="a"), None)
    request = CreateModelFromCheckpoint(
        session_id=await h.session(), model_seq_id=0, path=made.tinker_path, optimizer=True
    )
    error = await h.error(await h.control.create_model_from_checkpoint(request))
    assert "no optimizer state" in str(error)


async def test_the_same_request_again_is_the_same_import(h: Harness, tmp_path: Path) -> None:
    packed, take = archive(tmp_path, adapter()), h.control.library.import_adapter
    first = await take(packed, ImportOrder(name="a", fingerprint=b"1"), "key")
    assert await take(packed, ImportOrder(name="a", fingerprint=b"1"), "key") == first
    with pytest.raises(PayloadConflict, match="another import"):
        await take(packed, ImportOrder(name="a", fingerprint=b"2"), "key")
    assert (await h.control.library.list_user_checkpoints(10, 0))[1] == 1


CASES: dict[str, tuple[dict[str, bytes] | bytes, ImportOrder, type[TinsmithError], str]] = {
    "no archive": (b"no tar", ImportOrder(name="a"), InvalidInput, "archive cannot be read"),
    "empty": ({}, ImportOrder(name="a"), InvalidInput, "must hold one adapter_config.json; it has none"),
    "two": (
        adapter(folder="a/") | adapter(folder="b/"),
        ImportOrder(name="a"),
        InvalidInput,
        "must hold one adapter_config.json; it has 2 of them",
    ),
    "config alone": (
        {"adapter_config.json": b"{}"},
        ImportOrder(name="a"),
        InvalidInput,
        "the archive has no adapter_model.safetensors",
    ),
    "pickle": (
        {"adapter_config.json": b"{}", "adapter_model.bin": b""},
        ImportOrder(name="a"),
        InvalidInput,
        "adapter_model.bin is a pickle",
    ),
    "bad config": (
        adapter() | {"adapter_config.json": b"[1]"},
        ImportOrder(name="a"),
        InvalidInput,
        "must be a JSON object, not list",
    ),
    "other base": (
        adapter(CONFIG | {"base_model_name_or_path": "x/y"}),
        ImportOrder(name="a"),
        NotFound,
        "made for base model 'x/y', which this server does not have; say base_model .* one of: tinsmith/fake",
    ),
    "unknown base": (adapter(), ImportOrder(name="a", base_model="z"), NotFound, "no base model 'z'"),
    "bad name": (adapter(), ImportOrder(name="~latest"), InvalidInput, "checkpoint name '~latest'"),
    "bad ttl": (adapter(), ImportOrder(name="a", ttl_seconds=1), InvalidInput, "ttl_seconds"),
}


@pytest.mark.parametrize(("content", "order", "kind", "message"), CASES.values(), ids=CASES)
async def test_what_cannot_be_imported_is_refused_and_leaves_nothing(
    h: Harness,
    tmp_path: Path,
    content: dict[str, bytes] | bytes,
    order: ImportOrder,
    kind: type[TinsmithError],
    message: str,
) -> None:
    packed = tmp_path / "a.tar"
    if isinstance(content, bytes):
        packed.write_bytes(content)
    else:
        archive(tmp_path, content)
    with pytest.raises(kind, match=message):
        await h.control.library.import_adapter(packed, order, None)
    assert (await h.control.library.list_user_checkpoints(10, 0))[1] == 0
    assert not any(path.is_file() for path in (tmp_path / "data" / "checkpoints").rglob("*"))
    assert list((tmp_path / "data").glob("uploads/*")) == []


async def test_an_engine_that_refuses_leaves_nothing(h: Harness, tmp_path: Path) -> None:
    h.engine.fail_next(ImportAdapter, StorageError("No space left"))
    with pytest.raises(StorageError, match="No space left"):
        await h.control.library.import_adapter(archive(tmp_path, adapter()), ImportOrder(name="a"), None)
    assert await h.control.library.list_sessions(10, 0) == ([], 0)
    assert list((tmp_path / "data").glob("uploads/*")) == []


async def test_archives_cannot_write_outside(h: Harness, tmp_path: Path) -> None:
    made = await h.control.library.import_adapter(
        archive(tmp_path, adapter(folder="../../")), ImportOrder(name="a"), None
    )
    assert made.size_bytes
    assert not (tmp_path / "adapter_config.json").exists()
    assert not (tmp_path / "data" / "adapter_config.json").exists()


async def test_too_large_a_file_is_refused(open_control: Any, tmp_path: Path) -> None:
    big = adapter() | {"adapter_model.safetensors": b"x" * 2000}
    async with open_control(max_adapter_bytes=1024) as h:
        with pytest.raises(InvalidInput, match="has 2000 bytes; this server takes at most 1024"):
            await h.control.library.import_adapter(archive(tmp_path, big), ImportOrder(name="a"), None)
