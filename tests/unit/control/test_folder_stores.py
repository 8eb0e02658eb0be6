"""Stores of checkpoints: one suite over a folder and over a bucket, and what can go wrong on the way to a bucket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.s3 import SECRET, S3Server, cut_after
from tests.unit.control.conftest import OpenControl
from tests.unit.control.harness import draw, forward_backward, optim
from tinsmith.control.folder_store import FolderStore, LocalFolders, StoredFile
from tinsmith.control.object_folders import ObjectFolders
from tinsmith.control.requests import LoadState, SaveForSampler, SaveState
from tinsmith.control.settings import ControlSettings
from tinsmith.control.stores import folder_store
from tinsmith.runtime.fake import FakeEngine
from tinsmith.types.errors import CheckpointDamaged, InvalidInput, NotFound, StorageError

pytestmark = pytest.mark.anyio

KEY = "checkpoints/sess-1~train~0/weights/a/v1"
BESIDE = "checkpoints/sess-1~train~0/weights/a/v10"
FILES = {"adapter_model.safetensors": b"w" * 1000, "checkpoint.json": b"{}", "adapter_config.json": b"", "d/e": b"3"}


def write(folder: Path, files: dict[str, bytes] = FILES) -> None:
    """As an engine does: under another name until it is whole."""
    partial = folder.with_name(f".{folder.name}.partial")
    for name, content in files.items():
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        (partial / name).write_bytes(content)
    partial.rename(folder)


async def fill(store: FolderStore, key: str, files: dict[str, bytes] = FILES) -> None:
    write(store.draft(key), files)
    await store.put(key)


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def bucket(s3: S3Server) -> str:
    return s3.new_bucket()


@pytest.fixture
def open_bucket(s3: S3Server, bucket: str, tmp_path: Path) -> Callable[..., ObjectFolders]:
    """Every one with a cache of its own, as on another machine, but for those of the same name."""

    def opened(cache: str = "cache", *, max_bytes: int = 10**6, endpoint: str | None = None) -> ObjectFolders:
        return ObjectFolders(s3.url(bucket, endpoint=endpoint), tmp_path / cache, cache_bytes=max_bytes)

    return opened


@pytest.fixture(params=["folder", "bucket"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[FolderStore]:
    made: FolderStore = LocalFolders(tmp_path / "data")
    if request.param == "bucket":
        made = request.getfixturevalue("open_bucket")()
    await made.open()
    yield made
    await made.close()


# ---- the suite ----


async def test_what_was_put_is_there_and_nothing_else(store: FolderStore) -> None:
    assert not await store.exists(KEY)
    assert await store.files(KEY) == []
    await fill(store, KEY)
    await fill(store, BESIDE, {"checkpoint.json": b"other"})
    assert await store.exists(KEY)
    assert await store.files(KEY) == [StoredFile(name=name, size=len(FILES[name])) for name in sorted(FILES)]
    assert sorted(await store.keys()) == [KEY, BESIDE]
    async with store.local(KEY) as folder:
        assert content(folder) == FILES


async def test_a_copy_is_a_folder_of_its_own(store: FolderStore) -> None:
    await fill(store, KEY)
    copy = "checkpoints/sess-2~train~0/weights/a/v1"
    await store.copy(KEY, copy, {"checkpoint.json": b"changed"})
    await store.delete(KEY)
    async with store.local(copy) as folder:
        assert content(folder) == FILES | {"checkpoint.json": b"changed"}
    assert await store.keys() == [copy]


async def test_what_was_deleted_is_gone_and_may_be_deleted_again(store: FolderStore) -> None:
    await fill(store, KEY)
    await fill(store, BESIDE)
    for _ in range(2):
        await store.delete(KEY)
    assert not await store.exists(KEY)
    assert await store.keys() == [BESIDE]
    with pytest.raises(NotFound, match="was deleted"):
        async with store.local(KEY):
            raise AssertionError("it is there")
    await store.delete(BESIDE)
    await store.tidy()
    assert await store.keys() == []


async def test_nothing_written_is_nothing_to_keep(store: FolderStore) -> None:
    with pytest.raises(StorageError, match="nothing was written"):
        await store.put(KEY)


# ---- a bucket alone ----


async def test_another_machine_finds_it_and_fetches_it_once(open_bucket: Callable[..., ObjectFolders]) -> None:
    await fill(open_bucket(), KEY)
    other = open_bucket("other")
    async with other.local(KEY) as folder, other.local(KEY) as again:
        assert content(folder) == FILES
        assert again == folder
        first = (folder / "checkpoint.json").stat().st_ino
    async with other.local(KEY) as folder:
        assert (folder / "checkpoint.json").stat().st_ino == first


async def test_objects_lie_under_the_prefix_by_readable_names(
    open_bucket: Callable[..., ObjectFolders], s3: S3Server, bucket: str
) -> None:
    store = open_bucket()
    await store.open()
    assert s3.objects(bucket) == []
    await fill(store, KEY)
    assert s3.objects(bucket) == [f"some/where/{KEY}/{name}" for name in sorted(FILES)]


async def test_a_large_file_goes_in_parts_and_comes_back(open_bucket: Callable[..., ObjectFolders]) -> None:
    large = {"w": bytes(range(256)) * 140_000, "checkpoint.json": b"{}"}
    await fill(open_bucket(max_bytes=10**9), KEY, large)
    async with open_bucket("other", max_bytes=10**9).local(KEY) as folder:
        assert content(folder) == large


async def test_the_cache_keeps_to_its_size_and_what_is_in_use(open_bucket: Callable[..., ObjectFolders]) -> None:
    store = open_bucket(max_bytes=2500)
    keys = [f"checkpoints/r/weights/a/v{n}" for n in range(4)]
    await fill(store, keys[0])
    async with store.local(keys[0]) as held:
        for key in keys[1:]:
            await fill(store, key)
        assert [store.draft(key).exists() for key in keys] == [True, False, False, True]
        assert content(held) == FILES
    async with store.local(keys[1]) as folder:
        assert content(folder) == FILES
    assert [store.draft(key).exists() for key in keys] == [True, True, False, False]
    assert await store.keys() == keys


async def test_what_was_changed_in_the_bucket_is_not_handed_out(
    open_bucket: Callable[..., ObjectFolders], s3: S3Server, bucket: str
) -> None:
    import obstore

    await fill(open_bucket(), KEY)
    store = open_bucket("other")
    path = f"some/where/{KEY}/adapter_model.safetensors"
    digest = (await obstore.get_async(store._store, path)).attributes["sha256"]
    await obstore.put_async(store._store, path, b"x" * 1000, attributes={"sha256": digest})
    with pytest.raises(CheckpointDamaged, match="does not match its SHA-256"):
        async with store.local(KEY):
            raise AssertionError("it was handed out")
    assert not store.draft(KEY).exists()
    assert s3.objects(bucket)


async def test_an_upload_that_is_cut_is_an_error_and_is_no_folder(
    open_bucket: Callable[..., ObjectFolders], s3: S3Server
) -> None:
    files = {"checkpoint.json": b"{}", "w": b"w" * 12_000_000}
    async with cut_after(s3, 6_000_000) as endpoint:
        store = open_bucket(endpoint=endpoint)
        write(store.draft(KEY), files)
        with pytest.raises(StorageError, match=r"the checkpoint store 's3://bucket-.*' cannot take") as cut:
            await store.put(KEY)
    assert SECRET not in str(cut.value)
    assert await open_bucket("other").files(KEY) == []
    assert await open_bucket().keys() == [KEY]  # the draft: swept by the next server
    await open_bucket().delete(KEY)
    assert await open_bucket().keys() == []


async def test_a_store_that_cannot_be_used_says_so_at_the_start(s3: S3Server, bucket: str, tmp_path: Path) -> None:
    missing = ObjectFolders(s3.url("no-such-bucket"), tmp_path, cache_bytes=0)
    with pytest.raises(StorageError, match="'s3://no-such-bucket/some/where' cannot be used"):
        await missing.open()
    down = ObjectFolders(s3.url(bucket, endpoint="http://127.0.0.1:9"), tmp_path, cache_bytes=0)
    with pytest.raises(StorageError, match="cannot be used") as refused:
        await down.open()
    assert SECRET not in str(refused.value)


def test_settings_choose_the_store(tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(**values: Any) -> FolderStore:
        return folder_store(ControlSettings(data_dir=tmp_path / "data", **values))

    assert chosen().draft("k") == tmp_path / "data" / "k"
    assert chosen(checkpoints=str(tmp_path / "big")).draft("k") == tmp_path / "big" / "k"
    assert chosen(checkpoints="s3://b/p").draft("k") == tmp_path / "data" / "checkpoint-cache" / "k"
    for url, words in (
        ("gs://bucket", "give a folder or s3://BUCKET/PREFIX"),
        ("s3:///x", "give a folder or s3://BUCKET/PREFIX"),
        ("s3://b/p?speed=high", "option 'speed' is not known"),
    ):
        with pytest.raises(InvalidInput, match=words):
            chosen(checkpoints=url)
    settings = ControlSettings(data_dir=tmp_path, checkpoints=s3.url("b"))
    assert SECRET not in repr(settings)


async def test_credentials_come_from_the_environment(
    s3: S3Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "anna")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    store = ObjectFolders(f"s3://{bucket}", tmp_path, cache_bytes=0)
    await store.open()
    await fill(store, KEY)
    assert f"{KEY}/checkpoint.json" in s3.objects(bucket)


# ---- control over a bucket ----


async def test_training_goes_on_from_a_bucket_on_another_machine(
    open_control: OpenControl, s3: S3Server, bucket: str, tmp_path: Path
) -> None:
    async with open_control(checkpoints=s3.url(bucket)) as h:
        model_id = await h.model()
        await h.result(h.submit(forward_backward(model_id, 1)))
        await h.result(h.submit(optim(model_id, 2)))
        path = await h.result(h.submit(SaveState(model_id=model_id, seq_id=3, name="a")))
        sampler = (await h.result(h.submit(SaveForSampler(model_id=model_id, seq_id=4, name="s")))).path
    for folder in (tmp_path / "data" / "checkpoint-cache" / "checkpoints").iterdir():
        folder.rename(tmp_path / folder.name)  # the machine has lost them
    async with open_control(checkpoints=s3.url(bucket)) as h:
        session_id = await h.session()
        model_id = await h.model(session_id)
        await h.result(h.submit(LoadState(model_id=model_id, seq_id=1, path=path, optimizer=True)))
        sampler_id = await h.control.create_sampling_session(session_id, 0, None, sampler)
        assert (await h.result(h.sample(draw(sampler_id)))).sequences[0].tokens
        assert len(await h.control.library.list_checkpoints(path.split("/")[2])) == 2


async def test_a_save_while_the_bucket_is_away_fails_and_lists_nothing(
    open_control: OpenControl, s3: S3Server, bucket: str
) -> None:
    async with cut_after(s3, 100_000) as endpoint:
        async with open_control(checkpoints=s3.url(bucket, endpoint=endpoint)) as h:
            model_id = await h.model()
            await exhaust(endpoint)
            error = await h.error(h.submit(SaveState(model_id=model_id, seq_id=1, name="a")))
            assert isinstance(error, StorageError)
            assert "the checkpoint store" in str(error)
            assert await h.control.library.list_checkpoints(model_id) == []
            assert (await h.result(h.submit(forward_backward(model_id, 2)))).metrics["loss:sum"] > 0


async def exhaust(endpoint: str) -> None:
    """Use up what the proxy lets through."""
    host, port = endpoint.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"x" * 200_000)
    try:
        await writer.drain()
        await asyncio.sleep(0.1)
    except ConnectionError:
        pass
    writer.transport.abort()


async def test_a_store_that_fails_while_a_server_starts_leaves_nothing_running(
    open_control: OpenControl, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(self: LocalFolders) -> list[str]:
        raise StorageError("the store is away")

    engine = FakeEngine()
    with monkeypatch.context() as patch:
        patch.setattr(LocalFolders, "keys", refuse)
        with pytest.raises(StorageError, match="the store is away"):
            async with open_control([engine]):
                raise AssertionError("it started")
    assert not engine.is_alive
    async with open_control() as h:
        assert h.control.is_ready


async def test_what_an_interrupted_save_left_in_a_bucket_is_swept(
    open_control: OpenControl, s3: S3Server, bucket: str
) -> None:
    async with open_control(checkpoints=s3.url(bucket)) as h:
        model_id = await h.model()
        await h.result(h.submit(SaveState(model_id=model_id, seq_id=1, name="a")))
    kept = s3.objects(bucket)
    run = model_id.replace(":", "~")
    s3.replace(bucket, f"some/where/checkpoints/{run}/weights/b/v1/w", b"half")
    s3.replace(bucket, "some/where/checkpoints/somebody~else/weights/b/v1/w", b"theirs")
    async with open_control(checkpoints=s3.url(bucket)):
        assert s3.objects(bucket) == [*kept, "some/where/checkpoints/somebody~else/weights/b/v1/w"]
