"""What stands on the other side of the ports: servers, embedded engines, files, fakes.

`noop()`, `local()` and `tinker()` each return a set of adapters for `run(…, adapters=…)`. Nothing heavy is imported
before one of them is called.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tinsmith.models import TINY


def noop(**options: Any) -> dict[str, Any]:
    """A deterministic adapter for every port, without a model, a network or files; `options` go to its backend."""
    from tinsmith.kitchen.adapters.noop_services import noop_adapters

    return noop_adapters(**options)


def local(*, model: str = TINY, store: Path | None = None) -> dict[str, Any]:
    """An engine in this process that loads `model`; checkpoints go to `store` (`None`: the user's data folder)."""
    from tinsmith.kitchen.adapters.sets import local_adapters

    return local_adapters(model=model, store=store)


def tinker(*, base_url: str | None = None, api_key: str | None = None, preset: str | None = None) -> dict[str, Any]:
    """Any server that speaks the Tinker API; a preset knows a provider's address and says what of it was tested.

    Raises `ConfigError` for an unknown preset, or one that is not configured.
    """
    from tinsmith.kitchen.adapters.sets import tinker_adapters

    return tinker_adapters(base_url=base_url, api_key=api_key, preset=preset)
