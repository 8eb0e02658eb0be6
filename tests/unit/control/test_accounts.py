"""Users, keys, projects and quotas: what is kept, who a key is, and how soon a change is seen."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from tinsmith.control import account_records as rows
from tinsmith.control.accounts import Accounts
from tinsmith.control.errors import Unauthorized
from tinsmith.control.identities import LOCAL, SCOPES, Quota, check_name, check_role, check_scopes
from tinsmith.control.registry import METADATA, Registry
from tinsmith.types.errors import AlreadyExists, InvalidInput, NotFound

pytestmark = pytest.mark.anyio
ON_BOTH_DATABASES = True


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now


class House:
    def __init__(self, path: Path | str) -> None:
        self.path = path
        self.clock = Clock()
        self.registry = Registry(path)
        self.registry.open()
        self.accounts = Accounts(self.registry, self.clock, poll_s=0.02)

    async def change(self, function: Any, *args: Any, **values: Any) -> Any:
        result = await self.registry.write(lambda c: function(c, *args, **values))
        await self.accounts.refresh()
        return result

    async def new_key(self, user_id: str = "anna", **values: Any) -> tuple[str, rows.Key]:
        given = {"scopes": SCOPES, "at": self.clock.now} | values
        made: tuple[str, rows.Key] = await self.change(rows.create_key, user_id, **given)
        return made


@pytest.fixture
async def house(tmp_path: Path, database: str | None) -> AsyncIterator[House]:
    made = House(database or tmp_path / "registry.sqlite3")
    await made.accounts.start()
    yield made
    await made.accounts.close()
    made.registry.close()


async def _anna(house: House, role: str = "member") -> None:
    await house.change(rows.create_user, "anna", role=role, email=None, at=1.0)


async def test_without_keys_everyone_is_the_local_user(house: House) -> None:
    assert house.accounts.authenticate(None) is LOCAL
    assert house.accounts.authenticate("whatever") is LOCAL
    await _anna(house)
    assert house.accounts.authenticate(None) is LOCAL


async def test_from_the_first_key_on_everyone_needs_one(house: House) -> None:
    await _anna(house)
    secret, key = await house.new_key()
    assert house.accounts.authenticate(secret).user_id == "anna"
    for other in (None, "", "tml-other", secret + "0", secret[:-1]):
        with pytest.raises(Unauthorized):
            house.accounts.authenticate(other)
    with pytest.raises(Unauthorized):
        house.accounts.caller(None)
    await house.change(rows.revoke_key, key.key_id, 2.0)
    with pytest.raises(Unauthorized, match="revoked"):
        house.accounts.authenticate(secret)
    with pytest.raises(Unauthorized):
        house.accounts.authenticate(None)


def _everything(connection: sa.Connection) -> bytes:
    return repr([list(connection.execute(sa.select(table))) for table in METADATA.sorted_tables]).encode()


async def test_a_key_is_random_and_kept_nowhere(house: House) -> None:
    await _anna(house)
    secrets = {(await house.new_key())[0] for _ in range(20)}
    assert len(secrets) == 20
    assert all(secret.startswith("tml-") and len(secret) == 4 + 48 for secret in secrets)
    await house.registry.flush()
    if isinstance(house.path, Path):
        stored = b"".join(path.read_bytes() for path in house.path.parent.iterdir())
    else:
        stored = await house.registry.read(_everything)
    assert not any(secret[4 + 8 :].encode() in stored for secret in secrets)


async def test_a_key_ends_at_its_moment(house: House) -> None:
    await _anna(house)
    secret, key = await house.new_key(expires_at=1010.0)
    house.clock.now = 1009.9
    assert house.accounts.authenticate(secret).key_id == key.key_id
    house.clock.now = 1010.0
    with pytest.raises(Unauthorized, match="expired"):
        house.accounts.authenticate(secret)
    with pytest.raises(Unauthorized, match="expired"):
        house.accounts.caller(key.key_id)


async def test_a_change_of_another_process_is_seen_without_being_told(house: House) -> None:
    await _anna(house)
    secret, key = await house.new_key()
    other = Registry(house.path)
    other.open(beside=True)
    await other.write(lambda c: rows.revoke_key(c, key.key_id, 5.0))
    for _ in range(200):
        await asyncio.sleep(0.02)
        try:
            house.accounts.authenticate(secret)
        except Unauthorized:
            break
    else:
        pytest.fail("the revoked key still works")
    other.close()


async def test_scopes_are_those_that_key_and_role_both_allow(house: House) -> None:
    await _anna(house, "viewer")
    secret, _ = await house.new_key()
    assert house.accounts.authenticate(secret).scopes == {"read"}
    await house.change(rows.change_user, "anna", role="admin")
    assert house.accounts.authenticate(secret).scopes == set(SCOPES)
    narrow, _ = await house.new_key(scopes=("sample",))
    assert house.accounts.authenticate(narrow).scopes == {"sample"}


async def test_a_disabled_user_has_no_working_key(house: House) -> None:
    await _anna(house)
    secret, _ = await house.new_key()
    await house.change(rows.change_user, "anna", disabled_at=3.0)
    with pytest.raises(Unauthorized, match="disabled"):
        house.accounts.authenticate(secret)
    await house.change(rows.change_user, "anna", disabled_at=None)
    assert house.accounts.authenticate(secret).user_id == "anna"


async def test_quotas_and_weights_are_read_from_memory(house: House) -> None:
    await _anna(house)
    await house.change(rows.create_project, "evals", weight=3.0, at=1.0)
    assert house.accounts.weight_of("evals") == 3.0
    assert house.accounts.weight_of(None) == house.accounts.weight_of("some label") == 1.0
    assert house.accounts.quota_of_user("anna") == house.accounts.quota_of_project("evals") == Quota()
    await house.change(rows.set_quota, "user", "anna", Quota(tokens_per_minute=1000))
    await house.change(rows.set_quota, "project", "evals", Quota(live_models=2, disk_bytes=10**12))
    assert house.accounts.quota_of_user("anna") == Quota(tokens_per_minute=1000)
    assert house.accounts.quota_of_project("evals") == Quota(live_models=2, disk_bytes=10**12)
    await house.change(rows.set_weight, "evals", 0.5)
    assert house.accounts.weight_of("evals") == 0.5


async def test_projects_have_members_and_keys_may_name_one(house: House) -> None:
    await _anna(house)
    await house.change(rows.create_project, "evals", weight=1.0, at=1.0)
    with pytest.raises(InvalidInput, match="no member"):
        await house.new_key(project_id="evals")
    await house.change(rows.add_member, "evals", "anna", 1.0)
    await house.change(rows.add_member, "evals", "anna", 1.0)
    secret, _ = await house.new_key(project_id="evals")
    caller = house.accounts.authenticate(secret)
    assert (caller.project_id, caller.project_ids) == ("evals", {"evals"})
    await house.change(rows.remove_member, "evals", "anna")
    assert house.accounts.authenticate(secret).project_ids == frozenset()


@pytest.mark.parametrize(
    ("error", "function", "args", "values"),
    [
        (AlreadyExists, rows.create_user, ("anna",), {"role": "member", "email": None, "at": 1.0}),
        (InvalidInput, rows.create_user, ("local",), {"role": "member", "email": None, "at": 1.0}),
        (InvalidInput, rows.create_user, ("Anna B",), {"role": "member", "email": None, "at": 1.0}),
        (NotFound, rows.change_user, ("ben",), {"role": "admin"}),
        (NotFound, rows.create_key, ("ben",), {"scopes": SCOPES, "at": 1.0}),
        (InvalidInput, rows.create_key, ("anna",), {"scopes": SCOPES, "expires_at": 0.5, "at": 1.0}),
        (NotFound, rows.revoke_key, (7, 1.0), {}),
        (InvalidInput, rows.create_project, ("evals",), {"weight": 0.0, "at": 1.0}),
        (NotFound, rows.add_member, ("evals", "anna", 1.0), {}),
        (NotFound, rows.set_quota, ("project", "evals", Quota()), {}),
        (InvalidInput, rows.set_quota, ("user", "anna", Quota(live_models=-1)), {}),
    ],
)
async def test_what_cannot_be_done_is_refused(
    house: House, error: type[Exception], function: Any, args: tuple[Any, ...], values: dict[str, Any]
) -> None:
    await _anna(house)
    with pytest.raises(error):
        await house.change(function, *args, **values)


def test_names_roles_and_scopes_are_checked() -> None:
    assert check_name("user", "anna@example.org") == "anna@example.org"
    assert check_scopes(["sample", "read", "read"]) == ("read", "sample")
    for call in (lambda: check_scopes([]), lambda: check_scopes(["write"]), lambda: check_role("root")):
        with pytest.raises(InvalidInput):
            call()


async def test_a_key_that_is_revoked_while_accounts_are_read_is_refused(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    await house.accounts.close()
    await house.change(rows.create_user, "anna", role="member", email=None, at=1000.0)
    secret, key = await house.new_key()
    await house.registry.write(lambda c: rows.create_project(c, "p", weight=1.0, at=1000.0))
    read_version = rows.version
    num_looks = 0

    def version(connection: sa.Connection) -> int:
        nonlocal num_looks
        num_looks += 1
        if num_looks == 2:  # the first saw that there is something to read
            house.registry._enqueue(lambda c: rows.revoke_key(c, key.key_id, 1000.0)).result(timeout=5)
        return read_version(connection)

    monkeypatch.setattr(rows, "version", version)
    await house.accounts.refresh()
    await house.accounts.refresh()
    assert num_looks > 2
    with pytest.raises(Unauthorized, match="revoked"):
        house.accounts.authenticate(secret)
