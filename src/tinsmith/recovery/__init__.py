"""Training that goes on after a failure: policy, monitor, executor, and a loop that continues at the right step."""

from tinsmith.recovery.checkpoints import CheckpointKeeper, CheckpointPolicy, RecordedCheckpoint, select_checkpoint
from tinsmith.recovery.diagnosis import Trigger, diagnose
from tinsmith.recovery.errors import RecoveryFailed
from tinsmith.recovery.executor import Recovered, RecoveryExecutor, WatchedRun
from tinsmith.recovery.loop import Recovery, Step
from tinsmith.recovery.monitor import RecoveryMonitor
from tinsmith.recovery.policy import CheckpointStrategy, RecoveryPolicy
from tinsmith.recovery.work import Job, JobStatus, TinsmithBackend, run_job

__all__ = [
    "CheckpointKeeper",
    "CheckpointPolicy",
    "CheckpointStrategy",
    "Job",
    "JobStatus",
    "RecordedCheckpoint",
    "Recovered",
    "Recovery",
    "RecoveryExecutor",
    "RecoveryFailed",
    "RecoveryMonitor",
    "RecoveryPolicy",
    "Step",
    "TinsmithBackend",
    "Trigger",
    "WatchedRun",
    "diagnose",
    "run_job",
    "select_checkpoint",
]
