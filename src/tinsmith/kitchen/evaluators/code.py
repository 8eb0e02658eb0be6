"""Run a model's code against tests, in a process of its own with limits.

Limits: processor time, memory, size of files and output, wall time; an empty environment, a folder of its own that is
removed afterwards, and no network where the kernel lets an ordinary user make an empty network namespace (Linux with
user namespaces); `CodeResult.network_blocked` says whether it did. At its end the whole process group is killed.

This stops accidents and most mischief. It is no wall against code that is made to attack the machine: the process reads
what its user can read. Run hostile code in a container or a virtual machine.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Final, Literal, TypeAlias

from tinsmith.kitchen.evaluators.base import TextEvaluator
from tinsmith.types.errors import InvalidInput, Unsupported

CodeStatus: TypeAlias = Literal["ok", "failed", "timeout", "killed"]
"""Ended with 0; ended otherwise; took too long; died of a signal, as over the limit of processor time."""

_BLOCK: Final = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000

_BOOTSTRAP: Final = f"""
import os, resource, sys
cpu_s, memory, file_bytes, block, status_fd = map(int, sys.argv[2:7])
blocked = 0
if block:
    try:
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        blocked = int(libc.unshare({_CLONE_NEWUSER | _CLONE_NEWNET}) == 0)
        del libc, ctypes
    except (ImportError, OSError, AttributeError):
        pass
os.write(status_fd, str(blocked).encode())
os.close(status_fd)
resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))
resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
path = sys.argv[1]
sys.argv = [path]
program = compile(open(path, encoding="utf-8").read(), path, "exec")
os.unlink(path)
scope = {{"__name__": "__main__", "__file__": path}}
del cpu_s, memory, file_bytes, block, status_fd, blocked, os, resource
exec(program, scope)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeLimits:
    wall_s: float = 10.0
    cpu_s: int = 5
    memory_bytes: int = 1 << 30
    """Of address space."""
    output_bytes: int = 64 * 1024
    """Of each of standard output and error; more is cut off. Files may be as large."""
    block_network: bool = True

    def __post_init__(self) -> None:
        for name in ("wall_s", "cpu_s", "memory_bytes", "output_bytes"):
            if getattr(self, name) <= 0:
                raise InvalidInput(f"{name} must be positive, not {getattr(self, name)!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeResult:
    status: CodeStatus
    exit_code: int
    """Negative: the signal that ended it."""
    stdout: str
    stderr: str
    seconds: float
    network_blocked: bool


def run_code(code: str, limits: CodeLimits | None = None, *, stdin: str = "") -> CodeResult:
    """Run a Python program. Blocks for little more than `wall_s`. Raises `Unsupported` where there are no limits."""
    limits = limits or CodeLimits()
    if sys.platform == "win32":
        raise Unsupported("code runs under limits of POSIX only; use Linux or macOS")
    with tempfile.TemporaryDirectory(prefix="tinsmith-code-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        work = folder / "work"
        work.mkdir()
        program = work / "program.py"
        program.write_text(code, encoding="utf-8", errors="replace")
        (folder / "in").write_text(stdin, encoding="utf-8", errors="replace")
        return _run(program, folder, limits)


def _run(program: Path, folder: Path, limits: CodeLimits) -> CodeResult:
    status_read, status_write = os.pipe()
    started, work = time.monotonic(), str(program.parent)
    with (folder / "in").open("rb") as source, (folder / "out").open("wb") as out, (folder / "err").open("wb") as err:
        try:
            process = subprocess.Popen(
                [
                    sys.executable, "-I", "-c", _BOOTSTRAP, str(program), str(limits.cpu_s), str(limits.memory_bytes),
                    str(limits.output_bytes), str(int(limits.block_network)), str(status_write),
                ],
                stdin=source, stdout=out, stderr=err, cwd=program.parent, pass_fds=(status_write,),
                env={"PATH": "/usr/bin:/bin", "HOME": work, "TMPDIR": work, "LANG": "C.UTF-8"},
                start_new_session=True,
            )  # fmt: skip
        finally:
            os.close(status_write)
        try:
            exit_code, timed_out = process.wait(limits.wall_s), False
        except subprocess.TimeoutExpired:
            exit_code, timed_out = -signal.SIGKILL, True
        finally:
            _kill_group(process)
    seconds = time.monotonic() - started
    network_blocked = os.read(status_read, 1) == b"1"
    os.close(status_read)
    return CodeResult(
        status="timeout" if timed_out else "killed" if exit_code < 0 else "failed" if exit_code else "ok",
        exit_code=exit_code,
        stdout=_head(folder / "out", limits.output_bytes),
        stderr=_head(folder / "err", limits.output_bytes),
        seconds=seconds,
        network_blocked=network_blocked,
    )


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """The process and what it started; its group carries its own number."""
    with suppress(ProcessLookupError):  # all of them have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _head(file: Path, size: int) -> str:
    with file.open("rb") as stream:
        return stream.read(size).decode("utf-8", "replace")


def code_of(answer: str) -> str:
    """The last fenced block of an answer, else all of it."""
    blocks = _BLOCK.findall(answer)
    return blocks[-1] if blocks else answer


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeEvaluator(TextEvaluator):
    """1 where the answer's code, followed by the target's tests (`assert …`), runs to its end.

    Tests print a secret of their own when they are through, so that code which only ends the program earns nothing.
    Code that goes looking for the secret in its own process can find it.
    """

    metric: ClassVar[str] = "code_exec"
    limits: CodeLimits = field(default_factory=CodeLimits)

    def score(self, prediction: str, target: str) -> float:
        if not target.strip():
            raise InvalidInput("without tests, any code is right")
        secret = os.urandom(16).hex()
        program = f"{code_of(prediction)}\n\n{target}\n\nprint({secret!r})\n"
        result = run_code(program, self.limits)
        return float(result.status == "ok" and result.stdout.rstrip().endswith(secret))
