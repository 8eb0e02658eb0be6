"""Who the caller is. A server without keys knows one user, and takes whatever key comes."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request

from tinsmith.server.service import ServiceDep
from tinsmith.types.errors import Unsupported
from tinsmith.types.rest_admin import ApiKeyDetails, ApiKeyResponse, AuthTokenResponse, OrganizationDetails, UserDetails

router = APIRouter(tags=["identity"])

_LOCAL_KEY = ApiKeyResponse(
    key_id=0,
    name="any key",
    note="this server has no keys: it answers to this machine only, and takes any",
    details=ApiKeyDetails(org_details=OrganizationDetails(name="local"), user_details=UserDetails(email="local")),
)


def wants_identity_token(request: Request) -> bool:
    """The official SDK reads its identity from a token. Our own client sends its key as it is."""
    return not request.headers.get("user-agent", "").startswith("tinsmith/")


@router.post("/auth/token")
async def exchange_for_token(service: ServiceDep) -> AuthTokenResponse:
    """A token for an hour. Any key is exchanged, and any token or key is taken afterwards."""
    return AuthTokenResponse(jwt=service.control.signer.identity_token())


@router.get("/auth/apikey/me")
async def describe_key() -> ApiKeyResponse:
    """For `tinker auth login`, which stores the key if this succeeds."""
    return _LOCAL_KEY


@router.delete("/auth/apikey/me")
async def revoke_key() -> None:
    raise Unsupported("this server has no keys, so there is none to revoke; any key is accepted on this machine")
