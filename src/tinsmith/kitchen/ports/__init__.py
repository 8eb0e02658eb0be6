"""What workflows need of the world, as small Protocols. Adapters stand on the other side."""

from tinsmith.kitchen.ports.training import (
    CheckpointPaths,
    Pending,
    Sampler,
    SessionSpec,
    TrainingBackend,
    TrainingSession,
    adam_params,
)

__all__ = [
    "CheckpointPaths",
    "Pending",
    "Sampler",
    "SessionSpec",
    "TrainingBackend",
    "TrainingSession",
    "adam_params",
]
