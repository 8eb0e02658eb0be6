"""Named places where a test can have this process killed: `TINSMITH_CRASH_AT=NAME[:COUNT[:FLAG]]`.

The process ends by SIGKILL when it comes to NAME for the COUNT-th time. With FLAG, a path, it does so only if that file
does not exist yet, and makes it first: a process that is started again with the same environment then lives on.
"""

from __future__ import annotations

import os
import signal
from collections import Counter

VARIABLE = "TINSMITH_CRASH_AT"

_seen: Counter[str] = Counter()


def crash_point(name: str) -> None:
    """Do nothing, unless the environment names this place."""
    armed = os.environ.get(VARIABLE)
    if armed is None:
        return
    wanted, _, rest = armed.partition(":")
    count, _, flag = rest.partition(":")
    if wanted != name:
        return
    _seen[name] += 1
    if _seen[name] != int(count or "1"):
        return
    if flag:
        try:
            os.close(os.open(flag, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
    os.kill(os.getpid(), signal.SIGKILL)
