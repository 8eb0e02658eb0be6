"""Who the caller is. A server without keys knows one user, and takes whatever key comes."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request

from tinsmith.control.identities import Caller, Key
from tinsmith.control.signing import ORGANIZATION
from tinsmith.server.service import ServiceDep
from tinsmith.types.rest_admin import ApiKeyDetails, ApiKeyResponse, AuthTokenResponse, OrganizationDetails, UserDetails

router = APIRouter(tags=["identity"])

_LOCAL_NOTE = "this server has no keys: it answers to this machine only, and takes any"


def wants_identity_token(request: Request) -> bool:
    """The official SDK reads its identity from a token. Our own client sends its key as it is."""
    return not request.headers.get("user-agent", "").startswith("tinsmith/")


@router.post("/auth/token")
async def exchange_for_token(service: ServiceDep) -> AuthTokenResponse:
    """A token for an hour, or for as long as the key lasts: it ends with the key."""
    return AuthTokenResponse(jwt=service.identity_token())


@router.get("/auth/apikey/me")
async def describe_key(service: ServiceDep) -> ApiKeyResponse:
    """For `tinker auth login`, which stores the key if this succeeds."""
    caller = service.control.caller
    if caller.key_id is None:
        return _described(caller, key_id=0, name="any key", note=_LOCAL_NOTE)
    key = service.control.own_key.describe()
    return _described(caller, key_id=key.key_id, name=key.prefix, note=_note(key))


def _note(key: Key) -> str:
    return key.note or f"scopes: {', '.join(key.scopes)}"


def _described(caller: Caller, *, key_id: int, name: str, note: str) -> ApiKeyResponse:
    details = ApiKeyDetails(
        org_details=OrganizationDetails(name=ORGANIZATION),
        user_details=UserDetails(email=caller.email or caller.user_id),
    )
    return ApiKeyResponse(key_id=key_id, name=name, note=note, details=details)


@router.delete("/auth/apikey/me")
async def revoke_key(service: ServiceDep) -> None:
    """For good: it works no more from now on."""
    await service.control.own_key.revoke()
