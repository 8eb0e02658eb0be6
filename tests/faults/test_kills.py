"""Whatever is killed, whenever: the script sees a pause, and ends with the bits it would have had."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.faults.conftest import at_length
from tests.faults.killing import Daemon, Ended, daemon, run_script

SERVER_POINTS = (
    "ledger.before_commit:5",
    "ledger.after_commit:5",
    "save.begun:1",
    "save.written:1",
    "save.registered:1",
    "snapshot.written:1",
    "snapshot.committed:1",
)
REPLAY_POINTS = ("replay.read:1", "replay.loaded:1")
ENGINE_POINTS = ("engine.train:3", "engine.optim_step:3", "engine.save:1", "engine.snapshot:1")


class Killer:
    """Kills at lines that the script says: `{"step 3": "server", "save 4": "engine"}`."""

    def __init__(self, server: Daemon, plan: dict[str, str]) -> None:
        self._server = server
        self._plan = dict(plan)

    def __call__(self, line: str) -> None:
        match self._plan.pop(line, None):
            case "server":
                self._server.kill_server()
            case "engine":
                self._server.kill_engine()

    @property
    def is_done(self) -> bool:
        return not self._plan


def disturbed(folder: Path, plan: dict[str, str], python: str, module: str, steps: int) -> Ended:
    with daemon(folder) as server:
        killer = Killer(server, plan)
        ended = run_script(server, python, module, steps, killer)
        assert killer.is_done
        num_kills = list(plan.values()).count("server")
        assert server.num_starts > 0.8 * num_kills, "the script may be a line ahead of a kill, which then hits nobody"
        return ended


@pytest.mark.timeout(600)
def test_a_run_survives_the_death_of_server_and_engine_bitwise(undisturbed: dict[int, Ended], tmp_path: Path) -> None:
    plan = {"step 2": "server", "sample 3": "engine", "save 4": "server"}
    assert disturbed(tmp_path, plan, sys.executable, "tinsmith", 6) == undisturbed[6]


@pytest.mark.timeout(600)
def test_the_official_sdk_sees_no_more_than_a_pause(
    undisturbed: dict[int, Ended], tmp_path: Path, tinker_python: str
) -> None:
    plan = {"step 3": "server", "save 4": "engine"}
    assert disturbed(tmp_path, plan, tinker_python, "tinker", 6) == undisturbed[6]


def crashed_at(point: str, folder: Path, steps: int = 6, python: str = sys.executable, sdk: str = "tinsmith") -> Ended:
    with daemon(folder, crash_at=point) as server:
        ended = run_script(server, python, sdk, steps)
        assert (folder / "crashed").exists(), f"the run never came to {point}"
        return ended


@pytest.mark.timeout(600)
@pytest.mark.parametrize("point", ["save.registered:1", "engine.optim_step:3"])
def test_a_run_survives_a_crash_at(point: str, undisturbed: dict[int, Ended], tmp_path: Path) -> None:
    assert crashed_at(point, tmp_path) == undisturbed[6]


@at_length
@pytest.mark.timeout(600)
@pytest.mark.parametrize("sdk", ["tinsmith", "tinker"])
@pytest.mark.parametrize("point", [*SERVER_POINTS, *ENGINE_POINTS])
def test_a_run_survives_a_crash_at_every_named_point(
    point: str, sdk: str, undisturbed: dict[int, Ended], tmp_path: Path, tinker_python: str
) -> None:
    steps = 20 if "snapshot" in point else 6  # snapshots are looked for once a second
    python = sys.executable if sdk == "tinsmith" else tinker_python
    assert crashed_at(point, tmp_path, steps, python, sdk) == undisturbed[steps]


def test_every_crash_point_in_the_code_is_tried() -> None:
    named = {
        name
        for path in (Path(__file__).parents[2] / "src").rglob("*.py")
        for call in re.findall(r"crash_point\((.*)\)", path.read_text())
        for name in re.findall(r'"([a-z_.]+)"', call)
    }
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert named == {name for name in named if f'"{name}:' in tests}


@at_length
@pytest.mark.timeout(600)
@pytest.mark.parametrize("point", REPLAY_POINTS)
def test_a_server_that_dies_while_it_goes_on_goes_on_again(
    point: str, undisturbed: dict[int, Ended], tmp_path: Path
) -> None:
    with daemon(tmp_path, crash_at=point) as server:
        killer = Killer(server, {"step 5": "server"})
        assert run_script(server, sys.executable, "tinsmith", 6, killer) == undisturbed[6]


@at_length
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("sdk", ["tinsmith", "tinker"])
@pytest.mark.parametrize("victim", ["server", "engine"])
def test_twenty_steps_with_a_kill_at_every_step_and_save(
    sdk: str, victim: str, undisturbed: dict[int, Ended], tmp_path: Path, tinker_python: str
) -> None:
    moments = [f"step {step}" for step in range(20) if step not in (5, 10)]
    moments += ["save 4", "saved 4", "save 9", "saved 9", "sample 11", "save 19"]
    plan = dict.fromkeys(moments, victim)
    python = sys.executable if sdk == "tinsmith" else tinker_python
    assert disturbed(tmp_path, plan, python, sdk, 20) == undisturbed[20]
