"""HTTP over `control`: one application, one translator per dialect, errors projected in one place."""

from tinsmith.server.app import create_app
from tinsmith.server.settings import ServerSettings

__all__ = ["ServerSettings", "create_app"]
