"""What the server counts, in Prometheus' text format."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """One server's counters, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter("requests", "requests by route and status", ("route", "status"))
        self.refused = self._counter("refused", "requests refused because too many were waiting")
        self.timed_out = self._counter("timed_out", "answers given up at their deadline")
        self.cancelled = self._counter("cancelled", "answers whose client went away")
        self.prompt_tokens = self._counter("prompt_tokens", "tokens read", ("model",))
        self.new_tokens = self._counter("new_tokens", "tokens generated", ("model",))
        self.drafted = self._counter("drafted_tokens", "tokens the shadow drafted")
        self.accepted = self._counter("accepted_tokens", "drafted tokens the attached model took")
        self.routed = self._counter("routed", "answers by who gave them and why", ("answered_by", "reason"))
        self.degraded = self._counter("degraded", "answers from the edge because the cloud gave none")
        self.cloud_attempts = self._counter("cloud_attempts", "calls of the cloud by outcome", ("outcome",))
        self.running = self._gauge("running_rows", "answers being decoded")
        self.waiting = self._gauge("waiting_rows", "answers waiting for a place")
        self.breaker_open = self._gauge("breaker_open", "1 while the cloud is not asked because it failed")
        self.batch_rows = self._histogram("batch_rows", "rows decoded together", _ROWS)
        self.queue_seconds = self._histogram("queue_seconds", "time from submission to prefill", _SECONDS)
        self.prefill_seconds = self._histogram("prefill_seconds", "time to read prompts", _SECONDS)
        self.request_seconds = self._histogram("request_seconds", "time to answer", _SECONDS)

    def _counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(f"shadowpeft_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"shadowpeft_{name}", text, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"shadowpeft_{name}", text, buckets=buckets, registry=self.registry)

    def count_drafts(self, num_drafted: int, num_accepted: int) -> None:
        self.drafted.inc(num_drafted)
        self.accepted.inc(num_accepted)

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def value(self, name: str, **labels: str) -> float:
        """A counter's or gauge's value, 0 if it never moved; for tests and the page."""
        return self.registry.get_sample_value(f"shadowpeft_{name}", labels) or 0.0
