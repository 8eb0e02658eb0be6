"""`/metrics` for Prometheus: what is counted as it happens, and what is read when somebody asks.

Labels are of a few fixed kinds: classes of requests, phases, routes as they were declared, and the base models that the
operator chose. Nothing that a user names ever becomes a label.
"""

from tinsmith.server.metrics.counted import CountedFigures
from tinsmith.server.metrics.routes import metrics_router
from tinsmith.server.metrics.watched import WatchedFigures

__all__ = ["CountedFigures", "WatchedFigures", "metrics_router"]
