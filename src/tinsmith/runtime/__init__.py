"""Where engines run. Control reaches every engine through `EngineHandle`, and nothing else."""

from tinsmith.runtime.handle import EngineCall, EngineHandle

__all__ = ["EngineCall", "EngineHandle"]
