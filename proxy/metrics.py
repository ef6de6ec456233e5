"""What the scraper reads: counters of all workers, summed from shared memory at the moment of the question.

Names and labels are Fly's where Fly has the series (spec network §7: "Metrics on Fly.io"), else they begin with
`wakefront_`. Fly's counters end in `_count`, which OpenMetrics reserves, so they are exposed without a type. Only what
is truly counted is told: series that this version has no figures for are absent, not zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import Metric

from proxy import state
from proxy.state import SharedMemory

_WAKE_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


@dataclass(frozen=True, slots=True)
class AppCells:
    name: str
    slot: int


@dataclass(frozen=True, slots=True)
class MachineFacts:
    app: str
    id: str
    slot: int
    is_up: bool
    state: str
    exit_code: int | None
    exit_oom: bool
    restarts: int
    is_held: bool
    checks: Sequence[tuple[str, str]] = ()  # names and statuses


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """All that is told beside the counters. Made on the loop; the counters are read in whatever thread asks."""

    region: str
    host: str
    apps: Sequence[AppCells]
    machines: Sequence[MachineFacts]
    worker_starts: int
    certificates: CertificateFacts | None = None


@dataclass(frozen=True, slots=True)
class CertificateFacts:
    """Names that are kept in certificates by ACME or were brought."""

    served: int
    waiting: int  # without a certificate yet
    failing: dict[str, int]  # by what went wrong last
    soonest_expiry: float  # unix seconds; 0: there is no certificate
    obtained: int  # since control began, as the next three
    renewed: int
    failures: dict[str, int]
    asked: int  # questions whether a name may have one on demand
    clock_skew_s: float  # the CA's clock less ours


class FactsSource(Protocol):
    def facts(self) -> NodeFacts: ...


class Metrics:
    """The registry of a node."""

    def __init__(self, memory: SharedMemory, source: FactsSource) -> None:
        self._memory = memory
        self._source = source
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._wakes = Histogram(
            "wakefront_wake_seconds", "From asking for a machine to its accepting connections, by how it ended.",
            ("app", "from_state", "code"), buckets=_WAKE_BUCKETS_S, registry=self._registry,
        )  # fmt: skip

    def saw_wake(self, app: str, from_state: str, code: str, seconds: float) -> None:
        self._wakes.labels(app, from_state, code).observe(seconds)

    def render(self) -> bytes:
        """The text format. Reads many cells: call it in a thread."""
        return generate_latest(self._registry)

    def describe(self) -> Iterable[Metric]:
        """Nothing, so that registering does not collect."""
        return ()

    def collect(self) -> Iterator[Metric]:
        facts = self._source.facts()
        base = {"region": facts.region, "host": facts.host}
        yield from self._app_metrics(facts, base)
        yield from self._machine_metrics(facts, base)
        yield from self._worker_metrics(facts, base)
        if facts.certificates is not None:
            yield from self._certificate_metrics(facts.certificates, base)

    # --- apps

    def _app_metrics(self, facts: NodeFacts, base: dict[str, str]) -> Iterator[Metric]:
        responses = _metric("fly_edge_http_responses_count", "Responses sent to clients, by status.")
        latency = _metric("fly_edge_http_response_time_seconds", "From request head to response head.", "histogram")
        upstream = _metric("fly_app_http_response_time_seconds", "To the machine's response head.", "histogram")
        plain = {cell: _metric(name, text) for name, text, cell in _APP_COUNTERS}
        for app in facts.apps:
            cells = self._app_cells(app.slot)
            labels = {"app": app.name, **base}
            for status, cell in (*state.STATUS_CELL.items(), ("other", state.OTHER_STATUS)):
                if cells[cell]:
                    responses.add_sample(responses.name, {**labels, "status": str(status)}, cells[cell])
            _add_histogram(latency, labels, cells, state.A_LATENCY, state.A_LATENCY_SUM_US)
            _add_histogram(upstream, labels, cells, state.A_UPSTREAM_LATENCY, state.A_UPSTREAM_LATENCY_SUM_US)
            for cell, metric in plain.items():
                metric.add_sample(metric.name, labels, cells[cell])
        yield from (responses, latency, upstream, *plain.values())

    def _app_cells(self, slot: int) -> list[int]:
        """An app's block, summed over the workers."""
        memory = self._memory
        total = [0] * state.APP_CELLS
        for worker in range(memory.rows_ever_used):
            base = memory.app_base(worker, slot)
            for cell, value in enumerate(memory.cells[base : base + state.APP_CELLS].tolist()):
                total[cell] += value
        return total

    # --- machines

    def _machine_metrics(self, facts: NodeFacts, base: dict[str, str]) -> Iterator[Metric]:
        load = _metric("fly_app_concurrency", "Requests or connections in flight on a machine.", "gauge")
        admitted = _metric("wakefront_machine_admitted_count", "Requests or connections ever sent to a machine.")
        up = _metric("fly_instance_up", "1 while the machine runs.", "gauge")
        code = _metric("fly_instance_exit_code", "Exit code of the last end.", "gauge")
        oom = _metric("fly_instance_exit_oom", "1 if the last end was for lack of memory.", "gauge")
        restarts = _metric("wakefront_machine_restarts_count", "Restarts by restart policy.")
        held = _metric("wakefront_machine_held", "1 while starts are held back after failures.", "gauge")
        checks = _metric("wakefront_check_passing", "1 while a health check of a running machine passes.", "gauge")
        states = _metric("wakefront_machine_state", "1 for the state that the machine is in.", "gauge")
        for one in facts.machines:
            labels = {"app": one.app, **base, "instance": one.id}
            if one.is_up:
                for name, status in one.checks:
                    checks.add_sample(checks.name, {**labels, "check": name}, int(status == "passing"))
                load.add_sample(load.name, labels, max(0, self._memory.in_flight(one.slot)))
                up.add_sample(up.name, labels, 1)
            admitted.add_sample(admitted.name, labels, self._memory.admitted(one.slot))
            if one.exit_code is not None:
                code.add_sample(code.name, labels, one.exit_code)
                oom.add_sample(oom.name, labels, int(one.exit_oom))
            restarts.add_sample(restarts.name, labels, one.restarts)
            held.add_sample(held.name, labels, int(one.is_held))
            states.add_sample(states.name, {**labels, "state": one.state}, 1)
        yield from (load, admitted, up, code, oom, restarts, held, checks, states)

    # --- certificates

    def _certificate_metrics(self, facts: CertificateFacts, base: dict[str, str]) -> Iterator[Metric]:
        names = _metric("wakefront_certificate_names", "Names kept in certificates, by whether there is one.", "gauge")
        names.add_sample(names.name, {**base, "state": "served"}, facts.served)
        names.add_sample(names.name, {**base, "state": "waiting"}, facts.waiting)
        failing = _metric("wakefront_certificate_failing", "Names by what keeps a new certificate away.", "gauge")
        for kind, count in facts.failing.items():
            failing.add_sample(failing.name, {**base, "failure": kind}, count)
        failures = _metric("wakefront_certificate_failures_count", "Attempts that came to nothing, by why.")
        for kind, count in facts.failures.items():
            failures.add_sample(failures.name, {**base, "failure": kind}, count)
        yield from (names, failing, failures)
        for name, text, kind, value in (
            ("wakefront_certificate_soonest_expiry_seconds", "When the first one ends; unix time.", "gauge",
             facts.soonest_expiry),
            ("wakefront_certificates_obtained_count", "Certificates obtained, renewals included.", "unknown",
             facts.obtained),
            ("wakefront_certificates_renewed_count", "Renewals.", "unknown", facts.renewed),
            ("wakefront_on_demand_asked_count", "Questions whether a name may have one.", "unknown", facts.asked),
            ("wakefront_ca_clock_skew_seconds", "The CA's clock less this host's.", "gauge", facts.clock_skew_s),
        ):  # fmt: skip
            if value or kind != "gauge":
                metric = _metric(name, text, kind)
                metric.add_sample(name, base, value)
                yield metric

    # --- workers

    def _worker_metrics(self, facts: NodeFacts, base: dict[str, str]) -> Iterator[Metric]:
        starts = _metric("wakefront_worker_starts_count", "Worker processes that have connected to this control.")
        starts.add_sample(starts.name, base, facts.worker_starts)
        yield starts
        for name, text, kind, cell in _WORKER_METRICS:
            metric = _metric(name, text, kind)
            for worker in range(self._memory.rows_ever_used):
                value = self._memory.cells[self._memory.worker_base(worker) + cell]
                metric.add_sample(name, {**base, "worker": str(worker)}, value)
            yield metric


_APP_COUNTERS = (
    ("fly_edge_data_in", "Bytes from clients.", state.A_BYTES_IN),
    ("fly_edge_data_out", "Bytes to clients.", state.A_BYTES_OUT),
    ("fly_edge_tcp_connects_count", "Client connections.", state.A_CONNECTS),
    ("fly_edge_tcp_disconnects_count", "Client connections ended.", state.A_DISCONNECTS),
    ("fly_app_tcp_connects_count", "Connections to machines.", state.A_UPSTREAM_CONNECTS),
    ("fly_app_tcp_disconnects_count", "Connections to machines ended.", state.A_UPSTREAM_DISCONNECTS),
    ("wakefront_errors_count", "Answers made by the edge because something failed.", state.A_ERRORS),
    ("wakefront_wakes_count", "Requests that waited for a machine to start.", state.A_WAKES),
)
_WORKER_METRICS = (
    ("fly_edge_tls_handshake_errors", "TLS handshakes that failed.", "unknown", state.W_TLS_ERRORS),
    ("wakefront_tls_handshakes_count", "TLS handshakes done.", "unknown", state.W_TLS_HANDSHAKES),
    ("wakefront_tls_resumed_count", "TLS handshakes that resumed a session.", "unknown", state.W_TLS_RESUMED),
    ("wakefront_connections", "Client connections open.", "gauge", state.W_CONNECTIONS),
    ("wakefront_accepted_count", "Client connections accepted.", "unknown", state.W_ACCEPTED),
    ("fly_edge_tcp_connections_drop_count", "Connections over the limit.", "unknown", state.W_REFUSED),
    ("wakefront_log_dropped_count", "Access log lines lost.", "unknown", state.W_LOG_DROPPED),
    ("wakefront_queued", "Requests waiting for a machine below its hard limit.", "gauge", state.W_QUEUED),
    ("wakefront_queue_timeouts_count", "Requests that waited in vain.", "unknown", state.W_QUEUE_TIMEOUTS),
    (
        "wakefront_source_refused_count",
        "Connections and handshakes over a source's limits.",
        "unknown",
        state.W_SOURCE_REFUSED,
    ),
    ("wakefront_shed_connections_count", "Connections refused for overload.", "unknown", state.W_SHED_CONNECTIONS),
    ("wakefront_shed_requests_count", "Requests refused for overload.", "unknown", state.W_SHED_REQUESTS),
    ("wakefront_peer_connects_count", "Connections made to other edges.", "unknown", state.W_PEER_CONNECTS),
    ("wakefront_peer_requests_count", "Requests sent to other edges.", "unknown", state.W_PEER_REQUESTS),
    ("wakefront_peer_refusals_count", "Requests that other edges refused.", "unknown", state.W_PEER_REFUSALS),
    ("wakefront_backhaul_requests_count", "Requests from other edges.", "unknown", state.W_BACKHAUL_REQUESTS),
    (
        "wakefront_overload_stage",
        "0 normal, 1 crowded, 2 sheds connections, 3 sheds requests.",
        "gauge",
        state.W_OVERLOAD_STAGE,
    ),
    ("wakefront_loop_lag_us", "Latest lateness of the worker's loop.", "gauge", state.W_LOOP_LAG_US),
)


def _metric(name: str, text: str, kind: str = "unknown") -> Metric:
    return Metric(name, text, kind)


def _add_histogram(metric: Metric, labels: dict[str, str], cells: Sequence[int], first: int, sum_cell: int) -> None:
    """From buckets that count each on their own to Prometheus' cumulative ones."""
    seen = 0
    for place, bound in enumerate(state.LATENCY_BOUNDS_S):
        seen += cells[first + place]
        metric.add_sample(f"{metric.name}_bucket", {**labels, "le": str(bound)}, seen)
    seen += cells[first + len(state.LATENCY_BOUNDS_S)]
    metric.add_sample(f"{metric.name}_bucket", {**labels, "le": "+Inf"}, seen)
    metric.add_sample(f"{metric.name}_count", labels, seen)
    metric.add_sample(f"{metric.name}_sum", labels, cells[sum_cell] / 1e6)
