"""Runs side by side: what was set differently and what it came to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tinsmith.kitchen.run_folder import RunFolder
from tinsmith.kitchen.run_log import FREE_TO_CHANGE


def compare(folders: Sequence[Path]) -> Iterator[tuple[str, list[str]]]:
    """Rows of a table, a column per run: differing settings first, then figures. Raises `RunFolderError`."""
    runs = [RunFolder(folder) for folder in folders]
    configs, manifests = [run.read_config() for run in runs], [run.read_manifest() for run in runs]
    yield "recipe", [str(manifest.get("recipe")) for manifest in manifests]
    for key in dict.fromkeys(key for config in configs for key in config):
        values = [config.get(key) for config in configs]
        if key not in FREE_TO_CHANGE and any(value != values[0] for value in values):
            yield key, [_text(value) for value in values]
    if len({manifest.get("data", {}).get("sha256") for manifest in manifests}) > 1:
        yield "data", [str(manifest.get("data", {}).get("path")) for manifest in manifests]
    rows = [run.rows() for run in runs]
    yield "steps", [str(len(own)) for own in rows]
    yield "loss", [f"{own[0].loss:.4f} → {own[-1].loss:.4f}" if own else "" for own in rows]
    for name in dict.fromkeys(name for own in rows for name in (own[-1].metrics if own else ())):
        yield (
            name,
            [
                f"{own[0].metrics[name]:.4f} → {own[-1].metrics[name]:.4f}" if own and name in own[-1].metrics else ""
                for own in rows
            ],
        )
    evaluations = [run.evaluations() for run in runs]
    for name in dict.fromkeys(name for own in evaluations for name in (own[-1] if own else ()) if name != "step"):
        yield name, [_text(own[-1].get(name)) if own else "" for own in evaluations]
    yield "seconds", [f"{own[-1].seconds:.1f}" if own else "" for own in rows]


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
