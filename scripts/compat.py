"""Which methods of which official SDK work against this server: measured, and written to `docs/compatibility.md`.

Builds an environment per SDK version (kept in `.venv-compat/`, once), starts one server, runs `compat_methods.py` with
each. Ends with 1 if a method of any version fails. `--versions 0.16,newest` runs some of them and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import venv
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENTS = ROOT / ".venv-compat"
METHODS = ROOT / "scripts" / "compat_methods.py"
PAGE = ROOT / "docs" / "compatibility.md"
NEWEST = "newest"
VERSIONS = ("0.16", "0.18", "0.22", "0.24", "0.25", "0.30", "0.38", NEWEST)
TIMEOUT_S = 600
START_TIMEOUT_S = 120

MARKS = {"works": "✓", "refused": "refused", "broken": "SDK", "fails": "✗"}
_TWIN = "_async"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    state: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """What one SDK version said."""

    version: str
    is_newest: bool
    rows: dict[str, Outcome]

    @property
    def title(self) -> str:
        return f"{self.version} (newest)" if self.is_newest else self.version


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--versions", default=",".join(VERSIONS))
    wanted = tuple(parser.parse_args().versions.split(","))
    torch_folder = install_torch()
    interpreters = {version: interpreter(version, torch_folder) for version in wanted}
    with running_server() as url:
        columns = measure(interpreters, url)
    if wanted == VERSIONS:
        PAGE.write_text(page(columns))
    totals = Counter(outcome.state for column in columns for outcome in column.rows.values())
    print(", ".join(f"{count} {state}" for state, count in totals.most_common()))
    for column in columns:
        for name, outcome in column.rows.items():
            if outcome.state == "fails":
                print(f"\n{column.version}: {name}\n{outcome.why}")
    return 1 if totals["fails"] else 0


# ---- environments ----


def install_torch() -> Path:
    """One copy of torch for all environments; it is large, and no SDK version brings it."""
    folder = ENVIRONMENTS / "torch"
    if not (folder / "torch").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        constraints = ["--constraint", str(ROOT / "constraints.txt")]
        subprocess.run([*pip, *constraints, "--target", str(folder), "torch"], check=True)
    return folder


def interpreter(version: str, torch_folder: Path) -> Path:
    """Of the environment with this SDK version, built if it is not there; the newest is looked for every time."""
    folder = ENVIRONMENTS / version
    python = folder / "bin" / "python"
    complete = folder / "complete"
    if not complete.is_file() or version == NEWEST:
        if not complete.is_file():
            shutil.rmtree(folder, ignore_errors=True)
            venv.create(folder, with_pip=True)
        sdk = "tinker" if version == NEWEST else f"tinker=={version}.*"
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--upgrade"]
        subprocess.run([*pip, sdk, "transformers>=4.57,<6"], check=True)
        site = subprocess.run(
            [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        (Path(site) / "shared-torch.pth").write_text(f"{torch_folder}\n")
        complete.touch()
    return python


def installed_version(python: Path) -> str:
    code = "import importlib.metadata as m; print(m.version('tinker'))"
    return subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True).stdout.strip()


# ---- the server and the runs ----


@contextmanager
def running_server() -> Iterator[str]:
    """`tinsmith serve` on a free port, over a data folder of its own; its URL."""
    with tempfile.TemporaryDirectory() as folder:
        command = [str(Path(sys.executable).with_name("tinsmith")), "serve", "--port", "0", "--data-dir", folder]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            url = re.search(r"TINKER_BASE_URL=(\S+)", line)
            if url is None:
                raise RuntimeError(f"the server did not start; it said {line!r}")
            yield url.group(1)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(START_TIMEOUT_S)


def measure(interpreters: dict[str, Path], url: str) -> list[Column]:
    """A column per version, oldest first; the newest is a column of its own only if it is none of the others."""
    found: list[Column] = []
    newest = installed_version(interpreters[NEWEST]) if NEWEST in interpreters else None
    for wanted, python in interpreters.items():
        version = installed_version(python)
        if wanted == NEWEST and version in [column.version for column in found]:
            continue
        print(f"tinker {version} …", flush=True)
        found.append(Column(version=version, is_newest=version == newest, rows=run(python, url)))
    return found


def run(python: Path, url: str) -> dict[str, Outcome]:
    """The rows of one version. If it ended early, a last row says so."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {
            **os.environ,
            "TINKER_BASE_URL": url,
            "TINKER_API_KEY": "tml-local",
            "TINKER_TELEMETRY": "0",
            "HF_ENDPOINT": f"{url}/hf",
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": cache,
        }
        environment.pop("PYTHONPATH", None)
        command = [str(python), str(METHODS)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment, check=False
            )
            output, errors, code = done.stdout, done.stderr, done.returncode
        except subprocess.TimeoutExpired as error:
            output, errors, code = _text(error.stdout), _text(error.stderr), -1
    lines = [json.loads(line) for line in output.splitlines() if line.startswith('{"row"')]
    rows = {line["row"]: Outcome(state=line["state"], why=line["why"]) for line in lines}
    if code != 0:
        rows["the whole run"] = Outcome(state="fails", why=f"ended early with {code}:\n{errors[-2000:]}")
    return rows


def _text(output: bytes | str | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


# ---- the page ----


def page(columns: Sequence[Column]) -> str:
    names = list(dict.fromkeys(name for column in reversed(columns) for name in column.rows))
    methods = sorted((name for name in names if "." in name.split(":")[0] and name[0].isupper()), key=_order)
    options = [name for name in names if name not in methods]
    parts = [
        "# Compatibility\n",
        "<!-- Written by `make compat`; edit scripts/compat.py instead. -->\n",
        "Every public method of the official `tinker` SDK, called once by that SDK itself, unmodified, against one "
        "`tinsmith serve`. A method and its `_async` twin share a row: the mark is that of the worse of the two.\n",
        "✓ works and its result was checked · **refused** with a user error that names what is missing (see below) · "
        "**SDK** this version fails by itself, before it sends anything · ✗ fails · blank: not in this version\n",
        _summary(columns),
    ]
    for owner in dict.fromkeys(name.split(".")[0] for name in methods):
        mine = [name for name in methods if name.startswith(f"{owner}.") and not _is_twin(name, methods)]
        parts.append(f"## {owner}\n\n{_table(mine, columns)}")
    parts.append(f"## More than one call\n\n{_table(options, columns)}")
    parts.append(_reasons(columns))
    return "\n".join(parts)


def _order(name: str) -> tuple[int, str]:
    owners = ("ServiceClient", "TrainingClient", "SamplingClient", "RestClient", "AdminClient")
    return owners.index(name.split(".")[0]), name


def _is_twin(name: str, methods: Sequence[str]) -> bool:
    return name.endswith(_TWIN) and name.removesuffix(_TWIN) in methods


def _summary(columns: Sequence[Column]) -> str:
    lines = ["| SDK | methods tried | work | refused | broken in the SDK | fail |", "|---|---|---|---|---|---|"]
    for column in columns:
        states = Counter(outcome.state for outcome in column.rows.values())
        counts = [len(column.rows), *(states[state] for state in MARKS)]
        lines.append(f"| {column.title} | {' | '.join(map(str, counts))} |")
    total = Counter(outcome.state for column in columns for outcome in column.rows.values())
    counts = [total.total(), *(total[state] for state in MARKS)]
    lines.append(f"| all | {' | '.join(map(str, counts))} |")
    return "\n".join(lines) + "\n\nTwins are counted one by one here.\n"


def _table(names: Sequence[str], columns: Sequence[Column]) -> str:
    lines = [
        f"| | {' | '.join(column.title for column in columns)} |",
        "|---|" + ":-:|" * len(columns),
    ]
    for name in names:
        title = name.split(".", 1)[1] if name[0].isupper() and "." in name else name
        code = f"`{title}`" if title != name else title
        lines.append(f"| {code} | {' | '.join(_cell(name, column) for column in columns)} |")
    return "\n".join(lines) + "\n"


def _cell(name: str, column: Column) -> str:
    states = [column.rows[key].state for key in (name, name + _TWIN) if key in column.rows]
    worst = max(states, key=list(MARKS).index, default=None)
    return "" if worst is None else MARKS[worst]


def _reasons(columns: Sequence[Column]) -> str:
    """Every distinct reason, with the rows and versions that met it; ids are left out."""
    met: dict[tuple[str, str], list[str]] = {}
    for column in columns:
        for name, outcome in column.rows.items():
            if outcome.state not in ("works", "fails"):
                met.setdefault((name, _plain(outcome.why)), []).append(column.version)
    lines = ["## Reasons\n"]
    lines += [f"* **{name}** ({', '.join(versions)}): {why}" for (name, why), versions in met.items()]
    return "\n".join(lines) + "\n"


def _plain(why: str) -> str:
    text = re.sub(r" for self\.request_id=.*", "", why.splitlines()[0])
    return text.removeprefix("RequestFailedError: Request failed: ").strip()


if __name__ == "__main__":
    sys.exit(main())
