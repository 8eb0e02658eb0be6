"""The Tinker dialect: `/api/v1/*` as the official SDK speaks it.

`submits` and `futures` are raw routes, for they carry the traffic; the rest are FastAPI routes.
"""

from tinsmith.server.tinker.imports import IMPORT_PATH
from tinsmith.server.tinker.routes import PREFIX, RAW, RawRoute, raw_routes, routers

__all__ = ["IMPORT_PATH", "PREFIX", "RAW", "RawRoute", "raw_routes", "routers"]
