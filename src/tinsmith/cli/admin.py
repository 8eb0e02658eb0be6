"""`tinsmith admin`: users, keys, projects, quotas and usage, on a server's data folder or through the server itself."""

from __future__ import annotations

import asyncio
import os
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, TypeVar

import typer

from tinsmith.cli.answers import AsJson, Yes, confirm, done, show

if TYPE_CHECKING:
    from tinsmith.cli.admin_http import RemoteDeeds
    from tinsmith.control.administration import Deeds
    from tinsmith.control.identities import Key, QuotaSubject

T = TypeVar("T")

HELP = "Users, keys, projects, quotas and usage of a server."
app = typer.Typer(add_completion=False, no_args_is_help=True, help=HELP)
users = typer.Typer(add_completion=False, no_args_is_help=True, help="Who may use the server.")
keys = typer.Typer(add_completion=False, no_args_is_help=True, help="Keys: shown once, kept as hashes.")
projects = typer.Typer(add_completion=False, no_args_is_help=True, help="Projects, their members and shares.")
quotas = typer.Typer(add_completion=False, no_args_is_help=True, help="Limits of users and projects.")
for _name, _group in (("users", users), ("keys", keys), ("projects", projects), ("quotas", quotas)):
    app.add_typer(_group, name=_name)

DataDir: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--data-dir", help="The server's data folder. Default: $TINSMITH_DATA_DIR or ~/.local/share/tinsmith."
    ),
]
ServerUrl: TypeAlias = Annotated[
    str | None,
    typer.Option("--base-url", help="Ask a running server instead, with an admin's key in TINKER_API_KEY."),
]
UserName: TypeAlias = Annotated[str, typer.Argument(metavar="USER")]
ProjectName: TypeAlias = Annotated[str, typer.Argument(metavar="PROJECT")]
RoleName: TypeAlias = Annotated[str, typer.Option("--role", help="admin, member, or viewer, who may only read.")]

_DAY_S = 86_400
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": _DAY_S}
_BYTES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def _run(data_dir: Path | None, base_url: str | None, deed: Callable[[Deeds | RemoteDeeds], Awaitable[T]]) -> T:
    async def run() -> T:
        async with _office(data_dir, base_url) as deeds:
            return await deed(deeds)

    return asyncio.run(run())


@asynccontextmanager
async def _office(data_dir: Path | None, base_url: str | None) -> AsyncIterator[Deeds | RemoteDeeds]:
    if base_url is not None:
        from tinsmith.cli.admin_http import RemoteDeeds

        async with RemoteDeeds(base_url) as remote:
            yield remote
        return
    from tinsmith.control.administration import Deeds
    from tinsmith.control.identity import SystemClock
    from tinsmith.control.registry import Registry
    from tinsmith.server.assemble import DATABASE_VARIABLE, default_data_dir
    from tinsmith.types.errors import UserError

    if os.environ.get(DATABASE_VARIABLE):
        raise UserError(
            f"{DATABASE_VARIABLE} is set: the registry is in PostgreSQL, which only the server itself changes; give "
            "--base-url. A server on 127.0.0.1 that has no keys yet takes any TINKER_API_KEY"
        )
    folder = data_dir or default_data_dir()
    folder.mkdir(parents=True, exist_ok=True)
    registry = Registry(folder / "registry.sqlite3")
    await asyncio.to_thread(registry.open)
    try:
        yield Deeds(registry, SystemClock())
    finally:
        await asyncio.to_thread(registry.close)


# ---- users ----

_USER_COLUMNS = {"user_id": "user", "role": "role", "email": "e-mail", "created": "created", "status": "status"}


def _user_row(user: Any) -> dict[str, Any]:
    status = "active" if user.disabled_at is None else "disabled"
    return {**asdict(user), "created": _moment(user.created_at), "status": status}


def _moment(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)


@users.command("list")
def list_users(as_json: AsJson = False, data_dir: DataDir = None, base_url: ServerUrl = None) -> None:
    """List users."""
    found = _run(data_dir, base_url, lambda deeds: deeds.users())
    show([_user_row(user) for user in found], _USER_COLUMNS, as_json=as_json, empty="no users")


@users.command("create")
def create_user(
    user_id: UserName,
    role: RoleName = "member",
    email: Annotated[str | None, typer.Option(help="Shown by `tinker auth whoami`.")] = None,
    as_json: AsJson = False,
    data_dir: DataDir = None,
    base_url: ServerUrl = None,
) -> None:
    """Make a user; a key for it is made by `keys create`."""
    user = _run(data_dir, base_url, lambda deeds: deeds.create_user(user_id, role, email))
    done(f"user {user.user_id}, {user.role}", as_json=as_json, **asdict(user))


@users.command("role")
def set_role(
    user_id: UserName,
    role: Annotated[str, typer.Argument(metavar="ROLE", help="admin, member or viewer.")],
    data_dir: DataDir = None,
    base_url: ServerUrl = None,
) -> None:
    """Change what a user may do; its keys follow within a second."""
    user = _run(data_dir, base_url, lambda deeds: deeds.set_role(user_id, role))
    done(f"user {user.user_id} is {user.role} now")


@users.command("disable")
def disable_user(user_id: UserName, yes: Yes = False, data_dir: DataDir = None, base_url: ServerUrl = None) -> None:
    """Refuse all keys of a user, from now on; what it owns stays."""
    confirm(f"Refuse all keys of user {user_id}?", yes=yes)
    _run(data_dir, base_url, lambda deeds: deeds.set_disabled(user_id, True))
    done(f"user {user_id} is disabled")


@users.command("enable")
def enable_user(user_id: UserName, data_dir: DataDir = None, base_url: ServerUrl = None) -> None:
    """Take the keys of a disabled user again."""
    _run(data_dir, base_url, lambda deeds: deeds.set_disabled(user_id, False))
    done(f"user {user_id} is enabled")


# ---- keys ----

_KEY_COLUMNS = {
    "key_id": "id",
    "prefix": "begins with",
    "user_id": "user",
    "scopes": "scopes",
    "project_id": "project",
    "note": "note",
    "created": "created",
    "expires": "expires",
    "status": "status",
}


def _key_row(key: Key) -> dict[str, Any]:
    fields = asdict(key) | {"scopes": list(key.scopes), "status": key.status(time.time())}
    return {**fields, "created": _moment(key.created_at), "expires": _moment(key.expires_at)}


@keys.command("list")
def list_keys(
    user: Annotated[str | None, typer.Option("--user", help="Of this user only.")] = None,
    as_json: AsJson = False,
    data_dir: DataDir = None,
    base_url: ServerUrl = None,
) -> None:
    """List keys, oldest first; what is shown is their beginning."""
    found = _run(data_dir, base_url, lambda deeds: deeds.keys(user))
    show([_key_row(key) for key in found], _KEY_COLUMNS, as_json=as_json, empty="no keys")


@keys.command("create")
def create_key(
    user_id: UserName,
    scope: Annotated[
        list[str] | None,
        typer.Option(help="read, train, sample or admin; repeatable. Default: all that the user's role allows."),
    ] = None,
    expires_in: Annotated[str | None, typer.Option(metavar="TIME", help="30d, 12h, 90m. Default: never.")] = None,
    project: Annotated[str | None, typer.Option(help="Of sessions made with it that name none.")] = None,
    note: Annotated[str, typer.Option(help="What it is for.")] = "",
    as_json: AsJson = False,
    data_dir: DataDir = None,
    base_url: ServerUrl = None,
) -> None:
    """Make a key and print it, this once."""
    expires_in_s = None if expires_in is None else _seconds(expires_in)
    secret, key = _run(
        data_dir,
        base_url,
        lambda deeds: deeds.create_key(
            user_id, scopes=scope or None, expires_in_s=expires_in_s, project_id=project, note=note
        ),
    )
    if as_json:
        done("", as_json=True, secret=secret, **_key_row(key))
        return
    typer.echo(secret)
    typer.echo(f"key {key.key_id} of user {key.user_id}; it is shown this once, keep it", err=True)


@keys.command("revoke")
def revoke_key(
    key_id: Annotated[int, typer.Argument(metavar="ID", min=0, max=2**31 - 1, help="As `keys list` tells.")],
    yes: Yes = False,
    data_dir: DataDir = None,
    base_url: ServerUrl = None,
) -> None:
    """End a key for good; a running server refuses it within a second."""
    confirm(f"Revoke key {key_id} for good?", yes=yes)
    key = _run(data_dir, base_url, lambda deeds: deeds.revoke_key(key_id))
    done(f"key {key.key_id} ({key.prefix}…) of user {key.user_id} is revoked")


def _seconds(text: str) -> float:
    number, unit = text[:-1], text[-1:]
    if unit not in _UNITS or not number.isdecimal() or int(number) == 0:
        raise typer.BadParameter(f"--expires-in {text!r} must be a number and one of s, m, h, d, like 30d")
    return float(int(number) * _UNITS[unit])


# ---- projects ----

_PROJECT_COLUMNS = {"project_id": "project", "weight": "weight", "member_ids": "members", "created": "created"}


def _project_row(project: Any) -> dict[str, Any]:
    return {**asdict(project), "member_ids": list(project.member_ids), "created": _moment(project.created_at)}


@projects.command("list")
def list_projects(as_json: AsJson = False, data_dir: DataDir = None, base_url: ServerUrl = None) -> None:
    """List projects and who belongs to them."""
    found = _run(data_dir, base_url, lambda deeds: deeds.projects())
    show([_project_row(project) for project in found], _PROJECT_COLUMNS, as_json=as_json, empty="no projects")


@projects.command("create")
def create_project(
    project_id: ProjectName,
    weight: Annotated[float, typer.Option(help="Its share of the engines beside other projects that have work.")] = 1.0,
    as_json: AsJson = False,
    data_dir: DataDir = None,
    base_url: ServerUrl = None,
) -> None:
    """Make a project."""
    project = _run(data_dir, base_url, lambda deeds: deeds.create_project(project_id, weight))
    done(f"project {project.project_id}, weight {project.weight:g}", as_json=as_json, **asdict(project))


@projects.command("weight")
def set_weight(
    project_id: ProjectName,
    weight: Annotated[float, typer.Argument(metavar="WEIGHT")],
    data_dir: DataDir = None,
    base_url: ServerUrl = None,
) -> None:
    """Change a project's share."""
    project = _run(data_dir, base_url, lambda deeds: deeds.set_weight(project_id, weight))
    done(f"project {project.project_id} has weight {project.weight:g} now")


@projects.command("add-member")
def add_member(
    project_id: ProjectName, user_id: UserName, data_dir: DataDir = None, base_url: ServerUrl = None
) -> None:
    """Let a user work in a project."""
    _run(data_dir, base_url, lambda deeds: deeds.add_member(project_id, user_id))
    done(f"user {user_id} is a member of project {project_id}")


@projects.command("remove-member")
def remove_member(
    project_id: ProjectName, user_id: UserName, data_dir: DataDir = None, base_url: ServerUrl = None
) -> None:
    """Take a user out of a project; its sessions there stay."""
    _run(data_dir, base_url, lambda deeds: deeds.remove_member(project_id, user_id))
    done(f"user {user_id} is no member of project {project_id} any more")


# ---- quotas ----

_LIMITS = ("tokens_per_minute", "live_models", "concurrent_samples", "disk_bytes")
_QUOTA_COLUMNS = {"subject": "of", "subject_id": "name"} | {name: name.replace("_", " ") for name in _LIMITS}
Limit: TypeAlias = Annotated[str | None, typer.Option(metavar="NUMBER|none")]


@quotas.command("list")
def list_quotas(as_json: AsJson = False, data_dir: DataDir = None, base_url: ServerUrl = None) -> None:
    """List the limits that are set."""
    found = _run(data_dir, base_url, lambda deeds: deeds.quotas())
    rows = [{"subject": kind, "subject_id": name, **asdict(quota)} for (kind, name), quota in found.items()]
    show(rows, _QUOTA_COLUMNS, as_json=as_json, empty="no quotas")


@quotas.command("set")
def set_quota(
    subject: Annotated[str, typer.Argument(metavar="user|project")],
    name: Annotated[str, typer.Argument(metavar="NAME")],
    tokens_per_minute: Limit = None,
    live_models: Limit = None,
    concurrent_samples: Limit = None,
    disk_bytes: Limit = None,
    data_dir: DataDir = None,
    base_url: ServerUrl = None,
) -> None:
    """Set limits; those not named stay, `none` takes one away. 10G is 10,000,000,000."""
    given = zip(_LIMITS, (tokens_per_minute, live_models, concurrent_samples, disk_bytes), strict=True)
    limits = {limit: _amount(limit, text) for limit, text in given if text is not None}
    if not limits:
        raise typer.BadParameter("name at least one limit, like --live-models 4")
    kind = _subject(subject)
    quota = _run(data_dir, base_url, lambda deeds: deeds.change_quota(kind, name, **limits))
    told = ", ".join(f"{key.replace('_', ' ')} {'unlimited' if v is None else v}" for key, v in asdict(quota).items())
    done(f"{kind} {name}: {told}")


def _subject(text: str) -> QuotaSubject:
    if text == "user":
        return "user"
    if text == "project":
        return "project"
    raise typer.BadParameter(f"{text!r} has no quota; users and projects have")


def _amount(limit: str, text: str) -> int | None:
    if text == "none":
        return None
    unit = text[-1:] if not text[-1:].isdecimal() else ""
    number = text.removesuffix(unit) if unit else text
    if unit not in _BYTES or not number.isdecimal():
        raise typer.BadParameter(f"{limit} {text!r} must be a number, with k, M, G or T if you like, or none")
    return int(number) * _BYTES[unit]


# ---- usage ----

_USAGE_COLUMNS = {
    "user_id": "user",
    "project_id": "project",
    "base_model": "base model",
    "training": "trained",
    "prefill": "prefilled",
    "cached_prefill": "from cache",
    "sampled": "sampled",
    "checkpoint": "checkpoints",
    "storage": "GB hours",
}


@app.command("usage")
def usage(
    days: Annotated[int, typer.Option(min=1, max=3660, help="Of so many days up to now.")] = 30,
    as_json: AsJson = False,
    data_dir: DataDir = None,
    base_url: ServerUrl = None,
) -> None:
    """Tokens, checkpoints and storage per user, project and base model."""
    end = time.time() // 3600 * 3600 + 3600
    events = _run(data_dir, base_url, lambda deeds: deeds.usage(end - days * _DAY_S, end))
    totals: dict[tuple[str, str, str], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for event in events:
        totals[event.user_id, event.project_id or "", event.base_model][event.kind] += event.amount
    rows = [
        {"user_id": user, "project_id": project or None, "base_model": model, **_rounded(amounts)}
        for (user, project, model), amounts in sorted(totals.items())
    ]
    show(rows, _USAGE_COLUMNS, as_json=as_json, empty="nothing was used")


def _rounded(amounts: dict[str, float]) -> dict[str, float | int]:
    return {kind: round(amount, 3) if kind == "storage" else int(amount) for kind, amount in amounts.items()}
