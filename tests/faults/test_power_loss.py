"""After a power failure at any instant the ledger opens, and holds everything that anybody was told is on disk."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pytest

from tests.faults.power_loss import Event, LoggedDisk, LoggedLedger, Told, after_power_loss
from tinsmith.control.ledger import Entry, Ledger, put

SEED = 20261122
NUM_IMAGES = 150 if "FAULTS" in os.environ else 40
NUM_ENTRIES = 120


async def written(folder: Path, synchronous: Literal["FULL", "NORMAL"], seed: int) -> Sequence[Event]:
    """What happens on a disk while some clients write entries of some sizes, in groups as they come."""
    disk, chance = LoggedDisk(), random.Random(seed)
    ledger = LoggedLedger(folder / "ledger.sqlite3", disk, synchronous)
    ledger.open()
    ledger.start(asyncio.get_running_loop())

    async def client(number: int) -> None:
        for index in range(NUM_ENTRIES // 4):
            name = f"{number}:{index}"
            value = chance.randbytes(chance.choice([10, 500, 5_000, 40_000]))
            await ledger.write([put(Entry(kind="request", name=name, model_id=str(number), seq=index, value=value))])
            disk.note(Told(name))

    await asyncio.gather(*(client(number) for number in range(4)))
    ledger.close()
    return disk.events


def lost(events: Sequence[Event], folder: Path, seed: int) -> int:
    """In how many of the images something is missing that was told to be there. Every image must open."""
    chance, num_lost = random.Random(seed), 0
    first_told = next(i for i, event in enumerate(events) if isinstance(event, Told))
    for number in range(NUM_IMAGES):
        instant = chance.randrange(first_told, len(events) + 1)
        image = folder / str(number)
        image.mkdir()
        for name, content in after_power_loss(events, instant, chance).items():
            (image / name).write_bytes(content)
        found = {entry.name for entry in Ledger(image / "ledger.sqlite3").read()}
        told = {event.name for event in events[:instant] if isinstance(event, Told)}
        num_lost += not told <= found
    return num_lost


@pytest.mark.timeout(120)
def test_a_power_failure_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    events = asyncio.run(written(tmp_path, "FULL", SEED))
    assert lost(events, tmp_path / "images", SEED) == 0, f"seed {SEED}"


@pytest.mark.timeout(120)
def test_these_images_would_show_a_ledger_that_syncs_too_seldom(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    events = asyncio.run(written(tmp_path, "NORMAL", SEED))
    assert lost(events, tmp_path / "images", SEED) > 0, f"seed {SEED}"
