"""The data folder: room, speed, permissions, who uses it, and whether its databases are whole."""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
import statistics
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from tinsmith.cli.checks.finding import Finding, fail, ok, warn

_ROOM_LEAST = 64 * 2**20
_ROOM_WISHED = 5 * 2**30
_SYNCS = 15
_SLOW_SYNC_S = 0.02
_NO_SYNC_S = 20e-6
"""Faster than any disk: nothing is synced."""


def permissions(data_dir: Path) -> Iterator[Finding]:
    name = "data folder"
    folder = _nearest(data_dir)
    if not os.access(folder, os.W_OK | os.X_OK):
        yield fail(
            name, f"{folder} cannot be written", "give the server's user write permission, or another --data-dir"
        )
        return
    if folder != data_dir:
        yield ok(name, f"{data_dir} is made by the first server")
        return
    facts = data_dir.stat()
    found = f"{data_dir}, mode {stat.filemode(facts.st_mode)}"
    if facts.st_mode & stat.S_IWOTH:
        yield warn(name, found, f"others may change it: chmod o-w {data_dir}")
    elif facts.st_mode & (stat.S_IROTH | stat.S_IXOTH) == (stat.S_IROTH | stat.S_IXOTH):
        advice = f"others on this machine may read weights and data: chmod 750 {data_dir}"
        yield warn(name, found, advice) if hasattr(os, "getuid") else ok(name, found)
    else:
        yield ok(name, found)


def in_use(data_dir: Path) -> Iterator[Finding]:
    from tinsmith.control.data_lock import DataDirInUse, DataLock

    if not (data_dir / "lock").exists():
        yield ok("lock", "no server has used the folder")
        return
    lock = DataLock(data_dir)
    try:
        lock.acquire()
    except DataDirInUse:
        yield warn(
            "lock", "a server runs on this folder", "that is fine if it is yours; a second one needs another folder"
        )
        return
    lock.release()
    yield ok("lock", "free")


def disk(data_dir: Path) -> Iterator[Finding]:
    from tinsmith.control.health import sync_small_file

    folder = _nearest(data_dir)
    free = shutil.disk_usage(folder).free
    room = f"{free / 1e9:.1f} GB free"
    if free < _ROOM_LEAST:
        yield fail("disk space", room, f"free some space under {folder}: the server refuses work without it")
    elif free < _ROOM_WISHED:
        yield warn("disk space", room, "checkpoints and snapshots will soon fill it: make room, or set a disk budget")
    else:
        yield ok("disk space", room)
    probe = folder / f".doctor-{os.getpid()}"
    try:
        seconds = [_timed_sync(probe, sync_small_file) for _ in range(_SYNCS)]
    except OSError as error:
        yield fail("disk sync", f"fsync under {folder} failed: {error.strerror or error}", "replace the disk, or move")
        return
    finally:
        probe.unlink(missing_ok=True)
    yield _judge_sync(statistics.median(seconds), max(seconds))


def _timed_sync(path: Path, sync: object) -> float:
    began = time.perf_counter()
    assert callable(sync)
    sync(path)
    return time.perf_counter() - began


def _judge_sync(median_s: float, worst_s: float) -> Finding:
    found = f"fsync takes {1e3 * median_s:.2f} ms, at worst {1e3 * worst_s:.1f}"
    if median_s > _SLOW_SYNC_S:
        advice = "every request is acknowledged after an fsync: use a local SSD for --data-dir"
        return warn("disk sync", found, advice)
    if median_s < _NO_SYNC_S:
        advice = "that is memory, or a disk that only says it writes: a power failure would lose acknowledged work"
        return warn("disk sync", found, advice)
    return ok("disk sync", found)


def database(url: str) -> Iterator[Finding]:
    """The registry in PostgreSQL."""
    import sqlalchemy as sa

    from tinsmith.control import migrations
    from tinsmith.control.database import database_at
    from tinsmith.types.errors import TinsmithError

    advice = "start PostgreSQL, and look at host, user, password and name in --database"
    try:
        place = database_at(url)
    except TinsmithError as error:
        yield fail("registry", str(error), advice)
        return
    engine = place.make_engine(pooled=False)
    try:
        with engine.connect() as connection:
            began = time.perf_counter()
            connection.execute(sa.text("SELECT 1"))
            answer_s = time.perf_counter() - began
            yield _judge_schema(
                f"{place.label} answers in {1e3 * answer_s:.1f} ms", migrations.stored_version(connection)
            )
    except (sa.exc.SQLAlchemyError, TinsmithError) as error:
        why = str(getattr(error, "orig", None) or error).strip().splitlines()
        yield fail("registry", f"{place.label}: {why[0] if why else type(error).__name__}", advice)
    finally:
        engine.dispose()


def _judge_schema(found: str, version: int | None) -> Finding:
    from tinsmith.control import migrations

    newest = migrations.newest_version()
    if version is None:
        return ok("registry", f"{found}; the first server makes its tables")
    if version > newest:
        advice = f"a newer Tinsmith wrote it; this one knows schemas up to {newest}: upgrade"
        return fail("registry", f"{found}, schema {version}", advice)
    if version < newest:
        return ok("registry", f"{found}, schema {version}; the next start brings it to {newest}, after a copy")
    return ok("registry", f"{found}, schema {version}")


def registry(data_dir: Path) -> Iterator[Finding]:
    path = data_dir / "registry.sqlite3"
    if not path.exists():
        yield ok("registry", "none yet")
        return
    try:
        fault, (sessions, runs, checkpoints) = _look_into(path, ("sessions", "runs", "checkpoints"))
    except sqlite3.Error as error:
        yield fail("registry", f"cannot be read: {error}", f"stop the server; put a copy of {path} back")
        return
    if fault is not None:
        yield fail("registry", fault, f"stop the server; put a copy of {path} back")
        return
    found = f"whole: {sessions} sessions, {runs} runs, {checkpoints} checkpoints"
    yield _judge_schema(found, _registry_version(path))


def _registry_version(path: Path) -> int | None:
    import sqlalchemy as sa

    from tinsmith.control import migrations

    engine = sa.create_engine(f"sqlite:///file:{path}?mode=ro&uri=true")
    try:
        with engine.connect() as connection:
            return migrations.stored_version(connection)
    finally:
        engine.dispose()


def ledger(data_dir: Path) -> Iterator[Finding]:
    from tinsmith.control.ledger_codec import decode

    path = data_dir / "ledger.sqlite3"
    if not path.exists():
        yield ok("ledger", "none yet")
        return
    advice = f"stop the server and move {path} away: what waited is lost, checkpoints are not"
    try:
        fault, (entries,) = _look_into(path, ("entries",))
        if fault is None:
            with closing(_read_only(path)) as connection:
                for name, payload in connection.execute("SELECT name, payload FROM entries"):
                    try:
                        decode(payload)
                    except Exception as error:  # noqa: BLE001 - whatever a broken payload raises is what is asked for
                        fault = f"entry {name!r} cannot be read: {error}"
                        break
    except sqlite3.Error as error:
        fault, entries = f"cannot be read: {error}", 0
    yield ok("ledger", f"whole, {entries} entries to go on with") if fault is None else fail("ledger", fault, advice)


def _look_into(path: Path, tables: tuple[str, ...]) -> tuple[str | None, tuple[int, ...]]:
    """What SQLite's own check says, if it complains, and how many rows tables have. Raises `sqlite3.Error`."""
    with closing(_read_only(path)) as connection:
        (said,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if said != "ok":
            return f"is damaged: {said}", tuple(0 for _ in tables)
        return None, tuple(connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in tables)


def _read_only(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=5)


def _nearest(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    return next(place for place in (folder, *folder.parents) if place.exists())
