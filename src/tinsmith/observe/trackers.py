"""Sinks of experiment trackers: TensorBoard, Weights & Biases, MLflow, trackio; each package is loaded when opened.

Nothing leaves the machine unless the tracker is set up to send it: with `WANDB_MODE=offline`, a `sqlite:` address for
MLflow or a local trackio project nothing does. Tried with tensorboard 2.21, wandb 0.31 (offline), mlflow-skinny 3.17
(SQLite) and trackio 0.43 (local).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Final, Protocol


class TrackerMissing(ImportError):
    """The tracker's package is not installed."""


class MetricSink(Protocol):
    """One run of a tracker."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Steps never fall."""

    def close(self, *, failed: bool = False) -> None:
        """What was logged is kept."""


class TensorBoardSink:
    """Event files in `target/RUN`."""

    def __init__(self, target: str, *, run_id: str, config: Mapping[str, Any]) -> None:
        module = _load("torch.utils.tensorboard", "tensorboard")
        self._writer = module.SummaryWriter(str(Path(target or "runs/tensorboard") / run_id))
        self._writer.add_text("config", "\n".join(f"    {key} = {value!r}" for key, value in config.items()))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, *, failed: bool = False) -> None:
        self._writer.close()


class WandbSink:
    """A run of the project `target`."""

    def __init__(self, target: str, *, run_id: str, config: Mapping[str, Any]) -> None:
        self._run = _load("wandb", "wandb").init(
            project=target or "tinsmith", name=run_id, config=dict(config), reinit="create_new"
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self, *, failed: bool = False) -> None:
        self._run.finish(exit_code=int(failed))


class MlflowSink:
    """A run of the experiment `tinsmith` at the tracking address `target`."""

    def __init__(self, target: str, *, run_id: str, config: Mapping[str, Any]) -> None:
        self._client = _load("mlflow", "mlflow-skinny").MlflowClient(tracking_uri=target or None)
        found = self._client.get_experiment_by_name("tinsmith")
        experiment = found.experiment_id if found is not None else self._client.create_experiment("tinsmith")
        self._run = self._client.create_run(experiment, run_name=run_id).info.run_id
        for key, value in config.items():
            self._client.log_param(self._run, key, value)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._client.log_metric(self._run, name, value, step=step)

    def close(self, *, failed: bool = False) -> None:
        self._client.set_terminated(self._run, status="FAILED" if failed else "FINISHED")


class TrackioSink:
    """A run of the project `target`."""

    def __init__(self, target: str, *, run_id: str, config: Mapping[str, Any]) -> None:
        self._trackio = _load("trackio", "trackio")
        self._run = self._trackio.init(project=target or "tinsmith", name=run_id, config=dict(config), embed=False)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self, *, failed: bool = False) -> None:
        self._run.finish()


TRACKERS: Final[Mapping[str, Callable[..., MetricSink]]] = {
    "tensorboard": TensorBoardSink,
    "wandb": WandbSink,
    "mlflow": MlflowSink,
    "trackio": TrackioSink,
}
"""By the name under which telemetry attaches them."""


def _load(module: str, package: str) -> Any:
    """Raises `TrackerMissing`."""
    try:
        return import_module(module)
    except ImportError as error:
        raise TrackerMissing(f"this tracker needs a package: pip install {package}") from error
