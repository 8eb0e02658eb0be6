"""Where engines run. Control reaches every engine through `EngineHandle`, and nothing else."""

from tinsmith.runtime.handle import EngineCall, EngineHandle
from tinsmith.runtime.process import ProcessEngine
from tinsmith.runtime.thread import ThreadEngine

__all__ = ["EngineCall", "EngineHandle", "ProcessEngine", "ThreadEngine"]
