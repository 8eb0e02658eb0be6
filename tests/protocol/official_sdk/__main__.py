"""Checks of a running server with the official Tinker SDK; run by that SDK's own interpreter.

Every function below `@check` is one test. One line of JSON per check goes to stdout:
`{"check": name, "ok": bool, "detail": text, "seconds": number}`. They run in the order of `ORDER` and share one
session. Names of checks as arguments run only those.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback

import bad_input
import recipes
import records
import sampling
import tinker
import training
import traps
from kit import CHECKS, Shared

ORDER = (training, sampling, records, recipes, traps, bad_input)


def main() -> None:
    Shared.service = tinker.ServiceClient()
    Shared.rest = tinker.RestClient()
    Shared.base_url = os.environ["TINKER_BASE_URL"]
    wanted = set(sys.argv[1:])
    ranks = {module.__name__: rank for rank, module in enumerate(ORDER)}
    for function in sorted(CHECKS, key=lambda check: ranks[check.__module__]):
        if wanted and function.__name__ not in wanted:
            continue
        started = time.perf_counter()
        try:
            function()
            ok, detail = True, ""
        except Exception:  # noqa: BLE001 - the boundary of one check
            ok, detail = False, traceback.format_exc()
        seconds = time.perf_counter() - started
        print(json.dumps({"check": function.__name__, "ok": ok, "detail": detail, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
