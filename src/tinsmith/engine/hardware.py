"""What this machine is and has: device, fast dtype, free memory."""

# T token, D head size

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import nn

from tinsmith.types.errors import InvalidInput

_BF16_ADVANTAGE = 1.5
"""How much faster bfloat16 must be before its lost precision is worth it."""
_BF16_MIN_WIDTH = 384
"""Narrower models spend their time between the products: at width 192 whole training steps were slower in bfloat16."""


@dataclass(frozen=True, slots=True)
class DtypeDecision:
    dtype: torch.dtype
    reason: str
    """For the log: what was asked for, or what was measured."""


def pick_device(choice: str) -> torch.device:
    """Raises `InvalidInput` if the device asked for is not there."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if choice == "auto":
        choice = next(name for name in ("cuda", "mps", "cpu") if available[name])
    if not available[choice]:
        raise InvalidInput(f"device {choice!r} is not available on this machine")
    return torch.device(choice)


def pick_dtype(choice: str, device: torch.device, hidden_size: int) -> DtypeDecision:
    """`auto`: bfloat16 on a GPU that has it; on a CPU, for models that are not narrow, if it measures faster."""
    if choice != "auto":
        return DtypeDecision(torch.float32 if choice == "float32" else torch.bfloat16, "as asked")
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported():
            return DtypeDecision(torch.bfloat16, "auto: this GPU has it")
        return DtypeDecision(torch.float32, "auto: this GPU has no bfloat16")
    if device.type == "mps":
        return DtypeDecision(torch.float32, "auto: on mps")
    if hidden_size < _BF16_MIN_WIDTH:
        return DtypeDecision(torch.float32, f"auto: {hidden_size} wide, too narrow for bfloat16 to pay")
    fp32_s, bf16_s = (_layer_seconds(dtype, hidden_size) for dtype in (torch.float32, torch.bfloat16))
    dtype = torch.bfloat16 if bf16_s * _BF16_ADVANTAGE < fp32_s else torch.float32
    measured = f"auto: 256 tokens through a layer take {fp32_s * 1e3:.2f} ms in float32, {bf16_s * 1e3:.2f} in bfloat16"
    return DtypeDecision(dtype, measured)


def available_bytes(device: torch.device) -> int | None:
    """Memory that can still be allocated on the device, or `None` where it cannot be known."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory()) - int(torch.mps.driver_allocated_memory())
    free = int(psutil.virtual_memory().available)
    limited = cgroup_available_bytes(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))
    return free if limited is None else min(free, limited)


def cgroup_available_bytes(root: Path, membership: Path) -> int | None:
    """What the tightest enclosing memory cgroup still allows, page cache counted as free; `None` without a limit.

    Reads version 2 (`memory.max` up the tree from the path in `membership`) and version 1 at its root.
    """
    rooms = [_cgroup_room(folder, "memory.max", "memory.current") for folder in _cgroup_folders(root, membership)]
    rooms.append(_cgroup_room(root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"))
    known = [room for room in rooms if room is not None]
    return min(known) if known else None


def _cgroup_folders(root: Path, membership: Path) -> list[Path]:
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return [root]
    own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    folder = root / own
    return [folder, *(parent for parent in folder.parents if parent == root or root in parent.parents)]


def _cgroup_room(folder: Path, limit_file: str, usage_file: str) -> int | None:
    try:
        limit = (folder / limit_file).read_text().strip()
        usage = int((folder / usage_file).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if limit == "max" or int(limit) >= 2**60:
        return None
    return max(0, int(limit) - usage + int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0)))


def _layer_seconds(dtype: torch.dtype, hidden_size: int) -> float:
    """Best of a few passes through something like one layer: small models spend their time between the products."""
    hidden_size = hidden_size // 4 * 4
    x_TH = torch.full((256, hidden_size), 0.01, dtype=dtype)
    up, down = (
        torch.full(shape, 0.01, dtype=dtype)
        for shape in ((4 * hidden_size, hidden_size), (hidden_size, 4 * hidden_size))
    )
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        with torch.inference_mode():
            wide = nn.functional.silu(nn.functional.linear(x_TH, up))
            y_TH = nn.functional.linear(wide, down)
            q = y_TH.view(1, 256, 4, -1).transpose(1, 2)
            nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
            nn.functional.rms_norm(y_TH.float(), (hidden_size,)).to(dtype) + x_TH
        best = min(best, time.perf_counter() - start)
    return best
