"""One route per deed. Control refuses whoever is no admin, whatever the route."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field

from tinsmith.control.administration import MAX_LIFE_S
from tinsmith.control.identities import Key, Project, Quota, QuotaSubject, User
from tinsmith.control.usage import UsageEvent
from tinsmith.server.service import ServiceDep

PREFIX = "/api/v1/admin"
router = APIRouter(tags=["accounts"], prefix=PREFIX)

KeyId = Annotated[int, Field(ge=0, lt=2**31)]
Moment = Annotated[float, Query(ge=0, lt=1e11)]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class NewUser(_Body):
    user_id: str
    role: str = "member"
    email: str | None = None


class UserChange(_Body):
    """What is left out stays."""

    role: str | None = None
    disabled: bool | None = None


class NewKey(_Body):
    user_id: str
    scopes: list[str] | None = None
    """Without, all that the user's role allows."""
    expires_in_s: float | None = Field(default=None, gt=0, lt=MAX_LIFE_S)
    project_id: str | None = None
    note: str = Field(default="", max_length=1000)


class MadeKey(BaseModel):
    secret: str
    """Told this once."""
    key: Key


class NewProject(_Body):
    project_id: str
    weight: float = 1.0


class ProjectChange(_Body):
    weight: float


class Limits(_Body):
    """What is left out stays; null takes a limit away."""

    tokens_per_minute: int | None = None
    live_models: int | None = None
    concurrent_samples: int | None = None
    disk_bytes: int | None = None


class QuotaEntry(BaseModel):
    subject: QuotaSubject
    subject_id: str
    quota: Quota


# ---- users ----


@router.get("/users")
async def list_users(service: ServiceDep) -> list[User]:
    return await service.control.administration.users()


@router.post("/users")
async def create_user(body: NewUser, service: ServiceDep) -> User:
    return await service.control.administration.create_user(body.user_id, body.role, body.email)


@router.put("/users/{user_id}")
async def change_user(user_id: str, body: UserChange, service: ServiceDep) -> User:
    """Of a disabled user no key works; what it owns stays."""
    deeds = service.control.administration
    user = await deeds.user(user_id)
    if body.role is not None:
        user = await deeds.set_role(user_id, body.role)
    if body.disabled is not None:
        user = await deeds.set_disabled(user_id, body.disabled)
    return user


# ---- keys ----


@router.get("/keys")
async def list_keys(service: ServiceDep, user_id: Annotated[str | None, Query()] = None) -> list[Key]:
    """Without the keys themselves, which are kept nowhere."""
    return await service.control.administration.keys(user_id)


@router.post("/keys")
async def create_key(body: NewKey, service: ServiceDep) -> MadeKey:
    secret, key = await service.control.administration.create_key(
        body.user_id,
        scopes=body.scopes,
        expires_in_s=body.expires_in_s,
        project_id=body.project_id,
        note=body.note,
    )
    return MadeKey(secret=secret, key=key)


@router.delete("/keys/{key_id}")
async def revoke_key(key_id: KeyId, service: ServiceDep) -> Key:
    """For good, and at once."""
    return await service.control.administration.revoke_key(key_id)


# ---- projects ----


@router.get("/projects")
async def list_projects(service: ServiceDep) -> list[Project]:
    return await service.control.administration.projects()


@router.post("/projects")
async def create_project(body: NewProject, service: ServiceDep) -> Project:
    return await service.control.administration.create_project(body.project_id, body.weight)


@router.put("/projects/{project_id}")
async def set_project_weight(project_id: str, body: ProjectChange, service: ServiceDep) -> Project:
    return await service.control.administration.set_weight(project_id, body.weight)


@router.put("/projects/{project_id}/members/{user_id}")
async def add_member(project_id: str, user_id: str, service: ServiceDep) -> Project:
    return await service.control.administration.add_member(project_id, user_id)


@router.delete("/projects/{project_id}/members/{user_id}")
async def remove_member(project_id: str, user_id: str, service: ServiceDep) -> Project:
    return await service.control.administration.remove_member(project_id, user_id)


# ---- quotas and usage ----


@router.get("/quotas")
async def list_quotas(service: ServiceDep) -> list[QuotaEntry]:
    found = await service.control.administration.quotas()
    return [QuotaEntry(subject=kind, subject_id=name, quota=quota) for (kind, name), quota in found.items()]


@router.put("/quotas/{subject}/{subject_id}")
async def change_quota(subject: QuotaSubject, subject_id: str, body: Limits, service: ServiceDep) -> Quota:
    limits = body.model_dump(exclude_unset=True)
    return await service.control.administration.change_quota(subject, subject_id, **limits)


@router.get("/usage")
async def usage(service: ServiceDep, start: Moment, end: Moment) -> list[UsageEvent]:
    """Per hour, session and base model, with user and project; seconds since 1970, whole hours."""
    return await service.control.administration.usage(start, end)
