"""The ledger: entries survive, groups share a sync, a full disk passes, anything else is for good."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.control.harness import draw, forward_backward, optim
from tinsmith.control import ledger_codec
from tinsmith.control.errors import NotTaken, QuotaExceeded, SessionEnded
from tinsmith.control.ledger import Entry, Ledger, mark_failed, put, remove
from tinsmith.control.requests import NewSession, Rejected
from tinsmith.types import TensorData
from tinsmith.types.custom_loss import CustomLoss, LossCall, LossInput, Ref
from tinsmith.types.errors import InvalidInput, Overloaded, StorageError, UserError
from tinsmith.types.results import ForwardBackwardOutput

pytestmark = pytest.mark.anyio


def test_requests_come_back_from_their_bytes_as_they_were() -> None:
    for request in (
        forward_backward("m", 3, loss_fn_config={"beta": 0.1}),
        optim("m", 4, learning_rate=1e-3),
        draw("s", 5, more_stop_tokens=(3, 4)),
        NewSession(tags=("a",), user_metadata={"deep": {"list": [1, 2.5, None]}}),
    ):
        assert ledger_codec.decode(ledger_codec.encode(request)) == request


def test_numbers_keep_every_bit() -> None:
    logprobs = np.asarray([-0.1, float("nan"), float("-inf"), 1e-45], dtype=np.float32)
    output = ForwardBackwardOutput("ArrayRecord", [{"logprobs": TensorData.from_numpy(logprobs)}], {"a:sum": 0.1 + 0.2})
    again = ledger_codec.decode(ledger_codec.encode(output))
    assert again.loss_fn_outputs[0]["logprobs"].flat.tobytes() == logprobs.tobytes()
    assert again.metrics == {"a:sum": 0.30000000000000004}
    assert np.isinf(ledger_codec.decode(ledger_codec.encode([float("inf")]))[0])
    assert ledger_codec.decode(ledger_codec.encode(2**70)) == 2**70


def test_sparse_targets_and_large_data_come_back() -> None:
    sparse = TensorData([1.0, 2.0], "float32", [2, 9000], [0, 1, 2], [4, 8000])
    dense = TensorData.from_numpy(np.arange(100_000))
    again = ledger_codec.decode(ledger_codec.encode([sparse, dense]))
    assert again == [sparse, dense]
    assert again[0].is_sparse
    assert len(ledger_codec.encode(dense)) < dense.nbytes / 2


def test_a_custom_loss_comes_back() -> None:
    call = LossCall(node="y", op="call_function", target="torch.sum", args=(Ref("x"),), kwargs={"dim": None})
    loss = CustomLoss(
        name="l", inputs=(LossInput(node="x", name="logprobs", rank=1),), calls=(call,), loss=Ref("y"), metrics={}
    )
    again = ledger_codec.decode(ledger_codec.encode(loss))
    assert again == loss
    assert again.digest == loss.digest


def test_errors_keep_their_class_and_their_words() -> None:
    for error in (SessionEnded("over"), InvalidInput("bad"), StorageError("full")):
        again = ledger_codec.decode(ledger_codec.encode(error))
        assert type(again) is type(error)
        assert str(again) == str(error)
    again = ledger_codec.decode(ledger_codec.encode(QuotaExceeded("too many", retry_after_s=3.0)))
    assert (type(again), str(again)) == (Overloaded, "too many")  # as much of it as its words alone make
    rejected = ledger_codec.decode(ledger_codec.encode(Rejected(model_id="m", seq_id=1, error=InvalidInput("bad"))))
    assert isinstance(rejected.error, InvalidInput)


def test_what_is_no_entry_is_refused_with_a_reason() -> None:
    with pytest.raises(StorageError, match="begins with"):
        ledger_codec.decode(b"nonsense")
    good = ledger_codec.encode({"a": 1})
    with pytest.raises(StorageError, match="version 9"):
        ledger_codec.decode(good[:2] + b"\x09" + good[3:])
    with pytest.raises(StorageError, match="cannot be read"):
        ledger_codec.decode(good[:-2])
    with pytest.raises(TypeError, match="cannot hold"):
        ledger_codec.encode(object())


def _opened(path: Path, **fields: Any) -> Ledger:
    ledger = Ledger(path)
    for name, value in fields.items():
        setattr(ledger, name, value)
    ledger.open()
    ledger.start(asyncio.get_running_loop())
    return ledger


async def test_entries_are_there_after_a_restart_in_their_order(tmp_path: Path) -> None:
    ledger = _opened(tmp_path / "ledger.sqlite3")
    for number in (2, 1, 3):
        await ledger.write([put(Entry(kind="request", name=f"r{number}", model_id="m", seq=number, value=number))])
    await ledger.write([remove("model_id = ? AND seq < ?", "m", 2), mark_failed("request", "r3", InvalidInput("no"))])
    ledger.close()
    again = _opened(tmp_path / "ledger.sqlite3")
    entries = again.read()
    assert [(e.name, e.value, type(e.failure)) for e in entries] == [("r2", 2, type(None)), ("r3", 3, InvalidInput)]
    again.close()


async def test_many_writers_share_a_commit(tmp_path: Path) -> None:
    ledger = _opened(tmp_path / "ledger.sqlite3")
    commits = 0
    transact = ledger._transact

    def counted(*arguments: Any) -> None:
        nonlocal commits
        commits += 1
        transact(*arguments)

    ledger._transact = counted  # type: ignore[method-assign]
    await asyncio.gather(*(ledger.write([put(Entry(kind="k", name=str(n), value=n))]) for n in range(200)))
    assert len(ledger.read()) == 200
    assert commits <= 10
    ledger.close()


async def test_an_entry_that_cannot_be_written_fails_alone(tmp_path: Path) -> None:
    ledger = _opened(tmp_path / "ledger.sqlite3")
    writes = [ledger.write([put(Entry(kind="k", name=str(n), value=object() if n == 1 else n))]) for n in range(3)]
    results = await asyncio.gather(*writes, return_exceptions=True)
    assert [type(result) for result in results] == [type(None), NotTaken, type(None)]
    assert [entry.name for entry in ledger.read()] == ["0", "2"]
    assert ledger.fatal is None
    ledger.close()


async def test_an_entry_beyond_what_the_database_holds_fails_alone_and_the_writer_goes_on(tmp_path: Path) -> None:
    ledger = _opened(tmp_path / "ledger.sqlite3")
    writes = [ledger.write([put(Entry(kind="k", name=str(n), seq=2**70 if n == 1 else n))]) for n in range(3)]
    async with asyncio.timeout(10):
        results = await asyncio.gather(*writes, return_exceptions=True)
        assert [type(result) for result in results] == [type(None), NotTaken, type(None)]
        await ledger.write([put(Entry(kind="k", name="after"))])
    ledger.close()


async def test_one_who_fails_in_being_told_keeps_it_from_nobody(tmp_path: Path) -> None:
    ledger = _opened(tmp_path / "ledger.sqlite3")
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))

    def fail(error: StorageError | None) -> None:
        raise RuntimeError("cannot be told")

    ledger.post([put(Entry(kind="k", name="a"))], fail)
    async with asyncio.timeout(10):
        await ledger.write([put(Entry(kind="k", name="b"))])
    assert [str(context["exception"]) for context in complaints] == ["cannot be told"]
    ledger.close()


async def test_a_full_disk_refuses_writes_and_passes(tmp_path: Path) -> None:
    ledger = _opened(tmp_path / "ledger.sqlite3", max_pages=1100)
    await ledger.write([put(Entry(kind="k", name="kept", value=1))])
    blob = np.random.default_rng(0).bytes(8_000_000)
    with pytest.raises(StorageError, match="full"):
        await ledger.write([put(Entry(kind="k", name="large", value=blob))])
    assert ledger.fault is not None
    assert ledger.fatal is None
    assert [entry.name for entry in ledger.read()] == ["kept"]
    ledger.probe()
    await ledger.flush()
    assert ledger.fault is None
    ledger.close()


async def test_whoever_only_waits_for_the_others_does_not_fail_with_them(tmp_path: Path) -> None:
    ledger = _opened(tmp_path / "ledger.sqlite3")
    go_on = threading.Event()

    def slow(connection: sqlite3.Connection) -> int:
        go_on.wait(5)
        return 0

    def full(connection: sqlite3.Connection) -> int:
        error = sqlite3.OperationalError("database or disk is full")
        error.sqlite_errorname = "SQLITE_FULL"
        raise error

    writes = [asyncio.create_task(write) for write in (ledger.write([slow]), ledger.write([full]), ledger.flush())]
    await asyncio.sleep(0)
    go_on.set()
    results = await asyncio.gather(*writes, return_exceptions=True)
    assert [type(result) for result in results[1:]] == [NotTaken, type(None)]
    ledger.close()


async def test_any_other_error_of_the_disk_is_for_good(tmp_path: Path) -> None:
    ledger = _opened(tmp_path / "ledger.sqlite3")
    told: list[str] = []
    ledger.on_fatal = lambda: told.append("fatal")

    def broken(*arguments: Any) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    ledger._transact = broken  # type: ignore[method-assign]
    for _ in range(2):
        with pytest.raises(StorageError, match="disk I/O error"):
            await ledger.write([put(Entry(kind="k", name="a", value=1))])
    assert told == ["fatal"]
    ledger.close()


def test_a_ledger_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    Ledger(tmp_path / "l").open()
    with sqlite3.connect(tmp_path / "l") as connection:
        connection.execute("UPDATE meta SET value = '99' WHERE key = 'schema_version'")
    connection.close()
    with pytest.raises(UserError, match="version 99"):
        Ledger(tmp_path / "l").open()


async def test_a_ledger_that_cannot_be_opened_again_refuses_every_write(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite3")
    ledger.open()

    def broken() -> sqlite3.Connection:
        raise sqlite3.OperationalError("disk I/O error")

    ledger._connect = broken  # type: ignore[method-assign]
    ledger.start(asyncio.get_running_loop())
    async with asyncio.timeout(10):
        with pytest.raises(NotTaken, match="disk I/O error"):
            await ledger.write([put(Entry(kind="k", name="a"))])
    assert ledger.fatal is not None
    ledger.close()


def test_a_ledger_without_a_write_ahead_log_is_not_opened() -> None:
    """Where the disk fails as it is made, SQLite goes on without one and says nothing; in memory there is none."""
    with pytest.raises(StorageError, match="the journal mode stays 'memory'"):
        Ledger(Path(":memory:")).open()
