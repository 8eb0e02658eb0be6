"""Limits and times of the control plane."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, SecretStr


class HealthSettings(BaseModel):
    """When a server calls itself ready, and when it ends an engine that hangs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    is_on: bool = False
    """Watch engines and disk. Without it, an engine that is not dead is taken for well."""
    probe_interval_s: float = Field(default=10.0, gt=0)
    """An engine that had nothing to do for so long is asked for one token."""
    token_within_s: float = Field(default=30.0, gt=0)
    """An engine that waits for work must have produced a token within this time."""
    silent_after_s: float = Field(default=4.0, gt=0)
    """Without a pulse for so long, it does not count as ready; pulses come every second."""
    hung_after_s: float = Field(default=60.0, gt=0)
    """Without a pulse for so long, it is killed."""
    slow_after_s: float = Field(default=120.0, gt=0)
    """In one slice of work (a pass, a load, a save) for so long, it does not count as ready."""
    stuck_after_s: float = Field(default=1800.0, gt=0)
    """In one slice of work for so long, it is killed."""
    disk_interval_s: float = Field(default=10.0, gt=0)
    """How often a small file is written and synced."""
    slow_disk_s: float = Field(default=10.0, gt=0)
    """A write that takes longer turns readiness off."""
    min_free_bytes: int = Field(default=64 * 2**20, ge=0)
    """With less room in the data folder, the disk counts as full."""


class ControlSettings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    data_dir: Path
    """Holds the registry and the checkpoints. One running server per folder."""
    database: SecretStr | None = None
    """URL of a PostgreSQL database for the registry, of this server alone; `None` keeps it in a file of `data_dir`."""
    checkpoints: SecretStr | None = None
    """Where checkpoints are kept: a folder, or `s3://BUCKET/PREFIX?OPTION=VALUE`; `None` keeps them in `data_dir`."""
    checkpoint_cache_bytes: int = Field(default=20 * 2**30, ge=0)
    """Of checkpoints in a bucket, how much stays on this machine after use."""
    keys_required: bool = False
    """Refuse to start without a single key; for a server that other machines can reach."""
    max_batch_tokens: int = Field(default=8192, ge=1)
    """Training tokens handed to an engine together; a single larger request still goes alone."""
    seq_gap_timeout_s: float = Field(default=60.0, gt=0)
    """How long requests wait for a missing sequence number before them."""
    future_ttl_s: float = Field(default=3600.0, gt=0)
    """How long a result can be fetched again after it was computed."""
    max_retained_futures: int = Field(default=200_000, ge=1)
    """Finished results kept; beyond it the oldest expire early."""
    max_retained_bytes: int = Field(default=2 * 1024**3, ge=1)
    """The same in bytes of results in memory; beyond it the oldest go to disk."""
    max_stored_bytes: int = Field(default=16 * 1024**3, ge=0)
    """The same in bytes of results on disk; with 0 they expire instead of going there."""
    max_pending_per_model: int = Field(default=10_000, ge=1)
    max_pending_tokens_per_model: int = Field(default=16_000_000, ge=1)
    """Training tokens that may wait in one model's queue."""
    max_pending_samples: int = Field(default=10_000, ge=1)
    abandoned_sample_s: float = Field(default=300.0, gt=0)
    """A sample is cancelled when its session has sent and polled nothing for this long, heartbeats aside."""
    max_live_sessions: int = Field(default=10_000, ge=1)
    max_live_models: int = Field(default=1000, ge=1)
    """Models of all sessions together; those that do not fit into the engines' memory wait on disk until used."""
    session_timeout_s: float = Field(default=600.0, gt=0)
    """A session without heartbeat, request or poll for this long is ended, and its models dropped."""
    ephemeral_samplers_per_session: int = Field(default=64, ge=1)
    """Unnamed sampler snapshots kept per session; beyond it the oldest is dropped."""
    sampler_ttl_s: float = Field(default=86_400.0, gt=0)
    """How long an unnamed sampler of a live session is kept that nobody uses."""
    max_custom_losses_per_session: int = Field(default=64, ge=0)
    """Losses that a session may upload."""
    max_loaded_checkpoints: int = Field(default=32, ge=1)
    """Checkpoint snapshots an engine holds for sampling; beyond it the least recently used is dropped and reloaded
    when asked for."""
    max_adapter_bytes: int = Field(default=16 * 2**30, ge=1024)
    """Of a file of an adapter that is imported."""
    keep_checkpoints: int | None = Field(default=None, ge=1)
    """How many checkpoints of a kind a run keeps, unless its metadata say otherwise; `None` keeps all."""
    checkpoint_bytes_max: int | None = Field(default=None, ge=1)
    """How much all checkpoints may take; a save beyond it is refused."""
    superseded_versions_kept: int = Field(default=1, ge=0)
    """Versions of a checkpoint name kept on disk after an overwrite, the newest excluded."""
    ledger: bool = False
    """Keep what live sessions ask on disk, so that a killed server or engine goes on where it was."""
    snapshot_interval_s: float = Field(default=60.0, gt=0)
    """How long after a model's last snapshot its requests are kept to be replayed, before the next is taken."""
    snapshot_requests: int = Field(default=500, ge=1)
    """The same in requests."""
    snapshot_tokens: int = Field(default=2_000_000, ge=1)
    """The same in training tokens."""
    max_engine_restarts: int = Field(default=10, ge=0)
    """How often in a row, within ten minutes, a dead engine is started again; a result in between begins anew."""
    engine_backoff_s: float = Field(default=0.5, ge=0)
    """Before the second restart in a row; doubled for each one more, up to 30 s."""
    max_strikes: int = Field(default=3, ge=2)
    """A request that was with the engine at so many of its deaths is failed."""
    sweep_interval_s: float = Field(default=1.0, gt=0)
    """How often the janitor looks for what has ended or expired."""
    health: HealthSettings = HealthSettings()
