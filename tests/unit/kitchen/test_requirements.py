"""The table of requirements is complete, and the tests that it names exist."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any, get_args

from tinsmith import kitchen
from tinsmith.kitchen import RECIPES
from tinsmith.kitchen.evaluators import EVALUATORS
from tinsmith.kitchen.ports import PORTS
from tinsmith.kitchen.preferences import PreferenceLoss
from tinsmith.kitchen.recipes.reinforcement import PolicyLoss
from tinsmith.kitchen.telemetry import EVENTS
from tinsmith.observe.trackers import TRACKERS

TESTS = Path(__file__).parents[2]
TABLE: dict[str, dict[str, Any]] = tomllib.loads((TESTS / "kitchen_requirements.toml").read_text())
IDS = {*range(1, 26), *range(30, 36), *range(40, 45), *range(50, 58)}
CONSTRUCTS = ("workflow", "stage", "loop", "stream_loop", "async_loop", "conditional", "parallel", "sub_workflow")


def words(*prefixes: str) -> set[str]:
    """What the entries of the sections are called, and the words in their names."""
    entries = [name for title, section in TABLE.items() if title.startswith(prefixes) for name in section]
    return {*entries, *(word for name in entries for word in re.split(r"[,: ]+", name))}


def test_every_requirement_has_its_section() -> None:
    assert {int(title.split()[0].removeprefix("CK-")) for title in TABLE} == IDS
    assert all(TABLE.values())


def test_every_entry_names_a_test_that_exists_or_a_reason() -> None:
    sources: dict[str, str] = {}
    for title, section in TABLE.items():
        for name, value in section.items():
            if isinstance(value, dict):
                assert value.keys() == {"reason"}, f"{title}: {name}"
                assert len(value["reason"]) > 20, f"{title}: {name} gives no reason"
                continue
            file, _, test = value.partition("::")
            source = sources.setdefault(file, (TESTS / file).read_text())
            assert re.search(rf"^(async )?def {re.escape(test)}\(", source, re.MULTILINE), f"{title}: no test {value}"


def test_every_callback_of_every_port_is_listed() -> None:
    callbacks = {
        f"{port}.{name}" for port, protocol in PORTS.items() for name in vars(protocol) if not name.startswith("_")
    }
    listed = words("CK-20", "CK-21", "CK-22", "CK-23", "CK-24", "CK-25")
    assert callbacks - listed == {"environment.group"}, "environments are listed with reinforcement"


def test_every_construct_event_recipe_loss_evaluator_and_tracker_is_listed() -> None:
    assert all(callable(getattr(kitchen, name)) for name in CONSTRUCTS)
    assert set(CONSTRUCTS) <= words("CK-04", "CK-07")
    assert {"validate", "before", "execute", "after", "on_error", "rollback", "cleanup"} <= words("CK-08")
    assert set(EVENTS) <= words("CK-15", "CK-16")
    assert set(RECIPES) == set(TABLE["CK-55 recipes"])
    assert set(get_args(PreferenceLoss)) <= words("CK-41")
    assert set(get_args(PolicyLoss)) <= words("CK-42")
    assert set(EVALUATORS) <= words("CK-54")
    assert set(TRACKERS) <= words("CK-16")
