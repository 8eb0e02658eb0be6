"""What a run was made of: enough to make it again."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

from tinsmith.kitchen.ports import Dataset
from tinsmith.kitchen.training_config import TrainingConfig

PACKAGES: Final = ("tinsmith", "torch", "transformers", "tokenizers", "numpy")
PLACES: Final = {"output", "resume", "base_url", "data"}
"""Keys that say where, not what: they are not hashed."""


def make_manifest(
    *,
    recipe: str,
    config: TrainingConfig,
    dataset: Dataset | None,
    facts: Mapping[str, Any],
    run_id: str,
    base_url: str | None,
    started: str,
) -> dict[str, Any]:
    """`facts` are what the workflow found out about its data."""
    data = {} if dataset is None else {"path": dataset.name, "sha256": dataset.sha256}
    return {
        "recipe": recipe,
        "started": started,
        "run_id": run_id,
        "base_url": base_url,
        "model": config.model,
        "seed": config.seed,
        "config_sha256": config_hash(config),
        "data": {**data, **facts},
        "versions": {"python": platform.python_version(), **_versions()},
    }


def config_hash(config: TrainingConfig) -> str:
    values = {key: value for key, value in config.model_dump(mode="json").items() if key not in PLACES}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _versions() -> dict[str, str | None]:
    """`None` where a package is not installed: the server may have its own."""
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found
