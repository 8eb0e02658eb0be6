"""What admins do over HTTP: users, keys, projects, quotas, usage. `tinsmith admin` is the command for it."""

from tinsmith.server.admin.routes import PREFIX, router

__all__ = ["PREFIX", "router"]
