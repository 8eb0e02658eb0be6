"""Questions about the credential in use, answered without a client."""

from __future__ import annotations

from tinsmith.client.config import Timing, is_local_url, resolve_config
from tinsmith.client.errors import ConfigurationError
from tinsmith.client.rest import RestClient

__all__ = ["get_tinker_token", "raise_if_tinker_not_accessible", "tinker_has_credentials"]


def get_tinker_token() -> str | None:
    """The key that a client would send, if one is set or stored. Runs no command, asks no server."""
    try:
        return resolve_config().api_key.get_secret_value() or None
    except ConfigurationError:
        return None


def tinker_has_credentials() -> bool:
    """Whether a client would find a credential: a key, a stored key, a command; none is needed for local servers."""
    try:
        config = resolve_config()
    except ConfigurationError:
        return False
    return bool(config.api_key) or config.credential_command is not None


def raise_if_tinker_not_accessible() -> None:
    """Ask the server what it can do. Raises the `TinkerError` that a client would meet; retries nothing."""
    config = resolve_config(timing=Timing(startup_give_up=0.0, submit_give_up=0.0))
    if is_local_url(config.base_url):
        return
    with RestClient.with_timing(config.timing) as client:
        client.get_server_capabilities().result()
