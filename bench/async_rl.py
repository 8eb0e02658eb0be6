"""How busy reinforcement learning keeps the engine, in turn and asynchronously: `python -m bench.async_rl`.

The task is that of `math_rl`, with a grader that takes time, as sandboxes and judges do: each answer waits `--grader-s`
for its reward, and no processor is used meanwhile. Both runs have the same config but for `max_staleness`. What counts
is the engine's own account of its time (`Pulse.phase_s`): the share of the run in which it packed, computed or drew.

With several `--seeds` (of the adapter, the tasks and the samples) the question is the reward: whether what asynchronous
runs end with differs from runs in turn by more than runs in turn differ from each other.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from bench.compare import write_record
from bench.run import MODEL
from tinsmith.control.service import Control
from tinsmith.control.settings import ControlSettings
from tinsmith.data import ParsedAnswer
from tinsmith.kitchen import RECIPES, TrainingConfig, run_recipe
from tinsmith.kitchen.adapters.tinker_training import TinkerBackend
from tinsmith.kitchen.ports import Environment, EnvironmentGroup, Observation, SameTask, StepResult
from tinsmith.kitchen.tasks import Sums
from tinsmith.observe import StepRow
from tinsmith.runtime.process import ProcessEngine
from tinsmith.server import create_app
from tinsmith.types.engine_options import EngineOptions, ModelSource
from tinsmith.types.pulse import Pulse

WORK = ("pack", "forward", "loss", "backward", "optimizer", "prefill", "decode")
PULSE_WAIT_S = 1.2
"""A little longer than engines wait between pulses."""


@dataclass(slots=True)
class SlowlyGraded(Environment):
    inner: Environment
    grader_s: float

    async def start(self) -> Observation:
        return await self.inner.start()

    async def step(self, answer: ParsedAnswer) -> StepResult:
        await asyncio.sleep(self.grader_s)
        return await self.inner.step(answer)


@dataclass(frozen=True, slots=True)
class SlowlyGradedSums:
    sums: Sums
    grader_s: float

    def group(self, index: int, size: int) -> EnvironmentGroup:
        def make() -> SlowlyGraded:
            return SlowlyGraded(self.sums.group(index, 1).make()[0], self.grader_s)

        return SameTask(make_one=make, size=size)


@contextmanager
def serving(folder: Path) -> Iterator[tuple[str, ProcessEngine]]:
    """A server in this process, its engine in one of its own; the URL, and the engine to look at."""
    engine = ProcessEngine(ModelSource.parse(MODEL), EngineOptions())
    app = create_app(Control(ControlSettings(data_dir=folder), [engine]))
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.05)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", engine
    finally:
        server.should_exit = True
        thread.join()


def work_s(pulse: Pulse) -> float:
    return sum(pulse.phase_s[name] for name in WORK)


def busy_share(before: Pulse, after: Pulse) -> float:
    passed = sum(after.phase_s.values()) - sum(before.phase_s.values())
    return (work_s(after) - work_s(before)) / passed


def fresh_pulse(engine: ProcessEngine) -> Pulse:
    time.sleep(PULSE_WAIT_S)
    pulse = engine.pulse
    assert pulse is not None, "the engine has been up for longer than a pulse takes"
    return pulse


def measure(
    url: str, engine: ProcessEngine, folder: Path, *, seed: int, staleness: int, rounds: int, grader_s: float
) -> Figures:
    config = RECIPES["math_rl"].make(
        {"output": folder, "num_rollouts": rounds, "max_staleness": staleness, "eval_size": 0, "seed": seed}
    )
    assert isinstance(config, TrainingConfig)
    pulses: list[Pulse] = []

    class Watch:
        """Takes a pulse when training begins and when it has ended: loading and the report are not counted."""

        def started(self, *, title: str, first_step: int, num_steps: int) -> None:
            pulses.append(fresh_pulse(engine))

        def stepped(self, row: StepRow) -> None:
            if row.step == rounds:
                pulses.append(fresh_pulse(engine))

        def noted(self, text: str) -> None: ...

        def ended(self) -> None: ...

    result = run_recipe(
        RECIPES["math_rl"], config, lambda _config, _folder: TinkerBackend(url, location=url, api_key="tml-bench"),
        adapters={"environment": SlowlyGradedSums(Sums(seed=seed), grader_s)}, observers=[Watch()],
    )  # fmt: skip
    seen = [int(row.metrics["staleness"]) for row in result.rows]
    if max(seen) > staleness:
        raise AssertionError(f"staleness {max(seen)} is over its bound {staleness}")
    rewards = [row.metrics["reward"] for row in result.rows]
    return Figures(
        busy=busy_share(pulses[0], pulses[1]),
        seconds=result.rows[-1].seconds,
        work_s=work_s(pulses[1]) - work_s(pulses[0]),
        staleness_max=max(seen),
        reward_first=statistics.fmean(rewards[:2]),
        reward_last=statistics.fmean(rewards[-4:]),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    busy: float
    """Share of the run's time in which the engine worked; two pulses' waits are in that time."""
    seconds: float
    work_s: float
    """In which the engine worked."""
    staleness_max: int
    reward_first: float
    reward_last: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--grader-s", type=float, default=1.0)
    parser.add_argument("--staleness", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    wanted = parser.parse_args()
    found: dict[str, list[Figures]] = {"in turn": [], "asynchronous": []}
    with tempfile.TemporaryDirectory() as name, serving(Path(name) / "server") as (url, engine):
        for seed in wanted.seeds:
            for title, staleness in (("in turn", 0), ("asynchronous", wanted.staleness)):
                figures = measure(
                    url, engine, Path(name) / f"{title} {seed}",
                    seed=seed, staleness=staleness, rounds=wanted.rounds, grader_s=wanted.grader_s,
                )  # fmt: skip
                found[title].append(figures)
                print(f"seed {seed} {title:14} {figures}", flush=True)
    if len(wanted.seeds) == 1:
        write_record("async-rl", MODEL, _of_one_seed(found["in turn"][0], found["asynchronous"][0]))
    else:
        settings = {"rounds": wanted.rounds, "staleness": wanted.staleness, "grader_s": wanted.grader_s}
        write_record("async-rl-seeds", MODEL, {**settings, **_of_seeds(found["in turn"], found["asynchronous"])})


def _of_one_seed(in_turn: Figures, overlapping: Figures) -> dict[str, float]:
    return {
        "busy_gain": overlapping.busy / in_turn.busy,
        "speed_gain": in_turn.seconds / overlapping.seconds,
        **{f"in turn: {name}": value for name, value in _named(in_turn).items()},
        **{f"asynchronous: {name}": value for name, value in _named(overlapping).items()},
    }


def _of_seeds(in_turn: Sequence[Figures], overlapping: Sequence[Figures]) -> dict[str, float]:
    """The last rewards of each seed, the mean difference, and the deviation of single runs of either kind."""
    rewards = {
        "in turn": [one.reward_last for one in in_turn],
        "asynchronous": [one.reward_last for one in overlapping],
    }
    gaps = [late - early for early, late in zip(rewards["in turn"], rewards["asynchronous"], strict=True)]
    return {
        "busy_gain": statistics.fmean(a.busy / b.busy for a, b in zip(overlapping, in_turn, strict=True)),
        "reward_gap_mean": statistics.fmean(gaps),
        "reward_gap_stdev": statistics.stdev(gaps),
        **{f"{title}: reward_last_stdev": statistics.stdev(values) for title, values in rewards.items()},
        **{
            f"{title}: reward_last {nth}": value
            for title, values in rewards.items()
            for nth, value in enumerate(values)
        },
    }


def _named(figures: Figures) -> dict[str, float]:
    return {name: float(getattr(figures, name)) for name in Figures.__slots__}


if __name__ == "__main__":
    main()
