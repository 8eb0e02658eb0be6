"""Deeds of an admin through a running server: the same methods as on its data folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from tinsmith.types.errors import InvalidInput, UserError

if TYPE_CHECKING:
    from tinsmith.control.identities import Key, Project, Quota, QuotaSubject, User
    from tinsmith.control.usage import UsageEvent

KEY_VARIABLE = "TINKER_API_KEY"
TIMEOUT_S = 30.0


class Refused(UserError):
    """The server's own words."""


class RemoteDeeds:
    def __init__(self, base_url: str) -> None:
        """With the key in `$TINKER_API_KEY`."""
        import httpx2

        key = os.environ.get(KEY_VARIABLE)
        if not key:
            raise InvalidInput(f"{KEY_VARIABLE} is not set: an admin's key goes there")
        self._http = httpx2.AsyncClient(
            base_url=base_url.rstrip("/") + "/api/v1/admin",
            headers={"X-API-Key": key},
            timeout=TIMEOUT_S,
            verify=_tls(os.environ.get("SSL_CERT_FILE")),
        )

    async def __aenter__(self) -> RemoteDeeds:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def _ask(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, **query: str | float | None
    ) -> Any:
        """Raises `Refused`, or `UserError` if no server of ours answers there."""
        import httpx2

        params = {name: value for name, value in query.items() if value is not None}
        try:
            answer = await self._http.request(method, path, json=body, params=params)
            content = answer.json()
        except (httpx2.HTTPError, ValueError) as error:
            raise UserError(f"no Tinsmith server answers at {str(self._http.base_url)!r}: {error}") from error
        if answer.is_error:
            raise Refused(str(content.get("detail", content)))
        return content

    # ---- users ----

    async def users(self) -> list[User]:
        return [_user(one) for one in await self._ask("GET", "/users")]

    async def create_user(self, user_id: str, role: str = "member", email: str | None = None) -> User:
        return _user(await self._ask("POST", "/users", {"user_id": user_id, "role": role, "email": email}))

    async def set_role(self, user_id: str, role: str) -> User:
        return _user(await self._ask("PUT", f"/users/{user_id}", {"role": role}))

    async def set_disabled(self, user_id: str, disabled: bool) -> User:
        return _user(await self._ask("PUT", f"/users/{user_id}", {"disabled": disabled}))

    # ---- keys ----

    async def keys(self, user_id: str | None = None) -> list[Key]:
        return [_key(one) for one in await self._ask("GET", "/keys", user_id=user_id)]

    async def create_key(
        self,
        user_id: str,
        *,
        scopes: list[str] | None = None,
        expires_in_s: float | None = None,
        project_id: str | None = None,
        note: str = "",
    ) -> tuple[str, Key]:
        body = {"user_id": user_id, "scopes": scopes, "expires_in_s": expires_in_s}
        made = await self._ask("POST", "/keys", body | {"project_id": project_id, "note": note})
        return made["secret"], _key(made["key"])

    async def revoke_key(self, key_id: int) -> Key:
        return _key(await self._ask("DELETE", f"/keys/{key_id}"))

    # ---- projects ----

    async def projects(self) -> list[Project]:
        return [_project(one) for one in await self._ask("GET", "/projects")]

    async def create_project(self, project_id: str, weight: float = 1.0) -> Project:
        return _project(await self._ask("POST", "/projects", {"project_id": project_id, "weight": weight}))

    async def set_weight(self, project_id: str, weight: float) -> Project:
        return _project(await self._ask("PUT", f"/projects/{project_id}", {"weight": weight}))

    async def add_member(self, project_id: str, user_id: str) -> Project:
        return _project(await self._ask("PUT", f"/projects/{project_id}/members/{user_id}"))

    async def remove_member(self, project_id: str, user_id: str) -> Project:
        return _project(await self._ask("DELETE", f"/projects/{project_id}/members/{user_id}"))

    # ---- quotas and usage ----

    async def quotas(self) -> dict[tuple[QuotaSubject, str], Quota]:
        from tinsmith.control.identities import Quota

        found = await self._ask("GET", "/quotas")
        return {(one["subject"], one["subject_id"]): Quota(**one["quota"]) for one in found}

    async def change_quota(self, subject: QuotaSubject, subject_id: str, **limits: int | None) -> Quota:
        from tinsmith.control.identities import Quota

        return Quota(**await self._ask("PUT", f"/quotas/{subject}/{subject_id}", limits))

    async def usage(self, start: float, end: float) -> list[UsageEvent]:
        from tinsmith.control.usage import UsageEvent

        return TypeAdapter(list[UsageEvent]).validate_python(await self._ask("GET", "/usage", start=start, end=end))


def _tls(certificates: str | None) -> Any:
    import ssl

    return ssl.create_default_context(cafile=certificates) if certificates else True


def _user(fields: dict[str, Any]) -> User:
    from tinsmith.control.identities import User

    return User(**fields)


def _key(fields: dict[str, Any]) -> Key:
    from tinsmith.control.identities import Key

    return Key(**fields | {"scopes": tuple(fields["scopes"])})


def _project(fields: dict[str, Any]) -> Project:
    from tinsmith.control.identities import Project

    return Project(**fields | {"member_ids": tuple(fields["member_ids"])})
