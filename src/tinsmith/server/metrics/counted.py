"""What is counted as it happens."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from tinsmith.control.futures import RequestSpan, RequestType
from tinsmith.control.usage import TokenKind
from tinsmith.server.metrics.classes import CLASSES

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
_COMMIT_SECONDS = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.0, 5.0)


class CountedFigures:
    """An `Observer` of control, and of the HTTP layer."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "tinsmith_requests", "Requests that ended, by type and how.", ["type", "outcome"], registry=registry
        )
        self._errors = Counter(
            "tinsmith_errors", "Requests that failed, by whose fault it was.", ["category"], registry=registry
        )
        self._wait = Histogram(
            "tinsmith_request_wait_seconds",
            "From a request's arrival to its turn.",
            ["class"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._run = Histogram(
            "tinsmith_request_run_seconds",
            "From a request's turn to its end.",
            ["class"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._tokens = Counter(
            "tinsmith_tokens", "Tokens computed for requests that succeeded.", ["base_model", "kind"], registry=registry
        )
        self._commit = Histogram(
            "tinsmith_ledger_commit_seconds",
            "One transaction of the ledger, its fsync included.",
            buckets=_COMMIT_SECONDS,
            registry=registry,
        )
        self._writes = Counter("tinsmith_ledger_writes", "Changes written to the ledger.", registry=registry)
        self._http = Counter(
            "tinsmith_http_requests", "HTTP requests answered.", ["method", "route", "status"], registry=registry
        )
        self._http_seconds = Histogram(
            "tinsmith_http_request_seconds",
            "HTTP requests, long polls among them.",
            ["route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._http_open = Gauge("tinsmith_http_open_requests", "HTTP requests under way.", registry=registry)
        for category in ("user", "server", "unknown"):
            self._errors.labels(category)
        for name in dict.fromkeys(CLASSES.values()):
            self._wait.labels(name)
            self._run.labels(name)

    # ---- Observer ----

    def request_opened(
        self, request_id: str, request_type: RequestType, session_id: str | None, subject: str | None
    ) -> None:
        """Those that are open are read when somebody asks."""

    def request_ended(self, span: RequestSpan) -> None:
        outcome = "ok" if span.category is None else span.category.value
        self._requests.labels(span.request_type, outcome).inc()
        if span.category is not None:
            self._errors.labels(outcome).inc()
        if span.started_at is None or span.finished_at is None:
            return
        name = CLASSES[span.request_type]
        self._wait.labels(name).observe(max(0.0, span.started_at - span.opened_at))
        self._run.labels(name).observe(max(0.0, span.finished_at - span.started_at))

    def tokens(self, kind: TokenKind, base_model: str, count: int) -> None:
        self._tokens.labels(base_model, kind).inc(count)

    def committed(self, num_writes: int, seconds: float) -> None:
        self._commit.observe(seconds)
        self._writes.inc(num_writes)

    # ---- HTTP ----

    def http_began(self) -> None:
        self._http_open.inc()

    def http_ended(self, method: str, route: str, status: int, seconds: float) -> None:
        """`route` is a template: `/api/v1/sessions/{session_id}`."""
        self._http_open.dec()
        self._http.labels(method, route, status).inc()
        self._http_seconds.labels(route).observe(seconds)
