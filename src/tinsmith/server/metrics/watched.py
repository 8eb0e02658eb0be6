"""What is read when somebody asks: queues, futures, models, engines, disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from tinsmith import __version__
from tinsmith.control.inspection import EngineState, Inspection
from tinsmith.control.paging import PagingStats
from tinsmith.server.metrics.classes import CLASS_NAMES, CLASSES

_Row: TypeAlias = tuple[tuple[str, ...], float]


class WatchedFigures:
    """A collector of `prometheus_client`; `look` is called once per scrape."""

    def __init__(self, look: Callable[[], Inspection | None]) -> None:
        """`look` answers `None` while there is nothing to see: before the start, and after the end."""
        self._look = look

    def describe(self) -> list[Metric]:
        """Nothing to say before the first scrape."""
        return []

    def collect(self) -> Iterator[Metric]:
        yield _gauge("build_info", "Version that runs.", ("version",), [((__version__,), 1)])
        seen = self._look()
        yield _gauge("ready", "Whether /readyz says yes.", (), [((), float(seen is not None and seen.reason is None))])
        if seen is not None:
            yield from _control(seen)
            yield from _ledger(seen)
            yield from _engines(seen.engines)


def _gauge(name: str, text: str, labels: tuple[str, ...], rows: list[_Row]) -> Metric:
    family = GaugeMetricFamily(f"tinsmith_{name}", text, labels=labels)
    for values, number in rows:
        family.add_metric(values, number)
    return family


def _counter(name: str, text: str, labels: tuple[str, ...], rows: list[_Row]) -> Metric:
    family = CounterMetricFamily(f"tinsmith_{name}", text, labels=labels)
    for values, number in rows:
        family.add_metric(values, number)
    return family


def _by_class(counts: dict[str, int]) -> list[_Row]:
    totals = dict.fromkeys(CLASS_NAMES, 0)
    for request_type, count in counts.items():
        totals[CLASSES[request_type]] += count
    return [((name,), count) for name, count in totals.items()]


def _control(seen: Inspection) -> Iterator[Metric]:
    queued, running = sum(seen.queued.values()), sum(seen.running.values())
    yield _gauge("queue_depth", "Requests that wait for their turn.", ("class",), _by_class(seen.queued))
    yield _gauge("requests_running", "Requests whose turn has come.", ("class",), _by_class(seen.running))
    states: list[_Row] = [(("queued",), queued), (("running",), running), (("kept",), seen.futures_kept)]
    yield _gauge("futures", "Futures by state; kept: ended, and still fetchable.", ("state",), states)
    yield _gauge("futures_kept_bytes", "Memory of results that are kept.", (), [((), seen.futures_kept_bytes)])
    models: list[_Row] = [((state,), count) for state, count in seen.models.items()]
    yield _gauge("models", "Models by state.", ("state",), models)
    places: list[_Row] = [((place,), count) for place, count in seen.adapters.items()]
    yield _gauge("model_adapters", "Adapters of live models by where they are.", ("place",), places)
    yield _gauge("sessions", "Sessions that are live.", (), [((), seen.num_sessions)])
    yield _gauge("open_polls", "Long polls that are held.", (), [((), seen.num_open_polls)])


def _ledger(seen: Inspection) -> Iterator[Metric]:
    if seen.ledger_lag_s is not None:
        yield _gauge("ledger_lag_seconds", "Age of the oldest unwritten change.", (), [((), seen.ledger_lag_s)])
        yield _gauge("ledger_bytes", "Size of the ledger's files.", (), [((), seen.ledger_bytes)])
    if seen.disk_free_bytes is not None:
        yield _gauge("disk_free_bytes", "Room under the data folder.", (), [((), seen.disk_free_bytes)])
    if seen.disk_fsync_s is not None:
        yield _gauge("disk_fsync_seconds", "The last trial write and fsync.", (), [((), seen.disk_fsync_s)])


def _engines(engines: list[EngineState]) -> Iterator[Metric]:
    ups: list[_Row] = [((e.base_model,), float(e.is_up)) for e in engines]
    yield _gauge("engine_up", "Whether the engine lives.", ("base_model",), ups)
    deaths: list[_Row] = [((e.base_model,), e.num_deaths) for e in engines]
    yield _counter("engine_deaths", "How often the engine died.", ("base_model",), deaths)
    pulses = [(engine.base_model, engine.pulse) for engine in engines if engine.pulse is not None]
    phases: list[_Row] = [((name, phase), s) for name, pulse in pulses for phase, s in pulse.phase_s.items()]
    yield _counter("engine_seconds", "Time of the engine by phase.", ("base_model", "phase"), phases)
    passes: list[_Row] = [((name, "training"), p.num_training_passes) for name, p in pulses]
    passes += [((name, "decode"), p.num_decode_passes) for name, p in pulses]
    yield _counter("engine_passes", "Passes through the base model.", ("base_model", "kind"), passes)
    rows: list[_Row] = [((name, "training"), p.tokens_trained) for name, p in pulses]
    rows += [((name, "decode"), p.num_decode_rows) for name, p in pulses]
    text = "Rows of those passes: tokens of training passes, drawing sequences of decode passes."
    yield _counter("engine_pass_rows", text, ("base_model", "kind"), rows)
    most: list[_Row] = [((name, "training"), p.training_pass_tokens_max) for name, p in pulses]
    most += [((name, "decode"), p.decode_batch_max) for name, p in pulses]
    yield _gauge("engine_pass_rows_max", "Rows that a full pass has.", ("base_model", "kind"), most)
    samples: list[_Row] = [((name, "running"), p.num_running) for name, p in pulses]
    samples += [((name, "waiting"), p.num_waiting) for name, p in pulses]
    yield _gauge("engine_samples", "Sample requests in the engine.", ("base_model", "state"), samples)
    weights: list[_Row] = [((name, "adapter"), p.num_adapters) for name, p in pulses]
    weights += [((name, "sampler"), p.num_snapshots) for name, p in pulses]
    yield _gauge("engine_weights", "Adapters and samplers loaded.", ("base_model", "kind"), weights)
    blocks: list[_Row] = [((name, "free"), p.cache_blocks_free) for name, p in pulses]
    blocks += [((name, "used"), p.cache_blocks - p.cache_blocks_free) for name, p in pulses]
    yield _gauge("engine_cache_blocks", "Blocks of the key-value cache.", ("base_model", "state"), blocks)
    memory: list[_Row] = [((name, "rss"), p.rss_bytes) for name, p in pulses]
    memory += [((name, "device"), p.device_bytes) for name, p in pulses]
    yield _gauge("engine_memory_bytes", "Memory of the engine's process.", ("base_model", "kind"), memory)
    yield from _paging([(engine.base_model, engine.paging) for engine in engines if engine.paging is not None])


def _paging(engines: list[tuple[str, PagingStats]]) -> Iterator[Metric]:
    moves: list[_Row] = []
    for name, stats in engines:
        moves += [((name, "read"), stats.pages_in), ((name, "dropped"), stats.pages_out)]
        moves += [((name, "parked"), stats.parked), ((name, "unparked"), stats.unparked)]
        moves += [((name, "failed"), stats.failures)]
    yield _counter("engine_adapter_moves", "Adapters that came or went, by how.", ("base_model", "kind"), moves)
    waits: list[_Row] = [((name,), stats.wait_s) for name, stats in engines]
    yield _counter("engine_adapter_wait_seconds", "Time models waited for room.", ("base_model",), waits)
    waiting: list[_Row] = [((name,), stats.num_waiting) for name, stats in engines]
    yield _gauge("engine_adapters_waiting", "Models that wait for room.", ("base_model",), waiting)
    used: list[_Row] = [((name,), stats.used_bytes) for name, stats in engines]
    yield _gauge("engine_adapter_bytes", "Memory that adapters take up.", ("base_model",), used)
