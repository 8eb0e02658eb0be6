"""What the server vouches for: tokens given for keys, and links that work for a while without a key.

Both are signed with the registry's secret, so they stay valid over restarts, and both name the key they were given for:
they end with it.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import math
from dataclasses import dataclass

from tinsmith.control.errors import Unauthorized
from tinsmith.control.identities import Caller
from tinsmith.control.identity import Clock
from tinsmith.types.errors import UserError

ORGANIZATION = "local"
TOKEN_TTL_S = 3600
TOKEN_START = "eyJ"
MAX_TOKEN_CHARACTERS = 4096
_USER_START = "tinsmith:user:"
_KEY_CLAIM = "key_id"


def user_urn(user_id: str) -> str:
    """How the official SDK names users."""
    return _USER_START + user_id


def user_of_urn(urn: str) -> str:
    return urn.removeprefix(_USER_START)


class LinkRefused(UserError):
    """A signed link that has expired, or that this server never signed, or whose key has ended."""


class TokenRefused(Unauthorized):
    """A token that has expired, or that this server never signed: its key may still be exchanged for another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedLink:
    expires: int
    """Seconds since 1970."""
    key_id: int | None
    """Of the key it was given for; `None` on a server without keys."""
    signature: str


class Signer:
    def __init__(self, secret: bytes, clock: Clock) -> None:
        self._token_key = hashlib.blake2b(secret, person=b"tinsmith-tokens").digest()
        self._link_key = hashlib.blake2b(secret, person=b"tinsmith-links").digest()
        self._clock = clock

    # ---- tokens ----

    def identity_token(self, caller: Caller, expires_at: float | None = None) -> str:
        """A JWT (RFC 7519, HS256) that stands for the caller's key and says whose it is; the official SDK reads
        `whoami` from it. It lasts an hour, and no longer than `expires_at`."""
        now = int(self._clock.time())
        claims: dict[str, object] = {
            "iss": "tinsmith",
            "sub": user_urn(caller.user_id),
            "org_id": ORGANIZATION,
            "iat": now,
            "exp": min(now + TOKEN_TTL_S, math.ceil(expires_at) if expires_at is not None else now + TOKEN_TTL_S),
            _KEY_CLAIM: caller.key_id,
        }
        if caller.email is not None:
            claims["email"] = caller.email
        content = f"{_part({'alg': 'HS256', 'typ': 'JWT'})}.{_part(claims)}"
        return f"{content}.{self._token_signature(content)}"

    def key_of_token(self, token: str) -> int | None:
        """The id of the key it was given for; `None` for one of a server without keys. Raises `TokenRefused`."""
        content, _, signature = token.rpartition(".")
        if len(token) > MAX_TOKEN_CHARACTERS or not hmac.compare_digest(
            self._token_signature(content).encode(), signature.encode("utf-8", "surrogatepass")
        ):
            raise TokenRefused("this token was not given by this server; exchange your key for another")
        claims = json.loads(_unbase64(content.partition(".")[2]))
        if claims["exp"] <= self._clock.time():
            raise TokenRefused("this token has expired; exchange your key for another")
        key_id = claims.get(_KEY_CLAIM)
        return key_id if isinstance(key_id, int) else None

    def _token_signature(self, content: str) -> str:
        return _base64(hmac.digest(self._token_key, content.encode("utf-8", "surrogatepass"), "sha256"))

    # ---- links ----

    def sign(self, resource: str, ttl_s: float, key_id: int | None) -> SignedLink:
        expires = int(self._clock.time() + ttl_s)
        return SignedLink(expires=expires, key_id=key_id, signature=self._signature(resource, expires, key_id))

    def check(self, resource: str, link: SignedLink) -> None:
        """Raises `LinkRefused`."""
        expected = self._signature(resource, link.expires, link.key_id).encode()
        if not hmac.compare_digest(expected, link.signature.encode("utf-8", "surrogatepass")):
            raise LinkRefused("the link's signature does not fit; ask for a new link")
        if link.expires <= self._clock.time():
            raise LinkRefused("the link has expired; ask for a new one")

    def _signature(self, resource: str, expires: int, key_id: int | None) -> str:
        content = f"{expires} {key_id} {resource}".encode("utf-8", "surrogatepass")
        return hmac.digest(self._link_key, content, "sha256").hex()


def _part(fields: dict[str, object]) -> str:
    return _base64(json.dumps(fields, separators=(",", ":")).encode())


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _unbase64(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
