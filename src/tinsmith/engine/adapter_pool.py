"""The adapters of one engine: on the device, where requests find them, or parked in the host's memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from tinsmith.engine.adapter import Adapter
from tinsmith.types.errors import AlreadyExists, NotFound


class AdapterPool(Mapping[str, Adapter]):
    """A mapping of those on the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_device: dict[str, Adapter] = {}
        self._parked: dict[str, Adapter] = {}

    def __getitem__(self, model_id: str) -> Adapter:
        return self._on_device[model_id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._on_device)

    def __len__(self) -> int:
        return len(self._on_device)

    @property
    def num_parked(self) -> int:
        return len(self._parked)

    def on_device(self, model_id: str) -> Adapter:
        """Raises `NotFound`."""
        if model_id not in self._on_device:
            state = "parked" if model_id in self._parked else "not loaded"
            raise NotFound(f"model {model_id!r} is {state}")
        return self._on_device[model_id]

    def anywhere(self, model_id: str) -> Adapter:
        """Raises `NotFound`."""
        return self._parked[model_id] if model_id in self._parked else self.on_device(model_id)

    def check_new(self, model_id: str) -> None:
        """Raises `AlreadyExists`."""
        if model_id in self._on_device or model_id in self._parked:
            raise AlreadyExists(f"model {model_id!r} exists already")

    def put(self, adapter: Adapter) -> None:
        """On the device; in place of one of this name, wherever that was."""
        self.drop(adapter.model_id)
        self._on_device[adapter.model_id] = adapter

    def drop(self, model_id: str) -> None:
        self._on_device.pop(model_id, None)
        self._parked.pop(model_id, None)

    def park(self, model_id: str) -> None:
        """Raises `NotFound`; what torch raises if it does not fit into the host's memory leaves it where it was."""
        if model_id not in self._parked:
            self._parked[model_id] = self.on_device(model_id).copy(torch.device("cpu"))
            del self._on_device[model_id]

    def unpark(self, model_id: str) -> None:
        """Raises `NotFound`; what torch raises if it does not fit on the device leaves it parked."""
        if model_id in self._parked:
            self._on_device[model_id] = self._parked[model_id].copy(self._device)
            del self._parked[model_id]
        self.on_device(model_id)
