"""The classes that requests are counted by."""

from __future__ import annotations

from typing import Final

CLASSES: Final[dict[str, str]] = {
    "ForwardBackward": "training",
    "OptimStep": "optimizer",
    "Sample": "sampling",
    "SaveWeights": "checkpoint",
    "SaveWeightsForSampler": "checkpoint",
    "SaveWeightsExternal": "checkpoint",
    "LoadWeights": "checkpoint",
    "CreateModel": "model",
    "UnloadModel": "model",
    "CreateCustomLoss": "model",
}
"""Type of a request to its class."""

CLASS_NAMES: Final = tuple(dict.fromkeys(CLASSES.values()))
