"""What a run was made of: enough to make it again."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

from tinsmith.data import ConversationFile

PACKAGES: Final = ("tinsmith", "torch", "transformers", "tokenizers", "numpy")


def make_manifest(
    *, recipe: str, file: ConversationFile, model: str, seed: int, run_id: str, base_url: str | None
) -> dict[str, Any]:
    return {
        "recipe": recipe,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "run_id": run_id,
        "base_url": base_url,
        "model": model,
        "seed": seed,
        "data": {
            "path": str(file.path),
            "sha256": file.sha256,
            "conversations": len(file.conversations),
            "ignored_keys": dict(file.ignored_keys),
        },
        "versions": {"python": platform.python_version(), **_versions()},
    }


def _versions() -> dict[str, str | None]:
    """`None` where a package is not installed: the server may have its own."""
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found
