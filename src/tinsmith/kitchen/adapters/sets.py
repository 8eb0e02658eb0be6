"""Whole sets of adapters, and presets of providers whose address one need not look up.

A preset says what of it was tested. `hosted` names the service that Tinker's own SDK talks to by default; the others
have no fixed address, so without a `base_url` (or the variable named here) they refuse at once: not configured.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tinsmith.kitchen.adapters.datasets import FileDatasets
from tinsmith.kitchen.adapters.evaluators import ExactMatch
from tinsmith.kitchen.adapters.hub import HubTokenizers
from tinsmith.kitchen.adapters.tinker_training import TinkerBackend, open_backend
from tinsmith.kitchen.errors import ConfigError, nearest


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    name: str
    base_url: str | None
    url_variable: str
    """Environment variable with the address, where the provider gives every user another."""
    key_variable: str
    """Environment variable with the key."""
    tested: str
    untested: str


_OURS = "the Tinker API as our own server speaks it, through the same client"

PRESETS: Final = {
    preset.name: preset
    for preset in (
        Preset(
            name="hosted",
            base_url="https://tinker.thinkingmachines.dev/services/tinker-prod",
            url_variable="TINKER_BASE_URL",
            key_variable="TINKER_API_KEY",
            tested=_OURS,
            untested="the live service: there was no account",
        ),
        Preset(
            name="fireworks",
            base_url=None,
            url_variable="FIREWORKS_TINKER_BASE_URL",
            key_variable="FIREWORKS_API_KEY",
            tested=_OURS,
            untested="everything of the provider; an endpoint that speaks the Tinker API is assumed",
        ),
        Preset(
            name="modal",
            base_url=None,
            url_variable="MODAL_TINKER_BASE_URL",
            key_variable="MODAL_TINKER_API_KEY",
            tested=_OURS,
            untested="everything of the provider; the address is that of `tinsmith serve` deployed there",
        ),
        Preset(
            name="baseten",
            base_url=None,
            url_variable="BASETEN_TINKER_BASE_URL",
            key_variable="BASETEN_API_KEY",
            tested=_OURS,
            untested="everything of the provider; an endpoint that speaks the Tinker API is assumed",
        ),
    )
}


def resolve_preset(name: str, *, base_url: str | None = None, api_key: str | None = None) -> tuple[str, str]:
    """Address and key. Raises `ConfigError` for an unknown preset, or one that is not configured."""
    if name not in PRESETS:
        raise ConfigError(f"preset {name!r} is none of {', '.join(PRESETS)}{nearest(name, PRESETS)}")
    preset = PRESETS[name]
    url = base_url or os.environ.get(preset.url_variable) or preset.base_url
    if not url:
        raise ConfigError(f"preset {name!r} is not configured: give base_url, or set {preset.url_variable}")
    key = api_key or os.environ.get(preset.key_variable)
    if not key:
        raise ConfigError(f"preset {name!r} is not configured: give api_key, or set {preset.key_variable}")
    return url, key


def tinker_adapters(*, base_url: str | None, api_key: str | None, preset: str | None) -> dict[str, Any]:
    if preset is not None:
        base_url, api_key = resolve_preset(preset, base_url=base_url, api_key=api_key)
    if base_url is None:
        raise ConfigError("tinker() needs base_url or preset; local() is the engine in this process")
    return _with_files(TinkerBackend(base_url, location=base_url, api_key=api_key))


def local_adapters(*, model: str, store: Path | None) -> dict[str, Any]:
    return _with_files(open_backend(base_url="local:", model=model, store=store))


def _with_files(backend: TinkerBackend) -> dict[str, Any]:
    return {
        "training_client": backend,
        "sampling_client": backend,
        "dataset_store": FileDatasets(),
        "tokenizer_client": HubTokenizers(),
        "evaluator": ExactMatch(),
    }
