"""Versions, processor, memory, GPU, clock, port."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tinsmith import __version__
from tinsmith.cli.checks.finding import Finding, ok, warn

_PACKAGES = ("torch", "transformers", "fastapi", "sqlalchemy", "numpy")
_MEMORY_LEAST = 2 * 2**30
_CLOCK_RUN_S = 0.2
_CLOCK_OFF_S = 0.05
_FILE_CLOCK_OFF_S = 2.0
_BUILT = 1_767_225_600.0
"""2026-01-01: no clock that is right shows less."""


def versions() -> Iterator[Finding]:
    parts = [f"tinsmith {__version__}", f"Python {platform.python_version()}"]
    parts += [f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES]
    found = ", ".join(parts)
    if (3, 11) <= sys.version_info[:2] <= (3, 13):
        yield ok("versions", found)
    else:
        yield warn("versions", found, "use Python 3.11, 3.12 or 3.13: others are not tested")


def processor() -> Iterator[Finding]:
    flags = _cpu_flags()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    names = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "AVX-512 BF16", "amx_bf16": "AMX BF16"}
    has = [text for flag, text in names.items() if flag in flags]
    found = f"{usable} of {os.cpu_count()} cores, {platform.machine()}, {', '.join(has) or 'no wide vectors known'}"
    if flags and "avx2" not in flags:
        yield warn("processor", found, "training on a CPU without AVX2 is slow: use another machine or a GPU")
    else:
        yield ok("processor", found)


def _cpu_flags() -> set[str]:
    """Empty where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split(":", 1)[1].split()) for line in lines if line.startswith("flags")), set())


def memory() -> Iterator[Finding]:
    import psutil
    import torch

    from tinsmith.engine.hardware import available_bytes

    free = available_bytes(torch.device("cpu")) or 0
    found = f"{_gib(free)} free of {_gib(psutil.virtual_memory().total)}"
    if free < _MEMORY_LEAST:
        yield warn("memory", found, "close other programs: a server of the smallest model takes about 1 GiB")
    else:
        yield ok("memory", found)


def gpu() -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            bf16 = "bfloat16" if torch.cuda.is_bf16_supported() else "no bfloat16"
            name = torch.cuda.get_device_name(index)
            yield ok("gpu", f"{name}: {_gib(free)} free of {_gib(total)}, {bf16}")
    elif torch.backends.mps.is_available():
        yield ok("gpu", "Apple GPU (mps)")
    else:
        yield ok("gpu", "none; the CPU computes")


def clock() -> Iterator[Finding]:
    """Wall clock and steady clock must run alike, and the disk's clock with them."""
    wall, steady = time.time(), time.monotonic()
    time.sleep(_CLOCK_RUN_S)
    drift = (time.time() - wall) - (time.monotonic() - steady)
    with tempfile.NamedTemporaryFile() as file:
        file_off = Path(file.name).stat().st_mtime - time.time()
    found = f"{time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime())}, drift {1e3 * drift:+.1f} ms in {_CLOCK_RUN_S} s"
    if time.time() < _BUILT:
        yield warn("clock", found, "set the clock: expiry of checkpoints, keys and links depends on it")
    elif abs(drift) > _CLOCK_OFF_S:
        yield warn("clock", found, "the clock is being set while it runs: let NTP slew it instead")
    elif abs(file_off) > _FILE_CLOCK_OFF_S:
        yield warn("clock", f"{found}; files are dated {file_off:+.1f} s off", "synchronize both machines by NTP")
    else:
        yield ok("clock", found)


def port(host: str, number: int) -> Iterator[Finding]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, number))
        except OSError as error:
            advice = "stop what listens there, or serve with another --port"
            yield warn("port", f"{host}:{number}: {error.strerror or error}", advice)
            return
    yield ok("port", f"{host}:{number} is free")


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
