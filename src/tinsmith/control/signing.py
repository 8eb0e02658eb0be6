"""What the server vouches for: identity tokens, and links that work for a while without a key.

Both are keyed by the registry's secret, so they stay valid over restarts.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from dataclasses import dataclass

from tinsmith.control.identity import Clock
from tinsmith.types.errors import UserError

LOCAL_ORGANIZATION = "local"
LOCAL_USER = "tinsmith:user:local"
TOKEN_TTL_S = 3600


class LinkRefused(UserError):
    """A signed link that has expired, or that this server never signed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedLink:
    expires: int
    """Seconds since 1970."""
    signature: str


class Signer:
    def __init__(self, secret: bytes, clock: Clock) -> None:
        self._token_key = hashlib.blake2b(secret, person=b"tinsmith-tokens").digest()
        self._link_key = hashlib.blake2b(secret, person=b"tinsmith-links").digest()
        self._clock = clock

    def identity_token(self) -> str:
        """A JWT (RFC 7519, HS256) that says who the caller is; the official SDK reads `whoami` from it."""
        now = int(self._clock.time())
        claims = {
            "iss": "tinsmith",
            "sub": LOCAL_USER,
            "org_id": LOCAL_ORGANIZATION,
            "iat": now,
            "exp": now + TOKEN_TTL_S,
        }
        content = f"{_part({'alg': 'HS256', 'typ': 'JWT'})}.{_part(claims)}"
        return f"{content}.{_base64(hmac.digest(self._token_key, content.encode(), 'sha256'))}"

    def sign(self, resource: str, ttl_s: float) -> SignedLink:
        expires = int(self._clock.time() + ttl_s)
        return SignedLink(expires=expires, signature=self._signature(resource, expires))

    def check(self, resource: str, link: SignedLink) -> None:
        """Raises `LinkRefused`."""
        expected = self._signature(resource, link.expires).encode()
        if not hmac.compare_digest(expected, link.signature.encode("utf-8", "surrogatepass")):
            raise LinkRefused("the link's signature does not fit; ask for a new link")
        if link.expires <= self._clock.time():
            raise LinkRefused("the link has expired; ask for a new one")

    def _signature(self, resource: str, expires: int) -> str:
        return hmac.digest(self._link_key, f"{expires} {resource}".encode("utf-8", "surrogatepass"), "sha256").hex()


def _part(fields: dict[str, object]) -> str:
    return _base64(json.dumps(fields, separators=(",", ":")).encode())


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
